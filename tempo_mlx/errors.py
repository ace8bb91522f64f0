"""Errors that a user can do something about."""


class TempoError(ValueError):
    """Bad input: the message names the argument, its value and what is allowed, in one line.

    The command line prints the message and exits with 2; a command that takes rows records it for
    the row. Any other exception is a fault of the program and keeps its traceback.
    """


class MissingExtraError(TempoError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


def raised_here(error: BaseException) -> bool:
    """Whether this package's code raised an error, and not code that it calls.

    For code of models and of users, whose errors are reported to the user; ours keep their
    traceback.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    package = __name__.partition(".")[0]
    return last is not None and last.tb_frame.f_globals["__name__"].partition(".")[0] == package
