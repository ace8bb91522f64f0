"""Ctrl-C while modules are imported.

What the commands need takes seconds to import. Ctrl-C ends that in a line, as it ends a run.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def leave_on_interrupt() -> Iterator[None]:
    """Meanwhile, Ctrl-C ends the process with one line and exit code 130.

    For imports, before anything is open: an exception could be lost in the module that is being
    imported. Where SIGINT has another handler, or is ignored, that stays.
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
