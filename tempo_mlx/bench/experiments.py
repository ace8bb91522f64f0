"""Suites of many short runs: in one batch, one by one, in processes, by a command for each."""

import gc
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import yaml

from ..arguments import check_count
from ..errors import TempoError
from ..experiments.running import Group, Outcome, run_batched, run_one_by_one
from ..experiments.session import MOST_WORKERS, Options, Session
from ..experiments.suite import RunConfig, Suite
from ..experiments.suite_files import read_suite
from ..experiments.suite_keys import Grid
from ..experiments.validation import compare, tolerance
from ..experiments.workers import run_in_workers
from ..models import PositionedModel
from ..weights.fingerprint import identify
from .setting import MOST_TOKENS, MOST_WIDTH, describe
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

RELOADING, SEQUENTIAL, WORKERS = "a command for each run", "one by one", "workers"
BATCHED, PLAIN, STORED = "batched", "batched, nothing captured", "batched, stored"

MIN_OVER_SEQUENTIAL, MIN_OVER_RELOADING, MAX_CAPTURE = 8.0, 30.0, 1.15

#: Runs that are measured by a command for each; all cost the same.
RELOADED = 10

#: The built-in suite, with tokens drawn, so that every seed of every prompt is a run of its own.
SUITE = "parallel-attention"


@dataclass(frozen=True)
class Taken:
    """One go of a variant: seconds for a run, and what came out."""

    seconds: float
    outcomes: dict[int, Outcome]


@dataclass(frozen=True)
class Measured:
    """One variant.

    Args:
        name: of the variant.
        seconds: for a run.
        over_batched: the same over that of the batch, go by go.
        differing: runs that are not the same as one by one.
        largest_difference: of a probability, an attention or an entropy from those one by one.
    """

    name: str
    seconds: Spread
    over_batched: Spread
    differing: int
    largest_difference: float


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_experiments` found."""

    model: str
    runs: int
    batch_size: int
    workers: int
    tolerance: float
    setting: dict[str, Any]
    measured: list[Measured]
    capture_cost: Spread

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        over = {each.name: each.over_batched.median for each in self.measured}
        differing = sum(each.differing for each in self.measured)
        return [
            Target(
                f"time of {SEQUENTIAL} / of the batch", ">=", MIN_OVER_SEQUENTIAL, over[SEQUENTIAL]
            ),
            Target(
                f"time of {RELOADING} / of the batch", ">=", MIN_OVER_RELOADING, over[RELOADING]
            ),
            Target("time with captures / without", "<=", MAX_CAPTURE, self.capture_cost.median),
            Target("runs that are not the same as one by one", "<=", 0, differing),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds."""
        return {
            "schema": SCHEMA,
            "bench": "experiments",
            "model": self.model,
            "runs": self.runs,
            "batch_size": self.batch_size,
            "workers": self.workers,
            "tolerance": self.tolerance,
            **self.setting,
            "measured": [asdict(each) for each in self.measured],
            "capture_cost": asdict(self.capture_cost),
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_experiments(
    model: nn.Module,
    tokenizer: Any,
    *,
    runs: int = 100,
    max_tokens: int = 10,
    batch_size: int = 64,
    workers: int = 2,
    rounds: int = 1,
    model_name: str,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure the same runs in every way to run a suite, by turns.

    The prompts, conditions and seeds are those of the built-in suite, with tokens drawn. Times are
    of the runs with what is captured of them, not of reading the model before, except where it is
    loaded by each worker, or for each run by a command of its own, as a loop in a shell would.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` returns them.
        runs: even, in [2, 100].
        max_tokens: steps of each run, at least 2.
        batch_size: rows of the batch, at least 2.
        workers: processes, at least 1.
        rounds: goes of each variant, at least 1; one more warms up.
        model_name: by which :func:`tempo_mlx.load` finds the model again.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    if runs % 2 or not 2 <= runs <= 100:
        raise TempoError(f"runs must be an even number in [2, 100], got {runs}")
    check_count("max_tokens", max_tokens, 2, MOST_TOKENS)
    check_count("batch_size", batch_size, 2, MOST_WIDTH)
    check_count("workers", workers, most=MOST_WORKERS)
    positioned = PositionedModel.of(model)
    positioned.require_merging("isolated")
    suite = drawn_suite(model_name, max_tokens)
    groups: list[Sequence[Any]] = [*islice(suite.expand().groups, runs // 2)]
    plain = [[replace(run, captures="none") for run in group] for group in groups]
    identity = identify(positioned.model, tokenizer)

    def timed(run: Callable[[], Any], n: int = runs) -> Taken:
        gc.collect()
        mx.clear_cache()
        start = time.perf_counter()
        outcomes = run()
        return Taken((time.perf_counter() - start) / n, outcomes)

    def reloading() -> dict[int, Outcome]:
        with tempfile.TemporaryDirectory() as folder:
            for number, config in enumerate(config for group in groups for config in group):
                if number < RELOADED:
                    _in_a_shell(_alone(suite, config), Path(folder) / str(number))
        return {}

    def stored() -> dict[int, Outcome]:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(batch_size=batch_size)
            session = Session(suite, Path(folder), positioned, tokenizer, options)
            session.plan = replace(session.plan, runs=[run for group in groups for run in group])
            session.run()
        return {}

    def batched(these: Sequence[Group]) -> dict[int, Outcome]:
        return dict(run_batched(positioned, tokenizer, these, batch_size))

    variants: dict[str, Callable[[], Taken]] = {
        RELOADING: lambda: timed(reloading, min(runs, RELOADED)),
        SEQUENTIAL: lambda: timed(lambda: dict(run_one_by_one(positioned, tokenizer, groups))),
        WORKERS: lambda: timed(
            lambda: dict(run_in_workers(model_name, identity, groups, workers, lambda number: None))
        ),
        BATCHED: lambda: timed(lambda: batched(groups)),
        PLAIN: lambda: timed(lambda: batched(plain)),
        STORED: lambda: timed(stored),
    }
    taken = alternate(variants, rounds, progress)
    seconds = {name: [each.seconds for each in goes] for name, goes in taken.items()}
    allowed = tolerance(positioned)
    alone = taken[SEQUENTIAL][-1].outcomes
    measured = []
    for name, goes in taken.items():
        differing, largest = _differences(goes[-1].outcomes, alone, allowed)
        measured.append(
            Measured(
                name,
                Spread.of(seconds[name]),
                ratio(seconds[name], seconds[BATCHED]),
                differing,
                largest,
            )
        )
    return Report(
        model=model_name,
        runs=runs,
        batch_size=batch_size,
        workers=workers,
        tolerance=allowed,
        setting=describe(positioned, None, max_tokens, rounds),
        measured=measured,
        capture_cost=ratio(seconds[BATCHED], seconds[PLAIN]),
    )


def drawn_suite(model: str, max_tokens: int) -> Suite:
    """The built-in suite for a model, with tokens drawn by the suite's seeds."""
    data = read_suite(SUITE).to_dict()
    data["settings"] |= {"max_tokens": max_tokens, "sampling": "gumbel"}
    return Suite.model_validate(data | {"model": model})


def _alone(suite: Suite, run: RunConfig) -> Suite:
    """A suite of one run."""
    return suite.model_copy(
        update={
            "prompts": {run.category: [run.prompt]},
            "seeds": [run.settings.seed],
            "grid": Grid.model_validate({"visibility": [run.settings.visibility]}),
        }
    )


def _in_a_shell(suite: Suite, folder: Path) -> None:
    """Run a suite by a command of its own."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(suite.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "tempo_mlx", "experiment", "run"]
    done = subprocess.run(
        [*command, str(file), "--output", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise TempoError(f"{shlex.join(done.args)} failed: {done.stderr.strip()}")


def _differences(
    found: dict[int, Outcome], alone: dict[int, Outcome], allowed: float
) -> tuple[int, float]:
    """Runs that differ from those one by one by more than is allowed, and by how much at most."""
    differing, largest = 0, [0.0]
    for number, outcome in found.items():
        for run, other in zip(outcome.runs, alone[number].runs, strict=True):
            if isinstance(run, str) or isinstance(other, str):
                differing += run != other
                continue
            if not run.arrays:
                other = replace(other, arrays={})
            why, differences = compare(run, other, allowed)
            differing += why is not None
            largest += differences.values()
    return differing, float(np.max(largest))
