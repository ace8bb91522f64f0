"""Paired measurement: variants take turns, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..arguments import check_count

#: Rounds that are measured at most.
MOST_ROUNDS = 10_000

T = TypeVar("T")

#: Size of the array whose copy gives the memory bandwidth: larger than any cache of a processor.
COPIED_BYTES = 1 << 28


@dataclass(frozen=True)
class Spread:
    """A repeated measurement: its median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    def scaled(self, factor: float) -> "Spread":
        """The same measurement in another unit; factor above 0."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def inverse(self) -> "Spread":
        """Of the reciprocals: seconds for one become how many in a second."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)


def alternate(
    variants: Mapping[str, Callable[[], T]],
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[T]]:
    """Run every variant once in each round, every other round in reverse order.

    A first round warms up (memory, compiled kernels) and is not kept.

    Args:
        variants: name -> a run that returns its measurement.
        rounds: kept rounds, at least 1.
        progress: called with the name of each variant before it runs.

    Returns:
        for each variant its measurements, in the order of the rounds: entries of the same index
        were taken next to each other.
    """
    check_count("rounds", rounds, most=MOST_ROUNDS)
    taken: dict[str, list[T]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in sorted(variants, key=list(variants).index, reverse=turn % 2 == 1):
            if progress is not None:
                progress(name)
            measurement = variants[name]()
            if turn > 0:
                taken[name].append(measurement)
    return taken


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios of measurements that were taken next to each other."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def difference(greater: Sequence[float], less: Sequence[float]) -> Spread:
    """Spread of the differences of measurements that were taken next to each other."""
    return Spread.of([a - b for a, b in zip(greater, less, strict=True)])


def copy_bandwidth(n_bytes: int = COPIED_BYTES, repeats: int = 5) -> float:
    """Bytes that the device reads and writes in a second when it copies a large array."""
    size = n_bytes // 4
    source = mx.zeros(size, mx.float32)
    # Into memory that is there already: a fresh result would measure page faults. It is one
    # longer than the source, because mlx would replace an array of equal size, not write it.
    target = mx.zeros(size + 1, mx.float32)
    mx.eval(source, target)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target[:size] = source
        mx.eval(target)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
