"""Errors that a user can do something about."""


class TempoError(ValueError):
    """Bad input: the message names the argument, its value and what is allowed, in one line.

    The command line prints the message and exits with 2; a command that takes rows records it for
    the row. Any other exception is a fault of the program and keeps its traceback.
    """


class MissingExtraError(TempoError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""
