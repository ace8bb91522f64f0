"""Results of many rows as JSON lines that survive a kill at any moment."""

import fcntl
import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ..errors import TempoError
from ..text.printable import finite, json_text
from .files import naming, writing

#: Key of a record whose row failed: why it did.
ERROR = "error"

ADVICE = "choose another --output or delete that file, or add --overwrite"


class ResultsFile:
    """A file of lines {"row": i, "key": ..., ...}, appended as rows finish; sort them by "row".

    Opening the file again takes over the rows that it holds. A line that a kill cut short is cut
    off. Failed rows (their records have the key "error") are dropped, because whoever opens the
    file tries them again. The file is locked while it is open; the lock ends with the process.

    Earlier versions kept rows that had finished out of turn in ``.<name>.pending``; these are
    taken over, too.

    Args:
        path: of the file; made if it is not there.
        keys: what identifies each input row, its settings and its model, see :func:`row_key`;
            may repeat.
        overwrite: drop lines that are not the result of a row with these keys.

    Raises:
        TempoError: if another process has the file open, it cannot be written, or a line of it is
            not the result of a row with these keys. The file is not changed.
        OSError: if the disk is too full to drop lines. The file is not changed.
    """

    def __init__(self, path: Path, keys: list[str], overwrite: bool = False):
        self._path = Path(os.path.realpath(path))
        self._keys = list(keys)
        self._fd: int | None = _locked(self._path)
        try:
            kept = self._load(overwrite)
            #: Numbers of the rows that are stored.
            self.done = set(kept)
            self._size = sum(map(len, kept.values()))
            os.ftruncate(self._fd, self._size)
        except BaseException:
            self.close()
            raise

    def add(self, row: int, record: dict[str, Any]) -> None:
        """Store the record of a row; it is on the disk when this returns.

        Args:
            row: number of the input row, in [0, number of keys).
            record: JSON-ready, without "row" and "key"; with "error" if the row failed. NaN and
                infinity, which JSON does not have, become null.

        Raises:
            TempoError: if the file is closed, there is no such row, it is stored already, or the
                record has a key that it must not have.
            OSError: if the disk is full. The file is as it was, and the row can be added again.
        """
        if self._fd is None:
            raise TempoError("the results file is closed")
        if not 0 <= row < len(self._keys):
            raise TempoError(f"row must be in [0, {len(self._keys)}), got {row}")
        if row in self.done:
            raise TempoError(f"row {row} is stored already")
        if not record.keys().isdisjoint(("row", "key")):
            raise TempoError('a record must not have the keys "row" and "key"')
        self._append(self._fd, _encoded({"row": row, "key": self._keys[row], **record}) + b"\n")
        self.done.add(row)

    def close(self) -> None:
        """Release the file. Closing twice does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, fd: int, line: bytes) -> None:
        """Write a line to the disk, all of it or nothing."""
        try:
            with naming(self._path):
                # What is behind the last whole line was cut short.
                os.ftruncate(fd, self._size)
                written = 0
                while written < len(line):
                    written += os.pwrite(fd, line[written:], self._size + written)
                os.fsync(fd)
        except BaseException:
            # If this fails as well, the next to append or to open cuts it off.
            with suppress(OSError):
                os.ftruncate(fd, self._size)
            raise
        self._size += len(line)

    def _load(self, overwrite: bool) -> dict[int, bytes]:
        """The lines of the rows that are stored; the file has no others when this returns."""
        pending = self._path.with_name(f".{self._path.name}.pending")
        whole, kept = 0, {}
        for path in (self._path, pending) if pending.exists() else (self._path,):
            *lines, torn = path.read_bytes().split(b"\n")
            whole += len(lines)
            for number, line in enumerate([*lines, torn], 1):
                row_of = self._row_of if number <= len(lines) else self._nothing_of
                try:
                    row = row_of(line)
                except TempoError as error:
                    if not overwrite:
                        raise TempoError(f"{path}, line {number} {error}; {ADVICE}") from error
                else:
                    if row is not None:
                        kept[row] = line + b"\n"
        if len(kept) < whole or pending.exists():
            with writing(self._path) as file:
                file.writelines(kept.values())
            # The lock is on the file that was replaced.
            old, self._fd = self._fd, _locked(self._path)
            assert old is not None
            os.close(old)
            pending.unlink(missing_ok=True)
        return kept

    def _row_of(self, line: bytes) -> int | None:
        """The row whose result a whole line is; None for a row that failed.

        Raises:
            TempoError: unless it is of a row with these keys.
        """
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TempoError("is not JSON") from error
        row = data.get("row") if isinstance(data, dict) else None
        if type(row) is not int:
            raise TempoError("is not the result of a row")
        if not 0 <= row < len(self._keys):
            raise TempoError(f"is of row {row}, but the input has {len(self._keys)} rows")
        # A row that failed may have another key because its input has been corrected.
        if ERROR in data:
            return None
        if data.get("key") != self._keys[row]:
            raise TempoError("is of another input, other settings or another model")
        return row

    def _nothing_of(self, torn: bytes) -> None:
        """Refuse to cut off what no kill of ours can have left: the file is someone else's."""
        heads = (_encoded({"row": row, "key": key})[:-1] for row, key in enumerate(self._keys))
        if torn and not any(torn.startswith(head) or head.startswith(torn) for head in heads):
            raise TempoError("is of another input, other settings or another model")


def row_key(*parts: Any) -> str:
    """16 hexadecimal digits of all that decides the result of a row.

    Args:
        parts: JSON-ready: the row, its settings, the fingerprint of the model, versions.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _encoded(data: dict[str, Any]) -> bytes:
    return json_text(finite(data)).encode()


def _locked(path: Path) -> int:
    """A descriptor of the file, which no other process can open like this until it is closed.

    Raises:
        TempoError: if the file is in use, or cannot be opened or locked.
    """
    in_use = f"{path} is in use by another run; wait for its end or choose another --output"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TempoError(f"{path} cannot be written: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise TempoError(f"{path} is not a regular file; choose another --output")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have replaced the file since it was opened here.
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise TempoError(in_use)
    except BlockingIOError as error:
        os.close(fd)
        raise TempoError(in_use) from error
    except OSError as error:
        os.close(fd)
        message = f"{path} cannot be locked: {error.strerror}; choose another --output"
        raise TempoError(message) from error
    except TempoError:
        os.close(fd)
        raise
    return fd
