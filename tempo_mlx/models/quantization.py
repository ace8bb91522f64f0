"""Quantised keys and values: how, and from when."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KVQuantization:
    """How keys and values are quantised: head vector by head vector, as by ``mx.quantize``.

    Args:
        bits: of each number.
        group_size: numbers of a head vector that share a scale and a bias.
        start: after the pass that reads position start - 1, what is held is quantised, and what
            comes later as it is appended; the pass itself still sees full precision. As mlx-lm's
            ``quantized_kv_start``.
    """

    bits: int
    group_size: int = 64
    start: int = 0
