"""The ledger of a suite: which runs there are, and how far each has come.

A SQLite file, so that a change of several runs is made as a whole or not at all, whenever a process
dies. One command at a time works on a folder: it holds the folder's lock, which the system takes
from it when it ends, however it ends.
"""

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import TempoError

#: States of a run.
PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"

#: Seconds that a reader waits for a writer.
PATIENCE = 30.0

LOCK = ".lock"

#: Seconds after which a lock that somebody looked at is tried again.
RETRY = 0.01

TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, place INTEGER NOT NULL, configuration TEXT NOT NULL,
    state TEXT NOT NULL, started REAL, finished REAL, error TEXT);
CREATE TABLE IF NOT EXISTS sessions (started REAL NOT NULL, finished REAL);
"""


class LockedError(TempoError):
    """Another command works on the folder."""


class DiskFullError(OSError):
    """The disk has no room for what is to be stored; what is stored is whole."""


@dataclass(frozen=True)
class Entry:
    """A run as the ledger has it; times are seconds since 1970."""

    run_id: str
    configuration: str
    state: str
    started: float | None
    finished: float | None
    error: str | None


class Lock:
    """The right to write into a folder; released by :meth:`release` or the end of the process.

    Raises:
        LockedError: if another process has it.
    """

    def __init__(self, folder: Path):
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _flock(self._fd, fcntl.LOCK_EX):
                # A shared lock is :func:`in_use`, which lets it go at once.
                if _held_alone(self._fd):
                    raise LockedError(
                        f"{folder} is in use by another command; wait for its end or choose "
                        "another --output"
                    )
                time.sleep(RETRY)
        except OSError as error:
            os.close(self._fd)
            raise TempoError(f"{folder} cannot be locked: {error.strerror}") from error
        except BaseException:
            os.close(self._fd)
            raise

    def release(self) -> None:
        os.close(self._fd)


def in_use(folder: Path) -> bool:
    """Whether a command works on the folder; keeps none from beginning to."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return _held_alone(fd)
    finally:
        os.close(fd)


def _held_alone(fd: int) -> bool:
    """Whether somebody holds the lock who shares it with nobody."""
    if not _flock(fd, fcntl.LOCK_SH):
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Ledger:
    """The runs of one folder and their states.

    Args:
        path: of the file; made if it is not there.

    Raises:
        ValueError: if the file is no ledger.
        DiskFullError: from every method that writes.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(TABLES)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as those that the command line shows in a line."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DiskFullError(
                    errno.ENOSPC, "the disk is full, the ledger is unchanged", str(self.path)
                ) from error
            damaged = error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
            advice = "; delete it, and all runs are made again" if damaged else ""
            raise TempoError(f"{self.path} cannot be used: {error}{advice}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # After some errors SQLite has rolled back already.
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def plan(self, runs: Sequence[tuple[str, str]]) -> None:
        """Note the runs (id, configuration) in this order; what is known of them stays.

        Runs that an earlier command began or failed are to be run again.
        """
        rows = [(run_id, place, text, PENDING) for place, (run_id, text) in enumerate(runs)]
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO runs (run_id, place, configuration, state) "
                "VALUES (?, ?, ?, ?)",
                rows,
            )
            connection.execute(
                "UPDATE runs SET state = ?, started = NULL, finished = NULL, error = NULL "
                "WHERE state IN (?, ?)",
                (PENDING, RUNNING, FAILED),
            )
            connection.execute("INSERT INTO sessions VALUES (?, NULL)", (time.time(),))

    def forget(self, run_ids: Iterable[str]) -> None:
        """Runs are to be made again."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE runs SET state = ?, started = NULL, finished = NULL, error = NULL "
                "WHERE run_id = ?",
                [(PENDING, run_id) for run_id in run_ids],
            )

    def start(self, run_ids: Sequence[str]) -> None:
        """Runs begin."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE runs SET state = ?, started = ? WHERE run_id = ?",
                [(RUNNING, time.time(), run_id) for run_id in run_ids],
            )

    def finish(self, errors: dict[str, str | None]) -> None:
        """Runs have ended, all at once: by run id None where it is done, or why it failed."""
        now = time.time()
        rows = [
            (DONE if error is None else FAILED, now, error, run_id)
            for run_id, error in errors.items()
        ]
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE runs SET state = ?, finished = ?, error = ? WHERE run_id = ?", rows
            )

    def end(self) -> None:
        """The command ends."""
        with self._transaction() as connection:
            connection.execute("UPDATE sessions SET finished = ? WHERE finished IS NULL", _now())

    def entries(self) -> list[Entry]:
        """All runs, in the order of the suite."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT run_id, configuration, state, started, finished, error FROM runs "
                "ORDER BY place"
            ).fetchall()
        return [Entry(*row) for row in rows]

    def seconds_left(self) -> float | None:
        """Seconds that the runs to come will take at the pace of the latest command.

        None if none is to come, or no run has ended since that command began.
        """
        with self._errors():
            (began,) = self._connection.execute("SELECT MAX(started) FROM sessions").fetchone()
            ended, last = self._connection.execute(
                "SELECT COUNT(*), MAX(finished) FROM runs WHERE finished >= ?", (began or 0.0,)
            ).fetchone()
            (left,) = self._connection.execute(
                "SELECT COUNT(*) FROM runs WHERE state IN (?, ?)", (PENDING, RUNNING)
            ).fetchone()
        return left * (last - began) / ended if left and ended else None

    def close(self) -> None:
        self._connection.close()


def _now() -> tuple[float]:
    return (time.time(),)
