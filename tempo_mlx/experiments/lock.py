"""The lock of a suite's folder: only one command at a time may write there.

The system releases the lock when the process that holds it ends, however it ends.

:func:`in_use` takes the lock for a moment to test it. A second lock, the gate, serialises these
tests with commands that start, so a test never makes a command fail.
"""

import fcntl
import os
from pathlib import Path

from ..errors import TempoError

LOCK, GATE = ".lock", ".gate"


class LockedError(TempoError):
    """Another command is using the folder."""


class Lock:
    """The right to write to a folder, until :meth:`release` or the end of the process.

    Raises:
        LockedError: if another command holds it.
    """

    def __init__(self, folder: Path):
        gate = os.open(folder / GATE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(gate, fcntl.LOCK_EX)
            self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    raise LockedError(
                        f"{folder} is in use by another command; wait for it to end or choose "
                        "another --output"
                    )
            except TempoError:
                os.close(self._fd)
                raise
        finally:
            os.close(gate)

    def release(self) -> None:
        os.close(self._fd)


def in_use(folder: Path) -> bool:
    """Whether a command is using the folder."""
    opened: list[int] = []
    try:
        for name in (GATE, LOCK):
            opened.append(os.open(folder / name, os.O_RDONLY))
        gate, lock = opened
        _flock(gate, fcntl.LOCK_SH)
        return not _flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    finally:
        # The gate last, so that no one passes it while the lock is still held.
        for fd in reversed(opened):
            os.close(fd)


def _flock(fd: int, kind: int) -> bool:
    """Lock a file; returns whether it succeeded, which only LOCK_NB may prevent."""
    try:
        fcntl.flock(fd, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise TempoError(f"the folder cannot be locked: {error.strerror}") from error
    return True
