"""Atomic writing of files, and direct writing to pipes and devices.

A regular file is written under a temporary name in the same folder, then renamed.
"""

import errno
import fcntl
import glob
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from ..errors import TempoError
from ..text.printable import running

#: The standard streams, in the order of their descriptors.
_STREAMS = tuple(Path(f"/dev/{name}") for name in ("stdin", "stdout", "stderr"))
STANDARD_INPUT, STANDARD_OUTPUT, STANDARD_ERROR = _STREAMS

#: The folder with the descriptors of a process.
_DESCRIPTORS = Path("/dev/fd")

#: Most symbolic links followed, about the system's own limit.
_MOST_LINKS = 40

#: The bits of a mode that allow writing.
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

#: Characters of a file's name that its temporary name keeps, to stay short.
_NAME = 50


def check_writable(argument: str, path: Path) -> None:
    """Raise TempoError naming the argument unless a file can be written at path.

    Call it before long work, so the result is not lost at the end.
    """
    try:
        if path.is_dir():
            raise TempoError(f"{argument} {path} is a folder; name a file")
        number = descriptor(path)
        if number is not None:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise TempoError(f"{argument} {path} is open for reading only")
        elif replaceable(path):
            # Replacing it would work, but its mode forbids it.
            if path.exists() and not path.stat().st_mode & _WRITABLE:
                raise TempoError(
                    f"{argument} {path} is read-only; make it writable or name another"
                )
            _new_file(_target(path)).unlink()
        elif not _takes_bytes(path):
            raise TempoError(f"{argument} {path} must be a file, a pipe or a character device")
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise TempoError(f"{argument} {path} cannot be written: {error.strerror}") from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file atomically; see :func:`writing`."""
    raw = data.encode() if isinstance(data, str) else data
    with writing(path) as file:
        file.write(raw)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it appears at path when the block ends without an error.

    A symbolic link is kept and its target replaced, with the mode and owner of the old file.
    Anything but a regular file (a pipe, a device, a descriptor such as /dev/fd/63) is written
    directly, and its reader may close it early.

    Raises:
        OSError: naming path, if it cannot be written.
    """
    if not replaceable(path):
        with suppress(BrokenPipeError), naming(path), through(path) as file:
            yield file
        return
    with naming(path):
        target = _target(path)
        temporary = _new_file(target)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                _pass_on(os.stat(target), temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def through(path: Path) -> Iterator[BinaryIO]:
    """Open a pipe, a device or a descriptor for writing, directly and not atomically."""
    number = descriptor(path)
    if number == 1:
        # Python's buffered output comes first.
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    else:
        handle = os.dup(number) if number is not None else os.open(path, os.O_WRONLY)
        with os.fdopen(handle, "wb") as file:
            yield file


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to OSErrors raised in the block."""
    try:
        yield
    except OSError as error:
        where = "standard output" if descriptor(path) == 1 else str(path)
        number = error.errno or errno.EIO
        raise OSError(number, error.strerror or str(error), where) from error


class Stream:
    """Unbuffered text output to a pipe or a device, safe to read on a terminal.

    Args:
        path: None for standard output.
    """

    def __init__(self, path: Path | None = None):
        self._path = path or STANDARD_OUTPUT
        self._open = ExitStack()
        with naming(self._path):
            self._file = self._open.enter_context(through(self._path))

    def write(self, text: str) -> None:
        """Write the whole text.

        Raises:
            OSError: naming the path.
        """
        with naming(self._path):
            # Control characters are data to a program, but commands to a terminal.
            self._file.write((running(text) if self._file.isatty() else text).encode())
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with naming(self._path):
            self._open.close()


def leftovers(path: Path) -> Iterator[Path]:
    """Temporary files of processes that died while writing this file."""
    return path.parent.glob(f".{glob.escape(path.name[:_NAME])}.{'[0-9a-f]' * 16}.tmp")


def replaceable(path: Path) -> bool:
    """Whether path is a regular file or does not exist, so it is written by replacing it.

    Raises:
        OSError: if this cannot be determined, for example for lack of permission.
    """
    if descriptor(path) is not None:
        return False
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def descriptor(path: Path) -> int | None:
    """The open descriptor that /dev/stdout, /dev/fd/63 or a link to one of them refers to."""
    for _ in range(_MOST_LINKS):
        if path in _STREAMS:
            return _STREAMS.index(path)
        if path.name.isdecimal() and same_file(path.parent, _DESCRIPTORS):
            return int(path.name)
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            break
    return None


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to the same file, through hard or symbolic links, even if missing."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _target(path: Path) -> Path:
    """The path at the end of symbolic links."""
    return Path(os.path.realpath(path))


def _new_file(target: Path) -> Path:
    """Create an empty file in the target's folder, with the mode that the umask allows."""
    path = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return path


def _pass_on(old: os.stat_result, path: Path) -> None:
    """Give a file the mode and, if permitted, the owner of the file that it replaces."""
    with suppress(PermissionError):
        os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, stat.S_IMODE(old.st_mode))


def _takes_bytes(path: Path) -> bool:
    """Whether path is a pipe or character device; block devices must not be written."""
    mode = os.stat(path).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
