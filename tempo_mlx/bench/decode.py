"""Decoding speed and memory: mlx-lm, ours at threshold 1, and sets of fixed width."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from ..generation import stream_generate
from ..models import KVQuantization, PositionedModel
from ..text.vocabulary import without_end
from .result import Result, Row, Target, compared, finder, ratio, single
from .runs import (
    ANY,
    LONG_BLOCKS,
    NEARLY_ONE,
    SINGLE,
    STOCK,
    Run,
    long_run,
    sibling_name,
    timed,
)
from .setting import Subject, prompt_of, weight_bytes
from .timing import copy_bandwidth

#: Targets.
MIN_SPEED_RATIO = 0.97
MAX_MEMORY_RATIO = 1.05
MAX_STEP_RATIO = 1.45
TARGET_SIBLINGS = 8
#: Largest rise of our time per step over a long run, relative to mlx-lm's; the margin is noise.
MAX_RISE_RATIO = 1.05

QUANTIZED = "quantised keys and values"
GROUP, MACHINE, LONG = "decoding", "memory bandwidth", "a step as the cache grows"


def bench_decode(
    subject: Subject,
    prompt_tokens: int,
    max_tokens: int,
    siblings: Sequence[int],
    long_steps: int = 0,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> Result:
    """Measure mlx-lm, ours at threshold 1 and ours with sets of fixed width, in alternation.

    No run ends early: both sides treat end tokens as ordinary tokens.

    Args:
        subject: the model.
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: steps of a run, at least 4.
        siblings: widths of the sets, each at least 1.
        long_steps: also decode this many steps at threshold 1 and with mlx-lm; 0 for none.
        kv_bits: also decode at threshold 1 and with mlx-lm, keys and values quantised to so many
            bits from the beginning; None for not.
        kv_group_size: numbers that share a scale.

    Raises:
        TempoError: if the runs do not fit into the model's context, or its keys cannot be
            quantised.
    """
    model, visibility = subject.model, subject.visibility_of_sets
    subject.require_room(prompt_tokens, max(max_tokens, long_steps))
    prompt, endless = prompt_of(subject.tokenizer, prompt_tokens), without_end(subject.tokenizer)

    quantized: dict[str, Any] = {
        "kv_bits": kv_bits,
        "kv_group_size": kv_group_size,
        "quantized_kv_start": 0,
    }

    def stock(steps: int, **options: Any) -> Iterator[list[int]]:
        for response in mlx_lm.stream_generate(
            model.model, endless, prompt, max_tokens=steps, **options
        ):
            yield [response.token]

    def ours(steps: int, threshold: float, width: int, **options: Any) -> Iterator[list[int]]:
        for response in stream_generate(
            model,
            endless,
            prompt,
            max_tokens=steps,
            # Drafts have a bench of their own.
            draft="none",
            threshold=threshold,
            max_parallel=width,
            visibility=visibility,
            paths=0,
            **options,
        ):
            yield [token.id for token in response.step.tokens]

    def forced(width: int) -> Run:
        if width == 1:
            return timed(ours(max_tokens, NEARLY_ONE, 2), 1)
        return timed(ours(max_tokens, ANY, width), width)

    variants: dict[str, Callable[[], Run]] = {
        STOCK: lambda: timed(stock(max_tokens), 1),
        SINGLE: lambda: timed(ours(max_tokens, 1.0, 1), 1),
        **{sibling_name(width): partial(forced, width) for width in siblings},
    }
    if kv_bits is not None:
        variants[in_bits(STOCK, kv_bits)] = lambda: timed(stock(max_tokens, **quantized), 1)
        variants[in_bits(SINGLE, kv_bits)] = lambda: timed(ours(max_tokens, 1.0, 1, **quantized), 1)
    subject.expect(len(variants), 2 * LONG_BLOCKS if long_steps else 0)
    runs = subject.alternate(variants)
    one = sibling_name(1) if 1 in siblings else SINGLE
    rows = _decoding(runs, one, prompt_tokens, weight_bytes(model.model))
    if kv_bits is not None:
        how = KVQuantization(kv_bits, kv_group_size)
        rows += _kept(model, how, [*prompt, *runs[STOCK][0].tokens[:, 0].tolist()], prompt_tokens)
    found = finder(rows)
    targets = [
        Target(
            "tokens/s at threshold 1 / mlx-lm's",
            ">=",
            MIN_SPEED_RATIO,
            1 / found(SINGLE, "step").ratios[STOCK].median,
        ),
        Target(
            "peak memory at threshold 1 / mlx-lm's",
            "<=",
            MAX_MEMORY_RATIO,
            found(SINGLE, "peak memory").median / found(STOCK, "peak memory").median,
        ),
    ]
    if TARGET_SIBLINGS in siblings:
        wide = found(sibling_name(TARGET_SIBLINGS), "step").ratios[one].median
        name = f"ms/step of {TARGET_SIBLINGS} siblings / of one"
        targets.append(Target(name, "<=", MAX_STEP_RATIO, wide))
    if long_steps:
        sides = {STOCK: stock(long_steps), SINGLE: ours(long_steps, 1.0, 1)}
        seconds = long_run(sides, long_steps, subject.progress.tick)
        rows += _blocks(seconds, long_steps // LONG_BLOCKS)
        targets.append(rise(seconds))
    setting = subject.describe(
        prompt_tokens=prompt_tokens, max_tokens=max_tokens, visibility=visibility
    )
    return Result("decode", subject.name, setting, rows, targets)


def _decoding(runs: dict[str, list[Run]], one: str, prompt_tokens: int, n_bytes: int) -> list[Row]:
    seconds = {name: [run.step_seconds for run in each] for name, each in runs.items()}
    widths = {name: each[0].tokens.shape[1] for name, each in runs.items()}
    copied = copy_bandwidth()
    steps = compared(GROUP, "step", "s", seconds, STOCK, one)
    speeds = {row.name: 1 / row.median for row in steps}
    tokens = {name: widths[name] * speed for name, speed in speeds.items()}
    reading = {name: n_bytes * speed for name, speed in speeds.items()}
    peaks = {name: float(max(run.peak_bytes for run in each)) for name, each in runs.items()}
    slots = {name: float(prompt_tokens + each[0].tokens.size) for name, each in runs.items()}
    return [
        *single(GROUP, "tokens/s", "", tokens),
        *single(GROUP, "steps/s", "", speeds),
        *steps,
        *single(GROUP, "weights read", "bytes/s", reading),
        *single(GROUP, "of copy", "%", {name: 100 * x / copied for name, x in reading.items()}),
        *single(GROUP, "peak memory", "bytes", peaks),
        *single(GROUP, "slots", "", slots),
        *single(MACHINE, "size", "bytes", {"weights": float(n_bytes)}),
        *single(MACHINE, "speed", "bytes/s", {"copying an array": copied}),
    ]


def in_bits(name: str, kv_bits: int) -> str:
    """A variant with quantised keys and values."""
    return f"{name}, {kv_bits}-bit keys"


def _kept(
    model: PositionedModel, how: KVQuantization, text: list[int], prompt_tokens: int
) -> list[Row]:
    """What quantised keys and values save of a slot, and how much log-probabilities differ.

    Args:
        how: they are quantised.
        text: ids of a prompt and what mlx-lm said to it; both sides read it, the prompt but its
            last token in one pass and then a token in each.
    """
    quantising = model.quantizing(how)
    caches = [side.make_cache() for side in (model, quantising)]
    differences = []
    chunks = [text[: prompt_tokens - 1], *([id] for id in text[prompt_tokens - 1 : -1])]
    for ids in filter(None, chunks):
        found = []
        for side, cache in zip((model, quantising), caches, strict=True):
            positions = np.arange(cache.n_slots, cache.n_slots + len(ids))[None]
            logits = side(mx.array(ids)[None], positions, "causal", cache)[0, -1]
            logits = logits.astype(mx.float32)
            mx.eval(logits, cache.state)
            row = np.array(logits, np.float64)
            found.append(row - np.logaddexp.reduce(row))
        if len(ids) == 1:
            after = text[cache.n_slots]
            differences.append(abs(found[0][after] - found[1][after]))
    name = f"{how.bits}-bit keys"
    return [
        *single(
            QUANTIZED,
            "bytes of a slot",
            "bytes",
            {"full": float(model.slot_bytes), name: float(quantising.slot_bytes)},
        ),
        *single(QUANTIZED, "mean difference", "nats", {name: float(np.mean(differences))}),
        *single(QUANTIZED, "largest difference", "nats", {name: float(max(differences))}),
    ]


def _blocks(seconds: dict[str, list[float]], block: int) -> list[Row]:
    """Times of a long run, with both sides in one row for each block."""
    rows = []
    for i, (stock, ours) in enumerate(zip(seconds[STOCK], seconds[SINGLE], strict=True)):
        name = f"steps {i * block + 1}-{(i + 1) * block}"
        rows.append(Row(LONG, name, STOCK, "s", [stock]))
        rows.append(Row(LONG, name, SINGLE, "s", [ours], {STOCK: ratio([ours], [stock])}))
    return rows


def rise(seconds: dict[str, list[float]]) -> Target:
    """Slow-down of our steps from the first to the last block, relative to mlx-lm's."""
    stock, ours = seconds[STOCK], seconds[SINGLE]
    name = "rise of ms/step over a long run / mlx-lm's"
    return Target(name, "<=", MAX_RISE_RATIO, (ours[-1] / ours[0]) / (stock[-1] / stock[0]))
