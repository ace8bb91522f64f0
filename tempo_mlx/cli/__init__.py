"""The command line: ``tempo-mlx``, also ``python -m tempo_mlx``."""

import errno
import importlib
import io
import os
import sys

import typer

from ..errors import TempoError
from ..text.printable import visible

#: Commands, each a module of this package.
COMMANDS = ("generate", "search", "score", "experiment", "schedule", "models", "doctor", "bench")


app = typer.Typer(
    name="tempo-mlx",
    help="TEMPO on MLX: generate with parallel token sets that share one position and one cache.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def build() -> typer.Typer:
    """The application with all its commands."""
    if not app.registered_commands and not app.registered_groups:
        for name in COMMANDS:
            importlib.import_module(f"{__name__}.{name}").register(app)
    return app


def fail(message: str, code: int = 2) -> None:
    """One line on standard error, then the exit code."""
    line = visible(" ".join(message.split()))
    print(f"tempo-mlx: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2, Ctrl-C in 130."""
    _prepare_streams()
    try:
        try:
            code = build()(standalone_mode=False)
        except typer.Exit as exit:
            code = exit.exit_code
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except typer.TyperException as error:
        code = 0
        # Without a message it has printed the help, which was all that was asked for.
        if message := error.format_message():
            fail(message)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (TempoError, OSError) as error:
        if os.environ.get("TEMPO_MLX_DEBUG"):
            raise
        fail(_described(error))
    raise SystemExit(code or 0)


def _prepare_streams() -> None:
    """Let everything be printed: into nothing where a stream is closed, escaped where its encoding
    has no such character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _described(error: Exception) -> str:
    """What is wrong, and with which file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    # Whoever writes a file names it; what is printed goes to standard output.
    full = error.errno == errno.ENOSPC
    where = error.filename or ("standard output" if full else None)
    return f"{where}: {error.strerror}" if where else error.strerror
