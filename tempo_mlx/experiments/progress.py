"""The progress of a suite, read from its folder. A command may be running there."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from .lock import in_use
from .store import (
    DONE,
    FAILED,
    MARKS,
    PENDING,
    RESULTS,
    RUNNING,
    damaged,
    read_manifest,
    read_suite_file,
    size_of,
    states,
)

#: States of runs that no file shows: a command that was stopped had begun them, or one of their
#: files is damaged. The next command repeats both.
INTERRUPTED, DAMAGED = "interrupted", "damaged"


@dataclass(frozen=True)
class Progress:
    """The progress of a suite.

    Args:
        suite: its name.
        in_use: whether a command works on the folder.
        counts: number of runs by state: done, failed, running and pending; interrupted and damaged
            only if there are any.
        failures: by run id, why it failed.
        seconds_left: at the pace of the latest command; None if no run has ended since it began.
        nbytes: of the folder.
    """

    suite: str
    in_use: bool
    counts: dict[str, int]
    failures: dict[str, str]
    seconds_left: float | None
    nbytes: int

    @property
    def total(self) -> int:
        """Number of runs."""
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
    """The progress of the suite in a folder.

    Raises:
        TempoError: if the folder holds no suite, or its manifest is damaged.
    """
    suite, manifest = read_suite_file(folder), read_manifest(folder)
    # Asked before and after, because a command may begin or end in between.
    busy = in_use(folder)
    found = states(folder)
    busy = in_use(folder) or busy
    found |= dict.fromkeys(damaged(folder), DAMAGED)
    if not busy:
        stopped = [run_id for run_id, state in found.items() if state == RUNNING]
        found |= dict.fromkeys(stopped, INTERRUPTED)
    pending = manifest.get("runs", {}).get("total", len(found)) - len(found)
    counts = (
        dict.fromkeys((DONE, FAILED, RUNNING), 0) | {PENDING: pending} | Counter(found.values())
    )
    return Progress(
        suite["name"],
        busy,
        counts,
        {
            run_id: (folder / RESULTS / f"{run_id}{MARKS[FAILED]}").read_text(encoding="utf-8")
            for run_id, state in found.items()
            if state == FAILED
        },
        _seconds_left(folder, manifest, found, pending),
        size_of(folder),
    )


def _seconds_left(
    folder: Path, manifest: dict[str, Any], found: dict[str, str], pending: int
) -> float | None:
    """Seconds that the remaining runs take at the pace of the latest command."""
    left = pending + sum(state in (RUNNING, INTERRUPTED) for state in found.values())
    if not left or not manifest.get("sessions"):
        return None
    began = datetime.fromisoformat(manifest["sessions"][-1]["started"]).timestamp()
    ended = [
        moment
        for run_id, state in found.items()
        if state in (DONE, FAILED)
        and (moment := (folder / RESULTS / f"{run_id}{MARKS[state]}").stat().st_mtime) >= began
    ]
    return left * (max(ended) - began) / len(ended) if ended else None
