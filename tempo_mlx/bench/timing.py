"""Paired measurement: variants take turns, so that what slows the machine slows all of them."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")

#: Size of the array whose copy gives the memory bandwidth: larger than any cache of a processor.
COPIED_BYTES = 1 << 28


def alternate(
    variants: Mapping[str, Callable[[], T]],
    rounds: int,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[T]]:
    """Run every variant once in each round, every other round in reverse order.

    A first round warms up (memory, compiled kernels) and is not kept.

    Args:
        variants: name -> a run that returns its measurement.
        rounds: kept rounds, at least 1.
        tick: called with the name of each variant before it runs.

    Returns:
        for each variant its measurements, in the order of the rounds: entries of the same index
        were taken next to each other.
    """
    taken: dict[str, list[T]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in sorted(variants, key=list(variants).index, reverse=turn % 2 == 1):
            tick(name)
            measurement = variants[name]()
            if turn > 0:
                taken[name].append(measurement)
    return taken


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
