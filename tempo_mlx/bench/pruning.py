"""What pruning costs and what compaction saves."""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arguments import check_count
from ..decode.result import GenerationResult
from ..generation import steps as steps_of
from ..lattice.lattice import Lattice
from ..models import PositionedModel
from ..rules.pruning import Pruning
from ..rules.schedules import Constant
from ..settings import Settings
from ..text.vocabulary import Vocabulary, without_end
from .runs import ANY, WARM_UP
from .setting import MOST_TOKENS, MOST_WIDTH, describe, prompt_of, require_room
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

OFF = "no pruning"
POSTERIOR = "posterior"
LAST_LAYERS = "attention, last 4 layers"
ALL_LAYERS = "attention, all layers"

MAX_PRUNING_RATIO = 1.15
MAX_CAPTURE_RATIO = 1.35
#: What a compaction may hold at its worst, over the cache before it.
MAX_COMPACTION_PEAK = 1.3


@dataclass(frozen=True)
class Cost:
    """Time of a step with one kind of pruning, the sets being the same for all.

    Args:
        name: of the variant.
        step_seconds: median time of a run's steps, spread over the rounds.
        over_off: the same over that of no pruning, round by round.
    """

    name: str
    step_seconds: Spread
    over_off: Spread


@dataclass(frozen=True)
class Saving:
    """A run in which half of the tokens fall, with or without compaction.

    Args:
        steps: of the run.
        compacted: whether dead slots were dropped.
        step_seconds: mean time of a step.
        slots: in the cache at the end.
        cache_bytes: keys and values at the end.
        peak_bytes: the most memory that mlx held beside the weights.
    """

    steps: int
    compacted: bool
    step_seconds: float
    slots: int
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_pruning` found."""

    model: str
    setting: dict[str, Any]
    costs: list[Cost]
    savings: list[Saving]
    compaction_peak: float

    @property
    def targets(self) -> list[Target]:
        found = {cost.name: cost.over_off.median for cost in self.costs}
        rows = [
            Target(f"ms/step, {name} / {OFF}", "<=", MAX_PRUNING_RATIO, found[name])
            for name in (POSTERIOR, LAST_LAYERS)
        ]
        return [
            *rows,
            Target(f"ms/step, {ALL_LAYERS} / {OFF}", "<=", MAX_CAPTURE_RATIO, found[ALL_LAYERS]),
            Target(
                "memory while compacting / cache", "<=", MAX_COMPACTION_PEAK, self.compaction_peak
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds."""
        return {
            "schema": SCHEMA,
            "bench": "pruning",
            "model": self.model,
            **self.setting,
            "costs": [asdict(cost) for cost in self.costs],
            "savings": [asdict(saving) for saving in self.savings],
            "compaction_peak": self.compaction_peak,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_pruning(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 64,
    siblings: int = 4,
    max_tokens: int = 24,
    rounds: int = 7,
    steps: tuple[int, ...] = (256,),
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure the cost of each kind of evidence, and runs with and without compaction.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` returns them.
        prompt_tokens: length of the prompt, at least 1.
        siblings: tokens of each set, at least 2.
        max_tokens: steps of the runs that are timed, at least 4.
        rounds: runs of each variant, at least 1.
        steps: lengths of the runs with and without compaction, each at least 4.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range, or runs that the model's context cannot hold.
    """
    positioned = PositionedModel.of(model)
    check_count("siblings", siblings, 2, MOST_WIDTH)
    check_count("max_tokens", max_tokens, WARM_UP + 2, MOST_TOKENS)
    for n in steps:
        check_count("steps", n, WARM_UP + 2, MOST_TOKENS)
    require_room(positioned, prompt_tokens, max(max_tokens, *steps))
    positioned.require_merging("isolated")
    vocabulary = Vocabulary(without_end(tokenizer))
    prompt = prompt_of(tokenizer, prompt_tokens)

    def result_of(n: int, pruning: Pruning | None) -> GenerationResult:
        settings = Settings(
            max_tokens=n,
            threshold=ANY,
            max_parallel=siblings,
            pruning=pruning,
            seed=0,
            visibility="isolated",
        )
        return GenerationResult(positioned, vocabulary, model_name, "", Lattice(prompt), settings)

    # A threshold of 0 judges every set and prunes nothing, so that all variants make one lattice.
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

    seconds = alternate(
        {name: partial(timed, pruning) for name, pruning in prunings.items()},
        rounds,
        progress,
    )
    costs = [
        Cost(name, Spread.of(seconds[name]), ratio(seconds[name], seconds[OFF]))
        for name in prunings
    ]
    savings = []
    for n in steps:
        for compacted in (False, True):
            if progress is not None:
                progress(f"{n} steps")
            savings.append(_halved(result_of, n, compacted))
    return Report(
        model=model_name or positioned.name or "",
        setting=describe(positioned, prompt_tokens, max_tokens, rounds) | {"siblings": siblings},
        costs=costs,
        savings=savings,
        compaction_peak=compaction_peak(positioned),
    )


def _halved(
    result_of: Callable[[int, Pruning], GenerationResult], steps: int, compacted: bool
) -> Saving:
    """A run that loses half of its tokens at random."""
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
    return Saving(
        steps,
        compacted,
        result.stats.generation_seconds / steps,
        slots,
        cache_bytes,
        mx.get_peak_memory() - before,
    )


def compaction_peak(model: PositionedModel, slots: int = 2048) -> float:
    """Most memory held while a cache drops a quarter of its slots, over the cache's bytes."""
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
