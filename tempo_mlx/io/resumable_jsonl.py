"""Results of many rows, one JSON record a line in input order, that outlive a kill at any moment.

A row that finishes before one of its predecessors waits in a journal beside the output; whatever
is in either file when a process dies is there for the next one.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import TempoError
from ..text.printable import finite, json_text
from .files import naming

#: Key of a record whose row failed: why it did.
ERROR = "error"

FOREIGN = "of another input, other settings or another model"
ADVICE = "choose another --output or delete that file, or add --overwrite"


class ResultsFile:
    """A file that holds the first rows of an input, in input order: {"row": i, "key": ..., ...}.

    Rows that wait for a predecessor are in ``.<name>.pending`` beside it, a file that exists only
    while there are any. A line that a kill cut short is cut off when the file is opened again. The
    output is locked while it is open; the lock goes when the process does, however it ends.

    A record with the key "error" is of a row that failed. Such rows do not count as done when the
    file is opened again: the rows behind the first of them go back to the journal until it has
    another record. A failed row that gets none keeps the old one.

    The output is made before the journal. Where there is no output, somebody has deleted it, and
    a journal that is still there is deleted, too.

    Args:
        path: of the output; made if it is not there.
        keys: what identifies each input row, its settings and its model, see :func:`row_key`;
            may repeat.
        overwrite: begin again where a line is not the result of a row with these keys.

    Raises:
        ValueError: if another process has the file open, it cannot be written, or a line of it or
            of the journal is not the result of a row with these keys. Neither file is changed.
        OSError: if the disk is too full to move rows between the files, or the journal cannot be
            opened. Nothing stored is lost.
    """

    def __init__(self, path: Path, keys: list[str], overwrite: bool = False):
        # Whatever link leads to it, a file has one journal.
        path = Path(os.path.realpath(path))
        #: Numbers of the rows that are stored, those not counted that an earlier process failed.
        self.done: set[int] = set()
        self._keys = list(keys)
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self._failed_before: dict[int, bytes] = {}
        self._pending_path = path.with_name(f".{path.name}.pending")
        self._journal: _Lines | None = None
        self._output: _Lines | None = None
        try:
            self._output = _Lines(path)
        except OSError as error:
            raise TempoError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._output.lock()
            if self._output.is_new:
                with suppress(FileNotFoundError):
                    os.unlink(self._pending_path)
            if self._pending_path.exists():
                self._journal = _Lines(self._pending_path)
            try:
                self._load(self._output)
            except TempoError:
                if not overwrite:
                    raise
                self._clear(self._output)
            self._settle(self._output)
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
            ValueError: if the file is closed, there is no such row, it is stored already, or the
                record has a key that it must not have.
            OSError: if the disk is full. Both files are as they were; the row is stored if it is
                in ``done``, else it can be added again.
        """
        if self._output is None:
            raise TempoError("the results file is closed")
        if not 0 <= row < len(self._keys):
            raise TempoError(f"row must be in [0, {len(self._keys)}), got {row}")
        if row in self.done:
            raise TempoError(f"row {row} is stored already")
        if not record.keys().isdisjoint(("row", "key")):
            raise TempoError('a record must not have the keys "row" and "key"')
        line = _encoded({"row": row, "key": self._keys[row], **record}) + b"\n"
        if row == self._next:
            self._output.append(line)
            self._next += 1
        else:
            self._put_off({row: line})
        self.done.add(row)
        self._failed_before.pop(row, None)
        self._settle(self._output)

    def close(self) -> None:
        """Release the file; what waits stays in the journal. Closing twice does nothing."""
        try:
            if self._output is not None and self._failed_before:
                self._waiting = self._failed_before | self._waiting
                # On a full disk rows stay in the journal, where the next process finds them.
                with suppress(OSError):
                    self._settle(self._output)
        finally:
            # The output last, because its lock protects both.
            for lines in (self._journal, self._output):
                if lines is not None:
                    lines.close()
            self._journal = self._output = None

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _put_off(self, lines: dict[int, bytes]) -> None:
        """Let rows wait in the journal."""
        if self._journal is None:
            self._journal = _Lines(self._pending_path)
        self._journal.append(b"".join(lines.values()))
        self._waiting |= lines

    def _settle(self, output: "_Lines") -> None:
        """Move the rows whose turn has come; remove a journal in which none waits."""
        stop = self._next
        while stop in self._waiting:
            stop += 1
        if stop > self._next:
            output.append(b"".join(self._waiting[row] for row in range(self._next, stop)))
            for row in range(self._next, stop):
                del self._waiting[row]
            self._next = stop
        if self._journal is not None and not self._waiting:
            os.unlink(self._pending_path)
            self._journal.close()
            self._journal = None

    def _load(self, output: "_Lines") -> None:
        """Take over what both files hold, all of it or (with an error) nothing."""
        lines, torn = output.read()
        records = [self._check(output.path, i + 1, line, i) for i, line in enumerate(lines)]
        following = range(len(self._keys))[len(lines) : len(lines) + 1]
        self._check_torn(output.path, len(lines) + 1, torn, following)
        self._next = next((i for i, each in enumerate(records) if ERROR in each), len(lines))
        behind = {row: lines[row] + b"\n" for row in range(self._next, len(lines))}
        failed = {row: line for row, line in behind.items() if ERROR in records[row]}
        if self._journal is not None:
            self._load_journal(self._journal)
        output.cut(sum(len(line) + 1 for line in lines))
        # On the disk in the journal, before they leave the output.
        moved = {row: behind[row] for row in behind.keys() - failed.keys() - self._waiting.keys()}
        if moved:
            self._put_off(moved)
        output.cut(sum(len(line) + 1 for line in lines[: self._next]))
        self.done = {*range(self._next), *self._waiting}
        self._failed_before = {row: failed[row] for row in failed.keys() - self.done}

    def _load_journal(self, journal: "_Lines") -> None:
        """Take over the rows that wait, without those that failed."""
        lines, torn = journal.read()
        records = [self._check(journal.path, i + 1, line) for i, line in enumerate(lines)]
        self._check_torn(journal.path, len(lines) + 1, torn, range(len(self._keys)))
        for record, line in zip(records, lines, strict=True):
            if record["row"] >= self._next and ERROR not in record:
                self._waiting[record["row"]] = line + b"\n"
        journal.cut(sum(len(line) + 1 for line in lines))

    def _clear(self, output: "_Lines") -> None:
        """Forget what both files hold; the journal, in which nothing waits then, will go."""
        output.cut(0)
        self._next = 0
        self.done.clear()
        self._waiting.clear()

    def _check(
        self, path: Path, number: int, line: bytes, expected: int | None = None
    ) -> dict[str, Any]:
        """The record of a whole line.

        Raises:
            ValueError: unless it is a result of these keys or a failure, and of the expected row.
        """
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TempoError(f"{path}, line {number} is not JSON; {ADVICE}") from error
        row = data.get("row") if isinstance(data, dict) else None
        if type(row) is not int or (expected is not None and row != expected):
            raise TempoError(f"{path}, line {number} is not the result of a row; {ADVICE}")
        if not 0 <= row < len(self._keys):
            raise TempoError(
                f"{path}, line {number} is of row {row}, the input has {len(self._keys)} rows; "
                f"{ADVICE}"
            )
        # A row that failed may have another key because its input has been corrected.
        if data.get("key") != self._keys[row] and ERROR not in data:
            raise TempoError(f"{path}, line {number} is {FOREIGN}; {ADVICE}")
        record: dict[str, Any] = data
        return record

    def _check_torn(self, path: Path, number: int, torn: bytes, rows: Iterable[int]) -> None:
        """Refuse to cut off what no kill of ours can have left: the file is someone else's."""
        heads = (_encoded({"row": row, "key": self._keys[row]})[:-1] for row in rows)
        if torn and not any(torn.startswith(head) or head.startswith(torn) for head in heads):
            raise TempoError(f"{path}, line {number} is {FOREIGN}; {ADVICE}")


def row_key(*parts: Any) -> str:
    """16 hexadecimal digits of all that decides the result of a row.

    Args:
        parts: JSON-ready: the row, its settings, the identity of the model, versions.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _encoded(data: dict[str, Any]) -> bytes:
    return json_text(finite(data)).encode()


class _Lines:
    """A file that grows by whole lines: what fails half-way is cut off again.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is a pipe or a device.
    """

    def __init__(self, path: Path):
        self.path = path
        #: Whether there was no such file.
        self.is_new = True
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self.is_new = False
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._size = 0
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise TempoError(f"{path} is not a regular file; choose another --output")

    def lock(self) -> None:
        """Keep other processes out until this one closes the file or dies."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TempoError(
                f"{self.path} is in use by another run; wait for its end or choose another --output"
            ) from error
        except OSError as error:
            raise TempoError(
                f"{self.path} cannot be locked: {error.strerror}; choose another --output"
            ) from error

    def read(self) -> tuple[list[bytes], bytes]:
        """The whole lines, and what is there of a last one that was cut short."""
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        *lines, torn = data.split(b"\n")
        return lines, torn

    def cut(self, size: int | None = None) -> None:
        """Drop what follows the last whole line, or so many bytes of lines."""
        if size is not None:
            self._size = size
        os.ftruncate(self._fd, self._size)

    def append(self, lines: bytes) -> None:
        """Write whole lines to the disk, all of them or none."""
        try:
            with naming(self.path):
                self.cut()
                written = 0
                while written < len(lines):
                    written += os.pwrite(self._fd, lines[written:], self._size + written)
                os.fsync(self._fd)
        except BaseException:
            # If this fails as well, the next to append or to open cuts it off.
            with suppress(OSError):
                self.cut()
            raise
        self._size += len(lines)

    def close(self) -> None:
        os.close(self._fd)
