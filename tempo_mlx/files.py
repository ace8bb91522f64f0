"""Files appear whole or not at all: written under a temporary name, then renamed."""

import os
import tempfile
from pathlib import Path

from .errors import TempoError


def check_writable(argument: str, path: Path) -> None:
    """Raise ValueError naming the argument unless a file can be written at path.

    For long work: called before it starts, so that its result is not lost at the end.
    """
    if path.is_dir():
        raise TempoError(f"{argument} {path} is a folder; name a file")
    try:
        handle, probe = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise TempoError(f"{argument} {path} cannot be written: {error.strerror}") from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write the whole file, or leave what was there."""
    raw = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
