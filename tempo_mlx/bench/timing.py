"""Paired measurement: variants alternate, so disturbances of the machine affect all of them."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")

#: Size of the array that is copied to measure memory bandwidth, larger than any processor cache.
COPIED_BYTES = 1 << 28


def alternate(
    variants: Mapping[str, Callable[[], T]],
    rounds: int,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[T]]:
    """Run every variant once in each round, with the order reversed in every other round.

    A first round warms up memory and compiled kernels and is discarded.

    Args:
        variants: name -> a function that runs the variant and returns its measurement.
        rounds: measured rounds, at least 1.
        tick: called with the name of each variant before it runs.

    Returns:
        for each variant, its measurements in the order of the rounds. Entries with the same index
        are paired.
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
    """Bytes per second that the device reads and writes when it copies a large array."""
    size = n_bytes // 4
    source = mx.zeros(size, mx.float32)
    # Written into existing memory, because a new array would measure page faults. The target is
    # one element longer, because mlx would replace an array of equal size instead of writing it.
    target = mx.zeros(size + 1, mx.float32)
    mx.eval(source, target)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target[:size] = source
        mx.eval(target)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
