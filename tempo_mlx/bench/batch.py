"""Many prompts in one batch, compared with mlx-lm's batches and with one prompt at a time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator

from ..decode.sequences import Batch, SequenceState
from ..errors import TempoError
from ..generation import Failure, stream_batch_generate, stream_generate
from ..lattice.lattice import Lattice
from ..models import PositionedModel
from ..settings import Settings
from ..text.vocabulary import without_end
from .result import Result, Row, Spread, Target, compared, ratio
from .runs import SINGLE, STOCK
from .setting import Subject, prompt_of
from .timing import alternate

SETS = "threshold 0.1"
ONE_BY_ONE = {SINGLE: "threshold 1, one by one", SETS: "threshold 0.1, one by one"}

MIN_SPEED_RATIO = 0.97
#: Target for the throughput of a batch, relative to one prompt at a time.
MIN_SPEEDUP = {8: 5.0, 16: 7.0}
MAX_WASTE = 0.25

GROUP, STEP, WHOLE, TOKENS = "prompts x variant", "step", "whole run", "tokens"
STEP_SPEEDUP, WHOLE_SPEEDUP = "steps/s over one by one", "whole run over one by one"
READ, REPLICATED = "read", "replicated"
BEFORE, AFTER = "held before the first tokens", "held after them"
WASTE = "slots unused"


@dataclass(frozen=True)
class Taken:
    """One run of a batch: its time, its median step time, and the tokens in its sets."""

    seconds: float
    step_seconds: float
    tokens: int


def bench_batch(
    subject: Subject, prompt_tokens: int, max_tokens: int, batch_sizes: Sequence[int]
) -> Result:
    """Measure batches of prompts of 3/4 to 5/4 of the mean length, in alternation.

    No prompt ends early: both sides treat end tokens as ordinary tokens.

    Args:
        subject: the model.
        prompt_tokens: mean tokens of a prompt, at least 4.
        max_tokens: steps, at least 4.
        batch_sizes: each at least 1.

    Raises:
        TempoError: if the runs do not fit into the model's context.
    """
    # The longest prompt of a batch.
    subject.require_room(-(-5 * prompt_tokens // 4), max_tokens)
    visibility = subject.visibility_of_sets
    settings = {
        SINGLE: Settings(threshold=1.0, max_tokens=max_tokens, visibility=visibility, draft="none"),
        SETS: Settings(threshold=0.1, max_tokens=max_tokens, visibility=visibility, draft="none"),
    }
    batches = {size: _variants(subject, size, prompt_tokens, settings) for size in batch_sizes}
    subject.expect(sum(map(len, batches.values())), 1)
    rows, targets = [], []
    for size, variants in batches.items():
        runs = subject.alternate(variants, f"{size} x ")
        rows += _throughput(size, runs)
        targets += _targets(size, runs)
    subject.progress.tick("copies")
    rows += _copies(subject, prompt_of(subject.tokenizer, 4 * prompt_tokens), 8)
    waste = _largest_waste(subject, prompt_tokens, max_tokens)
    rows.append(Row(WASTE, "24 prompts, 8 at a time", "largest share", "", [waste]))
    targets.append(Target("largest share of slots unused", "<=", MAX_WASTE, waste))
    setting = subject.describe(
        prompt_tokens=prompt_tokens, max_tokens=max_tokens, visibility=visibility
    )
    return Result("batch", subject.name, setting, rows, targets)


def _variants(
    subject: Subject, size: int, prompt_tokens: int, settings: dict[str, Settings]
) -> dict[str, Callable[[], Taken]]:
    """mlx-lm's batch and ours, and for some sizes ours with one prompt at a time."""
    prompts = prompts_of(subject.tokenizer, size, prompt_tokens)
    model, endless = subject.model, without_end(subject.tokenizer)
    max_tokens = settings[SINGLE].max_tokens
    variants: dict[str, Callable[[], Taken]] = {
        STOCK: partial(_stock, model.model, prompts, max_tokens)
    }
    for name, each in settings.items():
        variants[name] = partial(_ours, model, endless, prompts, each)
        if size in MIN_SPEEDUP:
            variants[ONE_BY_ONE[name]] = partial(_one_by_one, model, endless, prompts, each)
    return variants


def _throughput(size: int, runs: dict[str, list[Taken]]) -> list[Row]:
    """Rows for each kind of batch of this size: times, speeds, and speed-ups over one by one."""
    rows = []
    for name in (STOCK, SINGLE, SETS):
        line = f"{size} x {name}"
        steps, whole = _seconds(runs[name])
        stock, _ = _seconds(runs[STOCK])
        over_stock = {STOCK: ratio(steps, stock)}
        rows.append(Row(GROUP, line, STEP, "s", steps, over_stock))
        rows.append(Row(GROUP, line, "steps/s", "", [size / rows[-1].median]))
        rows.append(Row(GROUP, line, WHOLE, "s", whole))
        tokens = runs[name][0].tokens
        rows.append(Row(GROUP, line, TOKENS, "", [float(tokens)]))
        rows.append(Row(GROUP, line, "tokens/s, whole run", "", [tokens / rows[-2].median]))
        for measure, speedup in _speedups(size, name, runs).items():
            rows.append(Row(GROUP, line, measure, "", speedup))
    return rows


def _speedups(size: int, name: str, runs: dict[str, list[Taken]]) -> dict[str, list[float]]:
    """Speed-ups of a batch over its prompts one by one; empty if those were not run."""
    alone = runs.get(ONE_BY_ONE.get(name, ""))
    if alone is None:
        return {}
    steps, whole = _seconds(runs[name])
    one_step, one_whole = _seconds(alone)
    return {
        STEP_SPEEDUP: [size * a / b for a, b in zip(one_step, steps, strict=True)],
        WHOLE_SPEEDUP: [a / b for a, b in zip(one_whole, whole, strict=True)],
    }


def _seconds(runs: Sequence[Taken]) -> tuple[list[float], list[float]]:
    """Seconds of a step and of a whole run, in each round."""
    return [run.step_seconds for run in runs], [run.seconds for run in runs]


def _targets(size: int, runs: dict[str, list[Taken]]) -> list[Target]:
    steps = {name: _seconds(taken)[0] for name, taken in runs.items()}
    speed = ratio(steps[STOCK], steps[SINGLE]).median
    name = f"steps/s of {size} prompts at threshold 1 / mlx-lm's"
    targets = [Target(name, ">=", MIN_SPEED_RATIO, speed)]
    for each in (SINGLE, SETS):
        if found := _speedups(size, each, runs):
            name = f"steps/s of {size} prompts at {each} / one by one"
            speedup = Spread.of(found[STEP_SPEEDUP]).median
            targets.append(Target(name, ">=", MIN_SPEEDUP[size], speedup))
    return targets


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
    # Without the first step, which grows buffers, and the last, which needs no forward pass.
    return Taken(times[-1] - start, float(np.median(np.diff(times)[1:-1])), tokens)


def _copies(subject: Subject, prompt: list[int], rows: int) -> list[Row]:
    """Rows of one prompt and their first tokens: read separately, or once and replicated."""
    model = subject.model

    def read(n: int) -> Any:
        batch = Batch(model, [SequenceState(Lattice(prompt)) for _ in range(n)])
        mx.eval(batch.prefill(2048), batch.cache.state)
        return batch.cache

    def continued(cache: Any) -> mx.array:
        tokens = mx.array([[prompt[0]]] * rows)
        logits = model(tokens, np.full((rows, 1), len(prompt)), "causal", cache)
        mx.eval(logits, cache.state)
        return logits

    memory: list[tuple[int, int]] = []

    def replicated() -> float:
        start = time.perf_counter()
        cache = read(1)
        active = mx.get_active_memory()
        cache.replicate(rows)
        mx.eval(cache.state)
        before = mx.get_active_memory() - active
        logits = continued(cache)
        memory.append((before, mx.get_active_memory() - active - logits.nbytes))
        return time.perf_counter() - start

    def reread() -> float:
        start = time.perf_counter()
        continued(read(rows))
        return time.perf_counter() - start

    group = f"{rows} rows of one prompt of {len(prompt)} tokens"
    # Not subject.alternate, because the progress counts this part as one.
    seconds = alternate({READ: reread, REPLICATED: replicated}, subject.rounds)
    before, after = memory[-1]
    return [
        *compared(group, "time", "s", seconds, READ),
        Row(group, REPLICATED, BEFORE, "bytes", [float(before)]),
        Row(group, REPLICATED, AFTER, "bytes", [float(after)]),
    ]


def _largest_waste(subject: Subject, prompt_tokens: int, max_tokens: int) -> float:
    """Largest share of unused slots for 24 prompts of very different lengths, 8 at a time."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 2 * prompt_tokens, 24)
    prompts = [prompt_of(subject.tokenizer, int(length)) for length in lengths]
    settings = [
        Settings(
            threshold=0.1,
            max_tokens=int(n),
            visibility=subject.visibility_of_sets,
            draft="none",
        )
        for n in rng.integers(2, max_tokens + 1, 24)
    ]
    waste = []
    for _ in stream_batch_generate(
        subject.model,
        subject.tokenizer,
        prompts,
        settings,
        batch_size=8,
        paths=0,
        progress=lambda status: waste.append(status.largest_waste),
    ):
        pass
    return max(waste)
