"""Many prompts in one batch, beside mlx-lm's batches and beside one prompt after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator

from ..arguments import check_count
from ..decode.sequences import Batch, SequenceState
from ..errors import TempoError
from ..generation import Failure, stream_batch_generate, stream_generate
from ..lattice.lattice import Lattice
from ..models import PositionedModel
from ..settings import Settings
from ..text.vocabulary import without_end
from .setting import MOST_TOKENS, MOST_WIDTH, describe, prompt_of, require_room, visibility_of_sets
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

STOCK, SINGLE, SETS = "mlx-lm", "threshold 1", "threshold 0.1"
ONE_BY_ONE = {SINGLE: "threshold 1, one by one", SETS: "threshold 0.1, one by one"}

MIN_SPEED_RATIO = 0.97
#: Times the throughput of one prompt after another that a batch should have.
MIN_SPEEDUP = {8: 5.0, 16: 7.0}
MAX_WASTE = 0.25


@dataclass(frozen=True)
class Taken:
    """One run of a batch: all of it, its median step, and the tokens of its sets."""

    seconds: float
    step_seconds: float
    tokens: int


@dataclass(frozen=True)
class Throughput:
    """One variant at one batch size.

    Args:
        name: of the variant.
        batch_size: prompts.
        step_seconds: median time of a run's forward passes, spread over the rounds.
        seconds: of a whole run, prompts included.
        tokens: of all sets of a run.
        step_to_stock: time of a step over that of mlx-lm.
        speedup: steps per second of the batch, of all its prompts, over those of one prompt after
            another; None where that was not run.
        whole_speedup: the same of whole runs, the reading of the prompts included.
    """

    name: str
    batch_size: int
    step_seconds: Spread
    seconds: Spread
    tokens: int
    step_to_stock: Spread
    speedup: Spread | None
    whole_speedup: Spread | None

    @property
    def steps_per_second(self) -> float:
        """Logical steps of all prompts in a second of decoding."""
        return self.batch_size / self.step_seconds.median


@dataclass(frozen=True)
class Copies:
    """Starting n rows from one prompt.

    Args:
        rows, prompt_tokens: n, and the tokens of the prompt.
        read_seconds: of reading it n times in one batch.
        replicate_seconds: of reading it once and replicating it, first tokens appended.
        bytes_before, bytes_after: memory in use by the copies before and after the first tokens.
    """

    rows: int
    prompt_tokens: int
    read_seconds: Spread
    replicate_seconds: Spread
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_batch` found."""

    model: str
    setting: dict[str, Any]
    throughput: list[Throughput]
    copies: Copies
    largest_waste: float

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        targets = []
        for each in self.throughput:
            if each.name == SINGLE:
                name = f"steps/s of {each.batch_size} prompts at threshold 1 / mlx-lm's"
                found = 1 / each.step_to_stock.median
                targets.append(Target(name, ">=", MIN_SPEED_RATIO, found))
            if each.speedup is not None:
                name = f"steps/s of {each.batch_size} prompts at {each.name} / one by one"
                wanted = MIN_SPEEDUP[each.batch_size]
                targets.append(Target(name, ">=", wanted, each.speedup.median))
        targets.append(Target("largest share of slots unused", "<=", MAX_WASTE, self.largest_waste))
        return targets

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds."""
        return {
            "schema": SCHEMA,
            "bench": "batch",
            "model": self.model,
            **self.setting,
            "throughput": [
                {**asdict(each), "steps_per_second": each.steps_per_second}
                for each in self.throughput
            ],
            "replicate": asdict(self.copies),
            "largest_waste": self.largest_waste,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_batch(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 64,
    max_tokens: int = 24,
    rounds: int = 3,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure batches of prompts whose lengths differ by half, by turns.

    Nothing ends a prompt early: end tokens count as ordinary ones on both sides.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns them.
        prompt_tokens: of the prompts in the mean, at least 4.
        max_tokens: steps, at least 4.
        rounds: runs of each variant, at least 1; one more warms up.
        batch_sizes: each at least 1.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    check_count("prompt_tokens", prompt_tokens, 4, MOST_TOKENS)
    check_count("max_tokens", max_tokens, 4, MOST_TOKENS)
    for size in batch_sizes:
        check_count("batch_sizes", size, most=MOST_WIDTH)
    positioned = PositionedModel.of(model)
    # The longest prompt of a batch.
    require_room(positioned, -(-5 * prompt_tokens // 4), max_tokens)
    endless = without_end(tokenizer)
    visibility = visibility_of_sets(positioned)
    settings = {
        SINGLE: Settings(threshold=1.0, max_tokens=max_tokens, visibility=visibility),
        SETS: Settings(threshold=0.1, max_tokens=max_tokens, visibility=visibility),
    }
    throughput = []
    for size in batch_sizes:
        prompts = prompts_of(tokenizer, size, prompt_tokens)
        variants: dict[str, Callable[[], Taken]] = {
            STOCK: partial(_stock, positioned.model, prompts, max_tokens),
        }
        for name, each in settings.items():
            variants[name] = partial(_ours, positioned, endless, prompts, each)
            if size in MIN_SPEEDUP:
                one = partial(_one_by_one, positioned, endless, prompts, each)
                variants[ONE_BY_ONE[name]] = one
        tick = partial(_tell, progress, size) if progress else None
        runs = alternate(variants, rounds, tick)
        for name in (STOCK, SINGLE, SETS):
            alone = runs.get(ONE_BY_ONE.get(name, ""))
            seconds = [run.seconds for run in runs[name]]
            steps = [run.step_seconds for run in runs[name]]
            throughput.append(
                Throughput(
                    name,
                    size,
                    Spread.of(steps),
                    Spread.of(seconds),
                    runs[name][0].tokens,
                    ratio(steps, [run.step_seconds for run in runs[STOCK]]),
                    ratio([size * run.step_seconds for run in alone], steps) if alone else None,
                    ratio([run.seconds for run in alone], seconds) if alone else None,
                )
            )
    return Report(
        model=model_name or positioned.name or "",
        setting={
            **describe(positioned, prompt_tokens, max_tokens, rounds),
            "visibility": visibility,
        },
        throughput=throughput,
        copies=_copies(positioned, prompt_of(tokenizer, 4 * prompt_tokens), 8, rounds),
        largest_waste=_largest_waste(positioned, tokenizer, prompt_tokens, max_tokens),
    )


def _tell(progress: Callable[[str], None], size: int, name: str) -> None:
    progress(f"{size} x {name}")


def prompts_of(tokenizer: Any, n: int, mean: int) -> list[list[int]]:
    """n different prompts, of 3/4 to 5/4 of the mean length."""
    lengths = np.linspace(0.75 * mean, 1.25 * mean, n).round().astype(int) if n > 1 else [mean]
    text = prompt_of(tokenizer, 2 * mean + n)
    return [text[i : i + int(length)] for i, length in enumerate(lengths)]


def _stock(model: nn.Module, prompts: list[list[int]], max_tokens: int) -> Taken:
    start = time.perf_counter()
    generator = BatchGenerator(
        model, stop_tokens=[], completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
    )
    generator.insert(prompts, [max_tokens] * len(prompts))
    times, tokens = [], 0
    while responses := generator.next_generated():
        tokens += len(responses)
        times.append(time.perf_counter())
    generator.close()
    return _taken(start, times, tokens)


def _ours(
    model: PositionedModel, tokenizer: Any, prompts: list[list[int]], settings: Settings
) -> Taken:
    start = time.perf_counter()
    times: list[float] = []
    outcomes = stream_batch_generate(
        model,
        tokenizer,
        prompts,
        settings,
        batch_size=len(prompts),
        paths=0,
        progress=lambda status: times.append(time.perf_counter()),
    )
    tokens = 0
    for _, result in outcomes:
        if isinstance(result, Failure):
            raise TempoError(result.error)
        tokens += result.lattice.n_tokens
    return _taken(start, times, tokens)


def _one_by_one(
    model: PositionedModel, tokenizer: Any, prompts: list[list[int]], settings: Settings
) -> Taken:
    start = time.perf_counter()
    each = []
    for prompt in prompts:
        begun, times, tokens = time.perf_counter(), [], 0
        for response in stream_generate(model, tokenizer, prompt, settings=settings, paths=0):
            times.append(time.perf_counter())
            tokens += len(response.step.tokens)
        each.append(_taken(begun, times, tokens))
    return Taken(
        time.perf_counter() - start,
        float(np.median([taken.step_seconds for taken in each])),
        sum(taken.tokens for taken in each),
    )


def _taken(start: float, times: list[float], tokens: int) -> Taken:
    # The first step grows buffers; the last one computes nothing, its set was known before.
    return Taken(times[-1] - start, float(np.median(np.diff(times)[1:-1])), tokens)


def _copies(model: PositionedModel, prompt: list[int], rows: int, rounds: int) -> Copies:
    def read(n: int) -> Batch:
        batch = Batch(model, [SequenceState(Lattice(prompt)) for _ in range(n)])
        mx.eval(batch.prefill(2048), batch.cache.state)
        return batch

    memory: list[tuple[int, int]] = []

    def replicate() -> float:
        start = time.perf_counter()
        cache = read(1).cache
        active = mx.get_active_memory()
        cache.replicate(rows)
        mx.eval(cache.state)
        before = mx.get_active_memory() - active
        tokens = mx.array([[prompt[0]]] * rows)
        logits = model(tokens, np.full((rows, 1), len(prompt)), "causal", cache)
        mx.eval(logits, cache.state)
        memory.append((before, mx.get_active_memory() - active - logits.nbytes))
        return time.perf_counter() - start

    def again() -> float:
        start = time.perf_counter()
        cache = read(rows).cache
        tokens = mx.array([[prompt[0]]] * rows)
        logits = model(tokens, np.full((rows, 1), len(prompt)), "causal", cache)
        mx.eval(logits, cache.state)
        return time.perf_counter() - start

    taken = alternate({"read": again, "replicate": replicate}, rounds)
    before, after = memory[-1]
    return Copies(
        rows,
        len(prompt),
        Spread.of(taken["read"]),
        Spread.of(taken["replicate"]),
        before,
        after,
    )


def _largest_waste(
    model: PositionedModel, tokenizer: Any, prompt_tokens: int, max_tokens: int
) -> float:
    """Of 24 prompts of very different lengths, 8 at a time, joining and leaving."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 2 * prompt_tokens, 24)
    prompts = [prompt_of(tokenizer, int(length)) for length in lengths]
    settings = [
        Settings(threshold=0.1, max_tokens=int(n), visibility=visibility_of_sets(model))
        for n in rng.integers(2, max_tokens + 1, 24)
    ]
    waste = []
    for _ in stream_batch_generate(
        model,
        tokenizer,
        prompts,
        settings,
        batch_size=8,
        paths=0,
        progress=lambda status: waste.append(status.largest_waste),
    ):
        pass
    return max(waste)
