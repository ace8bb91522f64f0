"""The command line: ``tempo-mlx``, also ``python -m tempo_mlx``."""

import errno
import importlib
import importlib.metadata
import inspect
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import Interrupted, TempoError
from ..interrupts import leave_on_interrupt
from ..old_names import RenamedWarning
from ..text.printable import visible

#: Commands in the order of the help, each a module of this package -> its help.
COMMANDS = {
    "generate": "Generate text with parallel token sets.",
    "chat": "Chat with a model; each answer shows its parallel sets as they are generated.",
    "search": "Generate text by Monte Carlo tree search over one shared cache.",
    "score": "Score and rank words that may follow contexts.",
    "rescore": "Rerank the hypotheses of a decoder: n-best lists, lattices, tuning.",
    "evaluate": "Evaluate a model with lm-evaluation-harness, each shared beginning read once.",
    "serve": "Serve a model over HTTP with OpenAI's API, with exact scores and sets.",
    "experiment": "Run suites of prompts, settings and seeds from one file, analyse them and write "
    "reports.",
    "schedule": "Show how a schedule moves a threshold over a run.",
    "models": "List models that can be run by name and models in the Hub's cache, or fetch one.",
    "doctor": "Report versions, device and speed, and what is missing.",
    "bench": "Measure speed and memory on this machine. Variants alternate in one process; the "
    "tables show medians and quartiles. Targets are printed, never enforced.",
}


class Commands(TyperGroup):
    """The commands by name. A command's module is only imported when that command runs.

    Importing all of them takes seconds, and the help needs none.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name], rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(str(command.name)), rest


def _application(**changed: Any) -> typer.Typer:
    return typer.Typer(
        name="tempo-mlx",
        help="TEMPO on MLX: generate with parallel token sets that share one position and one "
        "cache.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        **changed,
    )


app = _application(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})


def load_command(name: str) -> Any:
    """Import a command's module, and return the command with its options.

    Args:
        name: a key of :data:`COMMANDS`.
    """
    with leave_on_interrupt():
        module = importlib.import_module(f"{__name__}.{name}")
        application = _application()
        module.register(application)
        command = typer.main.get_group(application).commands[name]
    for each in (command, *getattr(command, "commands", {}).values()):
        each.help = _unwrapped(each.help or "")
    return command


def _unwrapped(text: str) -> str:
    """A docstring with each paragraph on one line, for typer to wrap at the terminal's width."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _print_version(wanted: bool) -> None:
    if wanted:
        versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
        others = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"tempo-mlx {importlib.metadata.version('tempo-mlx')} ({others})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of tempo-mlx, mlx and mlx-lm, and exit.",
        ),
    ] = False,
) -> None:
    pass


#: Exit code of a command that Ctrl-C has ended.
INTERRUPTED = 130


def fail(message: str, code: int = 2) -> None:
    """Print one line on standard error and exit with the code."""
    line = visible(" ".join(message.split()))
    print(f"tempo-mlx: error: {line}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line; bad input ends in one line and exit code 2, Ctrl-C in 130."""
    _prepare_streams()
    try:
        try:
            with _new_names_told():
                code = app(standalone_mode=False)
        except typer.Exit as exit:
            code = exit.exit_code
        if code == INTERRUPTED:
            # What Typer makes of Ctrl-C, without a word.
            raise KeyboardInterrupt
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        fail("interrupted", INTERRUPTED)
    except Interrupted as stopped:
        fail(str(stopped), INTERRUPTED)
    except typer.TyperException as error:
        code = 0
        # Without a message, the help was requested and has been printed.
        if message := error.format_message():
            fail(message)
    except BrokenPipeError:
        # The reader of our output has exited (`| head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (TempoError, OSError) as error:
        if os.environ.get("TEMPO_MLX_DEBUG"):
            raise
        fail(_described(error))
    raise SystemExit(code or 0)


@contextmanager
def _new_names_told() -> Iterator[None]:
    """Print warnings about old names of settings as notes, each once."""
    told = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *place: Any, **kw: Any) -> None:
            if not issubclass(category, RenamedWarning):
                show(message, category, *place, **kw)
            elif str(message) not in told:
                told.add(str(message))
                print(f"note: {visible(str(message))}", file=sys.stderr)

        warnings.simplefilter("always", RenamedWarning)
        warnings.showwarning = note
        yield


def _prepare_streams() -> None:
    """Make printing safe: closed streams discard output, and unencodable characters are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _described(error: Exception) -> str:
    """The error's message, with the file that it concerns."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    # Errors in writing files name the file; without one, standard output was full.
    full = error.errno == errno.ENOSPC
    where = error.filename or ("standard output" if full else None)
    return f"{where}: {error.strerror}" if where else error.strerror
