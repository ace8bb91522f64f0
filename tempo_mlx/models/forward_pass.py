"""One forward pass: where its tokens go in the cache, and what they see."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .attention import AttentionRecorder
from .layout import Layout


class ForwardPass:
    """What the layers' caches need to know of the running forward pass.

    Args:
        offset: what the model hands to its rotary modules.
        positions: logical positions of the new tokens by rows, [B, T].
        keys: logical positions of all slots, the new ones included, [B, S].
        mask: "causal" or an array broadcast to [B, 1, T, S].
        start: the slot at which all rows append; None where it differs.
        layout: where tokens come packed or padded, how they lie in the rows.
        slots: the slot of each of the N tokens, [N], where ``start`` is None.
        packed: whether the model sees the tokens as [1, N].
        recorder: takes note of attention.
        grouped_scores: give masks an axis for the query heads of a group.
    """

    def __init__(
        self,
        offset: Any,
        positions: np.ndarray,
        keys: np.ndarray,
        mask: mx.array | str,
        start: int | None,
        layout: Layout | None = None,
        slots: np.ndarray | None = None,
        packed: bool = False,
        recorder: AttentionRecorder | None = None,
        grouped_scores: bool = False,
    ):
        self.offset = offset
        self.recorder = recorder
        self.start = start
        self.end = keys.shape[1]
        #: how the model's [1, N] tokens lie in rows; None where it sees rows itself
        self.packing = layout if packed else None
        self._layout = layout
        self._positions, self._keys, self._mask = positions, keys, mask
        self._grouped_scores = grouped_scores
        self._masks: dict[int, mx.array] = {}
        self._rows = self._slots = mx.zeros(0)
        if layout is not None and slots is not None:
            self._rows = mx.array(layout.rows.astype(np.int32))
            self._slots = mx.array(slots.astype(np.int32))

    def write(self, buffer: mx.array, new: mx.array) -> None:
        """Put the new tokens' keys or values into a layer's buffer [B, H, capacity, D]."""
        if self.start is not None:
            buffer[..., self.start : self.end, :] = new
            return
        buffer[self._rows, :, self._slots] = self.side_by_side(new)[0].transpose(1, 0, 2)

    def side_by_side(self, new: mx.array) -> mx.array:
        """Keys or values as the model made them, [1, H, N, D] of all tokens."""
        if self.packing is not None:
            return new
        assert self._layout is not None
        return self._layout.pack(new)

    def mask_within(self, window: int | None, return_array: bool) -> mx.array | str | None:
        """The mask, narrowed to keys less than ``window`` logical positions behind."""
        new, keys = self._positions, self._keys
        if window is None or int(new.max()) - int(keys.min()) < window:
            window = 0
        if isinstance(self._mask, str) and window == 0 and not return_array:
            # The kernels do plain causality without an array; one query sees everything.
            return None if new.shape[1] == 1 else self._mask
        if window not in self._masks:
            narrowed = self._narrowed(window)
            self._masks[window] = narrowed[:, :, None] if self._grouped_scores else narrowed
        return self._masks[window]

    def _narrowed(self, window: int) -> mx.array:
        mask = self._mask
        T, S = self._positions.shape[1], self._keys.shape[1]
        if isinstance(mask, str):
            mask = (mx.arange(S - T, S)[:, None] >= mx.arange(S)[None])[None, None]
        if window == 0:
            return mask
        queries, keys = mx.array(self._positions), mx.array(self._keys)
        near = (queries[:, None, :, None] - keys[:, None, None, :]) < window
        if mask.dtype == mx.bool_:
            return mask & near
        return mx.where(near, mask, mx.array(mx.finfo(mask.dtype).min, mask.dtype))


#: Makes of positions [B, T] what a model hands to its rotary modules.
AsOffset = Callable[[np.ndarray], Any]
