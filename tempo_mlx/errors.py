"""Errors that users can fix."""


class Interrupted(Exception):
    """Ctrl-C has ended a command, which says what is saved and how to go on."""


class TempoError(ValueError):
    """Bad input. One line names the argument, its value and what is allowed.

    The command line prints the message and exits with 2. Commands that process rows record it for
    the row. Any other exception is a bug in this program and keeps its traceback.
    """


class MissingExtraError(TempoError, ImportError):
    """An optional dependency is not installed; the message contains the command to install it."""


def raised_here(error: BaseException) -> bool:
    """Whether an error was raised in this package's code, and not in code that it calls.

    Errors from the code of models and users are reported to the user; ours keep their traceback.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    package = __name__.partition(".")[0]
    return last is not None and last.tb_frame.f_globals["__name__"].partition(".")[0] == package
