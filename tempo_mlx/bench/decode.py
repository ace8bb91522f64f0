"""Decoding speed and memory: mlx-lm, ours at threshold 1, and sets of a forced width."""

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream

from .. import blas
from ..generation import stream_generate
from ..models import PositionedModel
from .timing import Spread, alternate, copy_bandwidth, ratio

#: Version of the dictionary that :meth:`Report.to_dict` returns.
SCHEMA = 1

STOCK, SINGLE = "mlx-lm", "threshold 1"

#: Below every probability that fp32 can tell from 0: a set is as wide as `max_parallel` allows.
ANY = 1e-45
#: Only a certain token reaches it: sets of one, found as every other set is, where threshold 1
#: lets the loop start the next pass before the host has seen the token.
NEARLY_ONE = 1 - 1e-9

#: Steps at the start of a run whose times are dropped: buffers grow and caches warm up.
WARM_UP = 2

#: Blocks of a long run.
LONG_BLOCKS = 10

#: What the targets ask for.
MIN_SPEED_RATIO = 0.97
MAX_MEMORY_RATIO = 1.05
MAX_STEP_RATIO = 1.45
TARGET_SIBLINGS = 8
#: Our rise in time per step over a long run may exceed mlx-lm's by this factor, which is noise.
MAX_RISE_RATIO = 1.05

TEXT = (
    "The harbour was quiet when the boats came back. Nets lay along the wall, and the women who "
    "mended them talked about the weather, the price of fish, and a lighthouse that nobody had "
    "lit for years. A boy counted the gulls on the roof of the church and lost his place twice. "
)


@dataclass(frozen=True)
class Run:
    """One generation of one variant.

    Args:
        step_seconds: median time of its steps, in seconds.
        peak_bytes: the most memory that mlx held, weights included.
        tokens: ids [steps, N] that it appended.
    """

    step_seconds: float
    peak_bytes: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What all runs of one variant say.

    Args:
        name: of the variant.
        siblings: tokens of each step.
        step_seconds: time of a step; the median of a run's steps, spread over the rounds.
        weight_bandwidth: bytes of weights read in a second.
        peak_bytes: the most memory that mlx held in a run, weights included.
        slots: entries of the cache after the last step.
        time_to_stock: time of a step over that of mlx-lm, spread over the rounds.
        time_to_one: time of a step over that of one sibling; of threshold 1 if that was not run.
    """

    name: str
    siblings: int
    step_seconds: Spread
    weight_bandwidth: float
    peak_bytes: int
    slots: int
    time_to_stock: Spread
    time_to_one: Spread

    @property
    def steps_per_second(self) -> Spread:
        return self.step_seconds.inverse()

    @property
    def tokens_per_second(self) -> Spread:
        return self.steps_per_second.scaled(self.siblings)


@dataclass(frozen=True)
class Target:
    """A measurement beside what it should be.

    Args:
        name: what is measured.
        relation: ">=" or "<=".
        wanted, value: the bound, and what was found.
    """

    name: str
    relation: str
    wanted: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.relation == ">=" else self.value <= self.wanted


@dataclass(frozen=True)
class LongRun:
    """Time per step as the cache grows.

    Args:
        block: steps behind each entry.
        stock, ours: median seconds per step at threshold 1, block after block.
    """

    block: int
    stock: list[float]
    ours: list[float]

    @property
    def target(self) -> Target:
        """How much more our step slows from the first to the last block than mlx-lm's."""
        rise = (self.ours[-1] / self.ours[0]) / (self.stock[-1] / self.stock[0])
        return Target("rise of ms/step over a long run / mlx-lm's", "<=", MAX_RISE_RATIO, rise)


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_decode` found, with where it was found."""

    model: str
    setting: dict[str, Any]
    weight_bytes: int
    copy_bandwidth: float
    measured: list[Measured]
    long: LongRun | None = None

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be; those that were not taken are missing."""
        found = {m.name: m for m in self.measured}
        stock, single = found[STOCK], found[SINGLE]
        targets = [
            Target(
                "tokens/s at threshold 1 / mlx-lm's",
                ">=",
                MIN_SPEED_RATIO,
                1 / single.time_to_stock.median,
            ),
            Target(
                "peak memory at threshold 1 / mlx-lm's",
                "<=",
                MAX_MEMORY_RATIO,
                single.peak_bytes / stock.peak_bytes,
            ),
        ]
        wide = found.get(sibling_name(TARGET_SIBLINGS))
        if wide is not None:
            targets.append(
                Target(
                    f"ms/step of {TARGET_SIBLINGS} siblings / of one",
                    "<=",
                    MAX_STEP_RATIO,
                    wide.time_to_one.median,
                )
            )
        if self.long is not None:
            targets.append(self.long.target)
        return targets

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds, bandwidths in bytes/s."""
        return {
            "schema": SCHEMA,
            "bench": "decode",
            "model": self.model,
            **self.setting,
            "weight_bytes": self.weight_bytes,
            "copy_bandwidth": self.copy_bandwidth,
            "runs": [
                {
                    **asdict(m),
                    "steps_per_second": asdict(m.steps_per_second),
                    "tokens_per_second": asdict(m.tokens_per_second),
                }
                for m in self.measured
            ],
            "long": asdict(self.long) if self.long is not None else None,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def sibling_name(n: int) -> str:
    return f"{n} sibling{'s' if n > 1 else ''}"


def bench_decode(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 64,
    max_tokens: int = 24,
    rounds: int = 7,
    siblings: Sequence[int] = (1, 2, 4, 8, 16),
    long_steps: int = 0,
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure mlx-lm, ours at threshold 1 and ours with sets of a forced width, by turns.

    Nothing ends a run early: end tokens count as ordinary ones on both sides.

    Args:
        model: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns it.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: steps of a run, above 3.
        rounds: runs of each variant, at least 1; one more warms up.
        siblings: widths of the forced sets, each at least 1.
        long_steps: also decode this many steps at threshold 1 and by mlx-lm; 0 does not.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range, or runs that the model's context cannot hold.
    """
    positioned = PositionedModel.of(model)
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens must be at least 1, got {prompt_tokens}")
    if max_tokens < WARM_UP + 2:
        raise ValueError(f"max_tokens must be at least {WARM_UP + 2}, got {max_tokens}")
    if not siblings or min(siblings) < 1:
        raise ValueError(f"siblings must be at least 1, got {list(siblings)}")
    if long_steps and long_steps < 2 * LONG_BLOCKS:
        raise ValueError(f"long_steps must be 0 or at least {2 * LONG_BLOCKS}, got {long_steps}")
    needed = prompt_tokens + max(max_tokens, long_steps)
    if positioned.context_length is not None and needed > positioned.context_length:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {needed - prompt_tokens} steps exceed the model's "
            f"context of {positioned.context_length}"
        )
    prompt = prompt_of(tokenizer, prompt_tokens)
    endless = without_end(tokenizer)

    def stock(steps: int) -> Iterator[list[int]]:
        for response in mlx_lm.stream_generate(positioned.model, endless, prompt, max_tokens=steps):
            yield [response.token]

    def ours(steps: int, threshold: float, width: int) -> Iterator[list[int]]:
        for response in stream_generate(
            positioned, endless, prompt, max_tokens=steps, threshold=threshold, max_parallel=width
        ):
            yield [token.id for token in response.step.tokens]

    widths = {STOCK: 1, SINGLE: 1} | {sibling_name(n): n for n in siblings}

    def runner(name: str) -> Callable[[], Run]:
        width = widths[name]
        if name == STOCK:
            return lambda: timed(stock(max_tokens), 1)
        if name == SINGLE:
            return lambda: timed(ours(max_tokens, 1.0, 1), 1)
        if width == 1:
            return lambda: timed(ours(max_tokens, NEARLY_ONE, 2), 1)
        return lambda: timed(ours(max_tokens, ANY, width), width)

    runs = alternate({name: runner(name) for name in widths}, rounds, progress)
    seconds = {name: [run.step_seconds for run in runs[name]] for name in runs}
    one = sibling_name(1) if 1 in siblings else SINGLE
    n_bytes = weight_bytes(positioned.model)
    measured = [
        Measured(
            name=name,
            siblings=width,
            step_seconds=Spread.of(seconds[name]),
            weight_bandwidth=n_bytes / Spread.of(seconds[name]).median,
            peak_bytes=max(run.peak_bytes for run in runs[name]),
            slots=prompt_tokens + runs[name][0].tokens.size,
            time_to_stock=ratio(seconds[name], seconds[STOCK]),
            time_to_one=ratio(seconds[name], seconds[one]),
        )
        for name, width in widths.items()
    ]
    long = None
    if long_steps:
        sides = {STOCK: stock(long_steps), SINGLE: ours(long_steps, 1.0, 1)}
        long = long_run(sides, long_steps, progress)
    return Report(
        model=model_name or positioned.name or "",
        setting=describe(positioned, prompt_tokens, max_tokens, rounds),
        weight_bytes=n_bytes,
        copy_bandwidth=copy_bandwidth(),
        measured=measured,
        long=long,
    )


def timed(steps: Iterator[list[int]], width: int) -> Run:
    """Run a generation to its end.

    Raises:
        ValueError: if a step has another number of tokens than ``width``.
    """
    # Caches of earlier runs that wait for the garbage collector would count as this run's memory.
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    stamps, sets = [], []
    for ids in steps:
        stamps.append(time.perf_counter())
        sets.append(ids)
    mx.synchronize(generation_stream)
    if any(len(ids) != width for ids in sets):
        raise ValueError(f"a step has not the {width} tokens that were asked for")
    return Run(float(np.median(np.diff(stamps)[WARM_UP:])), mx.get_peak_memory(), np.array(sets))


def long_run(
    sides: dict[str, Iterator[list[int]]],
    steps: int,
    progress: Callable[[str], None] | None = None,
) -> LongRun:
    """Decode ``steps`` steps on both sides, taking turns block by block.

    Args:
        sides: the generations named :data:`STOCK` and :data:`SINGLE`.
        steps: of each, at least two for each of the :data:`LONG_BLOCKS` blocks.
        progress: called with the name of a side before each of its blocks.
    """
    block = steps // LONG_BLOCKS
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(LONG_BLOCKS):
        for name in sorted(sides, key=list(sides).index, reverse=turn % 2 == 1):
            if progress is not None:
                progress(name)
            stamps = [time.perf_counter()] if turn else []
            for _ in range(block):
                next(sides[name])
                stamps.append(time.perf_counter())
            seconds[name].append(float(np.median(np.diff(stamps))))
            # What was started ahead must not run in the other side's time.
            mx.synchronize(generation_stream)
    return LongRun(block, seconds[STOCK], seconds[SINGLE])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all of them, a tied embedding table once.

    Of an embedding table that is no output layer, a step reads a few rows, which do not count. Of
    a mixture of experts all experts count, though a step of few tokens does not read all.
    """
    total = _nbytes(model)
    modules = model.modules()
    outputs = {
        module.weight.shape[0]
        for module in modules
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    for module in modules:
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            untied = module.weight.shape[0] in outputs
            total -= untied * _nbytes(module)
    return total


def _nbytes(module: nn.Module) -> int:
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return sum(array.nbytes for _, array in parameters)


def prompt_of(tokenizer: Any, length: int) -> list[int]:
    """The first ``length`` token ids of a text that repeats."""
    ids = list(tokenizer.encode(TEXT))
    return (ids * -(-length // len(ids)))[:length]


def without_end(tokenizer: Any) -> Any:
    """The tokenizer, with no token that ends a text."""
    endless = copy.copy(tokenizer)
    endless.eos_token_ids = set()
    return endless


def describe(
    model: PositionedModel, prompt_tokens: int, max_tokens: int, rounds: int
) -> dict[str, Any]:
    """Where and how it was measured."""
    library = blas.info().library
    return {
        "architecture": model.architecture,
        "dtype": dtype_name(model),
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm")},
        "blas": str(library) if library is not None else "mlx's own",
    }


def dtype_name(model: PositionedModel) -> str:
    """dtype of the activations, and the bits of quantised weights: "float16, 4-bit"."""
    bits = {m.bits for m in model.model.modules() if isinstance(m, nn.QuantizedLinear)}
    name = str(model.dtype).removeprefix("mlx.core.")
    return f"{name}, {'/'.join(str(b) for b in sorted(bits))}-bit" if bits else name
