"""Suites of many short runs: in one batch, one by one, in processes, or one command for each."""

import gc
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from ..errors import TempoError
from ..experiments.running import Group, Outcome, run_batched, run_one_by_one
from ..experiments.session import Options, Session
from ..experiments.suite import RunConfig, Suite
from ..experiments.suite_files import read_suite
from ..experiments.suite_keys import Grid
from ..experiments.validation import compare, tolerance
from ..experiments.workers import run_in_workers
from ..weights.fingerprint import identify
from .result import Result, Target, compared, single
from .setting import Subject

RELOADING, SEQUENTIAL, WORKERS = "a command for each run", "one by one", "workers"
BATCHED, PLAIN, STORED = "batched", "batched, nothing captured", "batched, stored"

MIN_OVER_SEQUENTIAL, MIN_OVER_RELOADING, MAX_CAPTURE = 8.0, 30.0, 1.15

TIME, DIFFERING, LARGEST = "time of a run", "runs that differ", "largest difference"

#: Runs measured with one command for each; all cost the same.
RELOADED = 10

#: The built-in suite. Its tokens are drawn here, so every seed of every prompt is a separate run.
SUITE = "parallel-attention"


@dataclass(frozen=True)
class Taken:
    """One measurement of a variant: seconds for each run, and the outcomes."""

    seconds: float
    outcomes: dict[int, Outcome]


def bench_experiments(
    subject: Subject, runs: int, max_tokens: int, batch_size: int, workers: int
) -> Result:
    """Measure the same runs in every way of running a suite, in alternation.

    The prompts, conditions and seeds are those of the built-in suite, with tokens drawn. Times
    include captures. They exclude loading the model, except when each worker loads it, or each run
    loads it in a separate command, as in a shell loop.

    Args:
        subject: the model.
        runs: even, in [2, 100].
        max_tokens: steps of each run, at least 2.
        batch_size: rows of the batch, at least 2.
        workers: processes, at least 1.

    Raises:
        TempoError: for an odd number of runs.
        UnsupportedModelError: if the model cannot see sets as isolated.
    """
    if runs % 2 or not 2 <= runs <= 100:
        raise TempoError(f"runs must be an even number in [2, 100], got {runs}")
    model, tokenizer = subject.model, subject.tokenizer
    model.require_merging("isolated")
    suite = drawn_suite(subject.name, max_tokens)
    groups: list[Sequence[Any]] = [*islice(suite.expand().groups, runs // 2)]
    plain = [[replace(run, captures="none") for run in group] for group in groups]
    identity = identify(model.model, tokenizer)

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
            session = Session(suite, Path(folder), model, tokenizer, options)
            session.plan = replace(session.plan, runs=[run for group in groups for run in group])
            session.run()
        return {}

    def batched(these: Sequence[Group]) -> dict[int, Outcome]:
        return dict(run_batched(model, tokenizer, these, batch_size))

    variants: dict[str, Callable[[], Taken]] = {
        RELOADING: lambda: timed(reloading, min(runs, RELOADED)),
        SEQUENTIAL: lambda: timed(lambda: dict(run_one_by_one(model, tokenizer, groups))),
        WORKERS: lambda: timed(
            lambda: dict(
                run_in_workers(subject.name, identity, groups, workers, lambda number: None)
            )
        ),
        BATCHED: lambda: timed(lambda: batched(groups)),
        PLAIN: lambda: timed(lambda: batched(plain)),
        STORED: lambda: timed(stored),
    }
    subject.expect(len(variants))
    taken = subject.alternate(variants)
    allowed = tolerance(model)
    seconds = {name: [each.seconds for each in goes] for name, goes in taken.items()}
    alone = taken[SEQUENTIAL][-1].outcomes
    differing, largest = {}, {}
    for name, goes in taken.items():
        count, most = _differences(goes[-1].outcomes, alone, allowed)
        differing[name], largest[name] = float(count), most
    group = f"{runs} runs, {batch_size} rows, {workers} workers"
    rows = [
        *compared(group, TIME, "s", seconds, BATCHED, PLAIN),
        *single(group, DIFFERING, "", differing),
        *single(group, LARGEST, "", largest),
    ]
    over = {row.name: row.ratios for row in rows if row.measure == TIME}
    targets = [
        Target(f"time of {name} / of the batch", ">=", least, over[name][BATCHED].median)
        for name, least in {
            SEQUENTIAL: MIN_OVER_SEQUENTIAL,
            RELOADING: MIN_OVER_RELOADING,
        }.items()
    ]
    targets += [
        Target("time with captures / without", "<=", MAX_CAPTURE, over[BATCHED][PLAIN].median),
        Target("runs that are not the same as one by one", "<=", 0, sum(differing.values())),
    ]
    setting = subject.describe(
        max_tokens=max_tokens,
        runs=runs,
        batch_size=batch_size,
        workers=workers,
        tolerance=allowed,
    )
    return Result("experiments", subject.name, setting, rows, targets)


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
    """Run a suite with a separate command."""
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
    """Number of runs that differ too much from those one by one, and the largest difference."""
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
