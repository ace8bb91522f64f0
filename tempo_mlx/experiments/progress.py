"""How far a suite has come, read from its folder while a command may be at work there."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ledger import DONE, FAILED, PENDING, RUNNING, in_use
from .store import damaged, read_ledger, read_manifest, size_of

#: States beside the ledger's: of runs that a command which was stopped had begun, and of runs that
#: the ledger calls done while a file of theirs is missing or damaged. The next command makes them.
INTERRUPTED, DAMAGED = "interrupted", "damaged"


@dataclass(frozen=True)
class Progress:
    """How far a suite has come.

    Args:
        suite: its name, None where no manifest says so.
        in_use: whether a command works on the folder.
        counts: number of runs by state: done, failed, running and pending, and where there are any
            interrupted and damaged.
        failures: by run id, why it failed.
        seconds_left: at the pace of the latest command; None where that says nothing.
        nbytes: of the folder.
    """

    suite: str | None
    in_use: bool
    counts: dict[str, int]
    failures: dict[str, str]
    seconds_left: float | None
    nbytes: int

    @property
    def total(self) -> int:
        """Runs."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "suite": self.suite,
            "in_use": self.in_use,
            "runs": {"total": self.total, **self.counts},
            "failures": self.failures,
            "seconds_left": self.seconds_left,
            "bytes": self.nbytes,
        }


def read_progress(folder: Path) -> Progress:
    """How far the suite of a folder has come.

    Raises:
        TempoError: if the folder holds no suite that was run, or what says so is damaged.
    """
    # Asked before and after, because a command may begin or end while the ledger is read.
    busy = in_use(folder)
    with closing(read_ledger(folder)) as ledger:
        entries, seconds_left = ledger.entries(), ledger.seconds_left()
    busy = in_use(folder) or busy
    broken = set(damaged(folder, [entry.run_id for entry in entries if entry.state == DONE]))
    counts = dict.fromkeys((DONE, FAILED, RUNNING, PENDING), 0)
    for entry in entries:
        state = entry.state
        if state == RUNNING and not busy:
            state = INTERRUPTED
        if entry.run_id in broken:
            state = DAMAGED
        counts[state] = counts.get(state, 0) + 1
    return Progress(
        read_manifest(folder).get("suite"),
        busy,
        counts,
        {entry.run_id: entry.error or "" for entry in entries if entry.state == FAILED},
        seconds_left,
        size_of(folder),
    )
