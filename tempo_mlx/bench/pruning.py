"""The cost of pruning and the savings of compaction."""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..decode.result import GenerationResult
from ..generation import steps as steps_of
from ..lattice.lattice import Lattice
from ..models import PositionedModel
from ..rules.pruning import Pruning
from ..rules.schedules import Constant
from ..settings import Settings
from ..text.vocabulary import Vocabulary, without_end
from .result import Result, Row, Target, compared, finder
from .runs import ANY, WARM_UP
from .setting import Subject, prompt_of

OFF = "no pruning"
POSTERIOR = "posterior"
LAST_LAYERS = "attention, last 4 layers"
ALL_LAYERS = "attention, all layers"

MAX_PRUNING_RATIO = 1.15
MAX_CAPTURE_RATIO = 1.35
#: Target for the peak memory of a compaction, relative to the cache before it.
MAX_COMPACTION_PEAK = 1.3

HALVED = "half of the tokens pruned"


def bench_pruning(
    subject: Subject, prompt_tokens: int, siblings: int, max_tokens: int, steps: Sequence[int]
) -> Result:
    """Measure the cost of each kind of evidence, and runs with and without compaction.

    Args:
        subject: the model.
        prompt_tokens: length of the prompt, at least 1.
        siblings: tokens in each set, at least 2.
        max_tokens: steps of the timed runs, at least 4.
        steps: lengths of the runs with and without compaction, each at least 4.

    Raises:
        TempoError: if the runs do not fit into the model's context.
        UnsupportedModelError: if the model cannot see sets as isolated.
    """
    model = subject.model
    subject.require_room(prompt_tokens, max(max_tokens, *steps))
    model.require_merging("isolated")
    vocabulary = Vocabulary(without_end(subject.tokenizer))
    prompt = prompt_of(subject.tokenizer, prompt_tokens)

    def result_of(n: int, pruning: Pruning | None) -> GenerationResult:
        settings = Settings(
            max_tokens=n,
            draft="none",
            threshold=ANY,
            max_parallel=siblings,
            pruning=pruning,
            seed=0,
            visibility="isolated",
        )
        return GenerationResult(model, vocabulary, subject.name, "", Lattice(prompt), settings)

    # With threshold 0 every set is judged but nothing is pruned, so all lattices are the same.
    watching: dict[str, Any] = {"threshold": 0.0, "schedule": Constant()}
    prunings: dict[str, Pruning | None] = {
        OFF: None,
        POSTERIOR: Pruning(rule="posterior", **watching),
        LAST_LAYERS: Pruning(rule="attention", layers=4, **watching),
        ALL_LAYERS: Pruning(rule="attention", **watching),
    }

    def timed(pruning: Pruning | None) -> float:
        stamps = []
        for _ in steps_of(result_of(max_tokens, pruning)):
            stamps.append(time.perf_counter())
        return float(np.median(np.diff(stamps)[WARM_UP:]))

    subject.expect(len(prunings), 2 * len(steps))
    seconds = subject.alternate({name: partial(timed, each) for name, each in prunings.items()})
    costs = compared(f"sets of {siblings}", "step", "s", seconds, OFF)
    savings: list[Row] = []
    for n in steps:
        for compacted in (False, True):
            subject.progress.tick(f"{n} steps")
            savings += _halved(result_of, n, compacted)
    peak = compaction_peak(model)
    found = finder(costs)
    most = {
        POSTERIOR: MAX_PRUNING_RATIO,
        LAST_LAYERS: MAX_PRUNING_RATIO,
        ALL_LAYERS: MAX_CAPTURE_RATIO,
    }
    targets = [
        Target(f"ms/step, {name} / {OFF}", "<=", wanted, found(name, "step").ratios[OFF].median)
        for name, wanted in most.items()
    ]
    targets.append(Target("memory while compacting / cache", "<=", MAX_COMPACTION_PEAK, peak))
    compacting = Row(HALVED, "while compacting", "memory over cache", "", [peak])
    setting = subject.describe(
        prompt_tokens=prompt_tokens, max_tokens=max_tokens, siblings=siblings
    )
    return Result("pruning", subject.name, setting, [*costs, *savings, compacting], targets)


def _halved(
    result_of: Callable[[int, Pruning], GenerationResult], steps: int, compacted: bool
) -> list[Row]:
    """A run that loses half of its tokens at random, with or without compaction."""
    pruning = Pruning(
        rule="random",
        decision="quota",
        keep_rate=0.5,
        lookback=1,
        compact_above=0.25 if compacted else 1.0,
    )
    result = result_of(steps, pruning)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    slots = cache_bytes = 0
    for response in steps_of(result):
        slots, cache_bytes = response.slots_held, response.cache_bytes
    name = f"{steps} steps, {'compacted' if compacted else 'not compacted'}"
    measured: list[tuple[str, str, float]] = [
        ("step", "s", result.stats.generation_seconds / steps),
        ("slots held", "", slots),
        ("cache", "bytes", cache_bytes),
        ("peak beside weights", "bytes", mx.get_peak_memory() - before),
    ]
    return [Row(HALVED, name, measure, unit, [value]) for measure, unit, value in measured]


def compaction_peak(model: PositionedModel, slots: int = 2048) -> float:
    """Peak memory while a cache drops a quarter of its slots, relative to the cache's bytes."""
    cache = model.make_cache()
    model(mx.zeros((1, slots), mx.int32), np.arange(slots)[None], "causal", cache)
    mx.eval(cache.state)
    gc.collect()
    mx.clear_cache()
    held = cache.nbytes
    others = mx.get_active_memory() - held
    mx.reset_peak_memory()
    cache.compact(np.flatnonzero(np.arange(slots) % 4))
    mx.eval(cache.state)
    return (mx.get_peak_memory() - others) / held
