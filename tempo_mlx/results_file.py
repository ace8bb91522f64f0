"""Results of many rows, one JSON record a line in input order, that outlive a kill at any moment.

A row that finishes before one of its predecessors waits in a journal beside the output; whatever
is in either file when a process dies is there for the next one.
"""

import fcntl
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import TempoError
from .files import naming

FOREIGN = "of another input, other settings or another model"
ADVICE = "choose another --output or delete that file, or add --overwrite"


class ResultsFile:
    """A file that holds the first rows of an input, in input order: {"row": i, "key": ..., ...}.

    Rows that wait for a predecessor are in ``.<name>.pending`` beside it, a file that exists only
    while there are any. A line that a kill cut short is cut off when the file is opened again. The
    output is locked while it is open; the lock goes when the process does, however it ends.

    Args:
        path: of the output; made if it is not there.
        keys: what identifies each input row, its settings and its model; may repeat.
        overwrite: begin again where a line is not the result of a row with these keys.

    Raises:
        ValueError: if another process has the file open, it cannot be written, or a line of it or
            of the journal is not the result of a row with these keys. Neither file is changed.
        OSError: if the disk is too full to move rows whose turn has come, or the journal cannot be
            opened. Nothing stored is lost.
    """

    def __init__(self, path: Path, keys: list[str], overwrite: bool = False):
        # Whatever link leads to it, a file has one journal.
        path = Path(os.path.realpath(path))
        #: Numbers of the rows that are stored.
        self.done: set[int] = set()
        #: Those whose record says that they failed, and why.
        self.failed: dict[int, str] = {}
        self._keys = list(keys)
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self._pending_path = path.with_name(f".{path.name}.pending")
        self._journal: _Lines | None = None
        self._output: _Lines | None = None
        try:
            self._output = _Lines(path)
        except OSError as error:
            raise TempoError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._output.lock()
            if self._pending_path.exists():
                self._journal = _Lines(self._pending_path)
            try:
                self._load(self._output, self._journal)
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
            record: JSON-ready, without "row" and "key".

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
            if self._journal is None:
                self._journal = _Lines(self._pending_path)
            self._journal.append(line)
            self._waiting[row] = line
        self.done.add(row)
        if "error" in record:
            self.failed[row] = str(record["error"])
        self._settle(self._output)

    def close(self) -> None:
        """Release the file; what waits stays in the journal. Closing twice does nothing."""
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

    def _load(self, output: "_Lines", journal: "_Lines | None") -> None:
        """Take over what both files hold, all of it or (with an error) nothing."""
        lines, torn = output.read()
        for number, line in enumerate(lines):
            self._check(output.path, number + 1, line, expected=number)
        self._next = len(lines)
        self.done.update(range(self._next))
        following = range(len(self._keys))[self._next : self._next + 1]
        self._check_torn(output.path, self._next + 1, torn, following)
        if journal is not None:
            lines, torn = journal.read()
            for number, line in enumerate(lines, 1):
                row = self._check(journal.path, number, line)
                if row >= self._next:
                    self._waiting[row] = line + b"\n"
            self._check_torn(journal.path, len(lines) + 1, torn, range(len(self._keys)))
            self.done.update(self._waiting)
            journal.cut()
        output.cut()

    def _clear(self, output: "_Lines") -> None:
        """Forget what both files hold; the journal, in which nothing waits then, will go."""
        output.clear()
        self._next = 0
        self.done.clear()
        self.failed.clear()
        self._waiting.clear()

    def _check(self, path: Path, number: int, line: bytes, expected: int | None = None) -> int:
        """The row of a whole line.

        Raises:
            ValueError: unless it is a result of these keys, and of the expected row.
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
        if data.get("key") != self._keys[row]:
            raise TempoError(f"{path}, line {number} is {FOREIGN}; {ADVICE}")
        if "error" in data:
            self.failed[row] = str(data["error"])
        return row

    def _check_torn(self, path: Path, number: int, torn: bytes, rows: Iterable[int]) -> None:
        """Refuse to cut off what no kill of ours can have left: the file is someone else's."""
        heads = (_encoded({"row": row, "key": self._keys[row]})[:-1] for row in rows)
        if torn and not any(torn.startswith(head) or head.startswith(torn) for head in heads):
            raise TempoError(f"{path}, line {number} is {FOREIGN}; {ADVICE}")


def _encoded(data: dict[str, Any]) -> bytes:
    # Half of a surrogate pair has no UTF-8; what replaces it is its escape in JSON.
    return json.dumps(data, ensure_ascii=False).encode(errors="backslashreplace")


class _Lines:
    """A file that grows by whole lines: what fails half-way is cut off again.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is a pipe or a device.
    """

    def __init__(self, path: Path):
        self.path = path
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
        self._size = len(data) - len(torn)
        return lines, torn

    def cut(self) -> None:
        """Drop what follows the last whole line."""
        os.ftruncate(self._fd, self._size)

    def clear(self) -> None:
        """Drop everything."""
        self._size = 0
        self.cut()

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
