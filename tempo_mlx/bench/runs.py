"""Generation, timed step by step."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..errors import TempoError

#: Variants of several benches.
STOCK, SINGLE = "mlx-lm", "threshold 1"

#: A threshold below every positive fp32 number, so sets are as wide as `max_parallel` allows.
ANY = 1e-45
#: A threshold for sets of one that takes the general path. Threshold 1 has a shortcut: the loop
#: starts the next pass before the host has seen the token.
NEARLY_ONE = 1 - 1e-9

#: Steps at the start of a run that are not timed, because buffers grow and caches warm up.
WARM_UP = 2

#: Blocks of a long run.
LONG_BLOCKS = 10


@dataclass(frozen=True, eq=False)
class Run:
    """One generation of one variant.

    Args:
        step_seconds: median time of its steps, in seconds.
        peak_bytes: mlx's peak memory, including weights.
        tokens: generated ids, [steps, N].
    """

    step_seconds: float
    peak_bytes: int
    tokens: np.ndarray


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
        raise TempoError(f"a step has not the {width} tokens that were asked for")
    return Run(float(np.median(np.diff(stamps)[WARM_UP:])), mx.get_peak_memory(), np.array(sets))


def long_run(
    sides: dict[str, Iterator[list[int]]],
    steps: int,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Decode ``steps`` steps on each side, alternating after each block.

    Args:
        sides: name -> generation.
        steps: of each side, at least two for each of the :data:`LONG_BLOCKS` blocks.
        tick: called with the name of a side before each of its blocks.

    Returns:
        for each side, the median seconds per step of each block.
    """
    block = steps // LONG_BLOCKS
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(LONG_BLOCKS):
        for name in sorted(sides, key=list(sides).index, reverse=turn % 2 == 1):
            tick(name)
            stamps = [time.perf_counter()] if turn else []
            for _ in range(block):
                next(sides[name])
                stamps.append(time.perf_counter())
            seconds[name].append(float(np.median(np.diff(stamps))))
            # Passes started ahead must not run in the other side's time.
            mx.synchronize(generation_stream)
    return seconds


def sibling_name(n: int) -> str:
    return f"{n} sibling{'s' if n > 1 else ''}"
