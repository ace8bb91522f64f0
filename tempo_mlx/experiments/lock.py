"""The lock of a suite's folder: one command at a time writes there.

The system releases the lock when the process that holds it ends, however it ends.
"""

import fcntl
import os
import time
from pathlib import Path

from ..errors import TempoError

LOCK = ".lock"

#: How often, and how many seconds apart, a command asks for the lock: :func:`in_use` may hold it
#: for a moment.
ATTEMPTS, PAUSE = 10, 0.02


class LockedError(TempoError):
    """Another command works on the folder."""


class Lock:
    """The right to write to a folder, until :meth:`release` or the end of the process.

    Raises:
        LockedError: if another command holds it.
    """

    def __init__(self, folder: Path):
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._acquire(folder)
        except BaseException:
            os.close(self._fd)
            raise

    def _acquire(self, folder: Path) -> None:
        for _ in range(ATTEMPTS):
            if _flock(self._fd, fcntl.LOCK_EX):
                return
            time.sleep(PAUSE)
        raise LockedError(
            f"{folder} is in use by another command; wait for it to end or choose another --output"
        )

    def release(self) -> None:
        os.close(self._fd)


def in_use(folder: Path) -> bool:
    """Whether a command works on the folder."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _flock(fd: int, kind: int) -> bool:
    """Whether the lock could be taken at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise TempoError(f"the folder cannot be locked: {error.strerror}") from error
    return True
