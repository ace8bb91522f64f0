"""Rotary embedding at explicit logical positions.

mlx-lm's attention modules call ``self.rope(x, offset=cache.offset)``. Here ``cache.offset`` is a
:class:`Positions`, and every rotary module of the model understands it. A model that does
arithmetic with the offset instead of handing it to its rotary module (learned positions, attention
temperature) meets an object without arithmetic and fails loudly rather than rotate wrongly.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import TempoError


class Positions:
    """Logical positions of the T new tokens of each of B rows.

    Args:
        values: integers [B, T], at least 0; shared positions are equal entries of a row.
    """

    __slots__ = ("_flat", "_offset", "shape", "values")

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape = values.shape
        B, T = values.shape
        starts = values[:, 0]
        self._flat: mx.array | None = None
        self._offset: int | mx.array | None = None
        if T == 1 or np.array_equal(values, starts[:, None] + np.arange(T)):
            # Consecutive positions are what the rotary kernels do natively: no reshaping.
            one_start = bool((starts == starts[0]).all())
            self._offset = int(starts[0]) if one_start else mx.array(starts.astype(np.int32))
        else:
            self._flat = mx.array(values.reshape(-1).astype(np.int32))  # [B * T]

    def rotate(self, rope: Callable[..., mx.array], x: mx.array) -> mx.array:
        """Rotate x [B, H, T, D] by ``rope(x, offset=...)``, each token at its own position."""
        B, H, T, D = x.shape
        if self.shape != (B, T):
            raise TempoError(f"rotary input is {x.shape}, positions are {self.shape} as [B, T]")
        if self._flat is None:
            return rope(x, offset=self._offset)
        return _rotate_each(rope, x, self._flat)


def _rotate_each(rope: Callable[..., mx.array], x: mx.array, offsets: mx.array) -> mx.array:
    """Rotate x [B, H, T, D] at offsets [B * T]."""
    B, H, T, D = x.shape
    # One batch row per token: the kernels take one offset per batch row.
    rows = x.transpose(0, 2, 1, 3).reshape(B * T, H, 1, D)
    return rope(rows, offset=offsets).reshape(B, T, H, D).transpose(0, 2, 1, 3)


@functools.cache
def _positioned(rope_class: Any) -> type:
    """The rotary class, accepting a :class:`Positions` as its offset."""

    class PositionedRope(rope_class):
        stands_for = rope_class

        def __call__(self, x, offset=0, **kwargs):
            rope = super().__call__
            if isinstance(offset, Positions):
                return offset.rotate(functools.partial(rope, **kwargs), x)
            if isinstance(offset, mx.array) and offset.ndim == 2:
                return _rotate_each(functools.partial(rope, **kwargs), x, offset.reshape(-1))
            return rope(x, offset=offset, **kwargs)

    PositionedRope.__name__ = f"Positioned{rope_class.__name__}"
    return PositionedRope


def is_rotary(module: nn.Module) -> bool:
    """Whether the module rotates: its call takes an input and an ``offset``."""
    name = type(module).__name__.lower()
    return ("rope" in name or "rotary" in name) and "offset" in inspect.signature(
        type(module).__call__
    ).parameters


def install(model: nn.Module) -> list[nn.Module]:
    """Make every rotary module of the model accept :class:`Positions`; returns those modules.

    The modules keep their identity and their behaviour for plain offsets, which have at most one
    dimension; installing twice changes nothing.
    """
    ropes = [m for _, m in model.named_modules() if is_rotary(m)]
    for rope in ropes:
        kind: Any = type(rope)
        if not kind.__name__.startswith("Positioned"):
            rope.__class__ = _positioned(kind)
    return ropes
