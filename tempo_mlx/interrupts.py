"""Ctrl-C during imports.

Importing what the commands need takes seconds. Ctrl-C ends it with one line, as it ends a run.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def leave_on_interrupt() -> Iterator[None]:
    """In the block, Ctrl-C ends the process with one line and exit code 130.

    Use it for imports, before anything is open. It does not raise, because the module being
    imported could swallow an exception. A custom or ignored SIGINT handler is kept.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"tempo-mlx: error: interrupted\n")
    os._exit(130)
