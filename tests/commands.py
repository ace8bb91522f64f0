"""``tempo-mlx`` in a process of its own, also one that a signal meets at a chosen moment.

The process signals itself: a test that watched it from outside would depend on which of the two is
faster. Run as a module, this is such a process.
"""

import itertools
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_EVENTS = ("open", "os.rename", "os.remove")


def run_command(arguments) -> subprocess.CompletedProcess:
    """Run ``tempo-mlx`` with these arguments to its end."""
    return _run("tempo_mlx", *arguments)


def run_signalled(
    arguments, sent: signal.Signals, passes: int = 0, files: int = 0, folder=""
) -> subprocess.CompletedProcess:
    """As `run_command`, in a process that calls `signal_itself`."""
    return _run("tests.commands", int(sent), passes, files, folder, *arguments)


def signal_itself(sent: int, passes: int = 0, files: int = 0, folder: str = "") -> None:
    """Have this process send itself a signal.

    Args:
        sent: the signal.
        passes: before which forward pass, counted from 1; 0 is never.
        files: before which opening, renaming or removing of a file below ``folder``; 0 is never.
    """
    from tempo_mlx.models import PositionedModel

    forward, n_passes, n_files = PositionedModel.__call__, itertools.count(1), itertools.count(1)

    def counted(*arguments, **options):
        if next(n_passes) == passes:
            signal.raise_signal(sent)
        return forward(*arguments, **options)

    def heard(event, arguments):
        below = event in FILE_EVENTS and str(arguments[0]).startswith(folder)
        if below and next(n_files) == files:
            signal.raise_signal(sent)

    PositionedModel.__call__ = counted
    sys.addaudithook(heard)


def _run(module, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    # A shell's background jobs ignore SIGINT, and so do their children unless they set it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers, folder = map(int, sys.argv[1:4]), sys.argv[4]
    sys.argv = ["tempo-mlx", *sys.argv[5:]]
    signal_itself(*numbers, folder)
    runpy.run_module("tempo_mlx", run_name="__main__")
