"""Where the command line begins: ``tempo-mlx``, and ``python -m tempo_mlx``.

What the commands need takes seconds to import. Ctrl-C ends that in a line, as it ends a run.
"""

import os
import signal
from contextlib import suppress
from types import FrameType


def main() -> None:
    """Import the commands and run the one that was asked for."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from . import cli

    cli.build()
    signal.signal(signal.SIGINT, handler)
    cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    # Nothing is open yet, and an exception could be lost in the module that is being imported.
    with suppress(OSError):
        os.write(2, b"tempo-mlx: error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
