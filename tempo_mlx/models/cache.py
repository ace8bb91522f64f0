"""The key-value cache: slots, one sequence state for all layers and batch rows."""

import weakref
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .attention import AttentionRecorder
from .positions import Positions

#: Slots by which the buffers grow.
BLOCK = 256


class LayerCache:
    """One layer's keys and values, behind the protocol that mlx-lm's attention modules speak.

    Args:
        owner: the cache whose positions and mask hold for the running forward pass.
        window: sliding window of the layer in logical positions; None where it sees everything.
    """

    def __init__(self, owner: "BatchedKVCache", window: int | None):
        # Weak, so that a cache that goes out of use frees its memory at once.
        self._owner = weakref.ref(owner)
        self.window = window
        self.keys: mx.array | None = None  # [B, H_kv, capacity, D]
        self.values: mx.array | None = None  # [B, H_kv, capacity, D_v]
        self.n_slots = 0

    @property
    def owner(self) -> "BatchedKVCache":
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def offset(self) -> "Positions | mx.array | int":
        """Positions of the new tokens: what the model hands to its rotary modules."""
        return self.owner.offset

    @property
    def attention_recorder(self) -> AttentionRecorder | None:
        return self.owner.recorder

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        windows = [w for w in (self.window, window_size) if w is not None]
        return self.owner.mask_within(min(windows) if windows else None, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, H_kv, T, D] and values; returns those of all slots."""
        start, end = self.n_slots, self.n_slots + keys.shape[2]
        self.keys = _room(self.keys, keys, start, end)
        self.values = _room(self.values, values, start, end)
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self.n_slots = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all slots, [B, H_kv, S, D]."""
        assert self.keys is not None and self.values is not None
        return self.keys[..., : self.n_slots, :], self.values[..., : self.n_slots, :]

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]


def _room(buffer: mx.array | None, new: mx.array, used: int, needed: int) -> mx.array:
    """A buffer with room for ``needed`` slots, grown by whole blocks."""
    capacity = 0 if buffer is None else buffer.shape[2]
    if buffer is not None and needed <= capacity:
        return buffer
    B, H, _, D = new.shape
    extra = -(-(needed - used) // BLOCK) * BLOCK
    grown = mx.zeros((B, H, extra, D), new.dtype)
    return grown if buffer is None else mx.concatenate([buffer[..., :used, :], grown], axis=2)


class BatchedKVCache:
    """Slots of all layers for B batch rows.

    A slot is one entry of the cache: a token's key, rotated once at its logical position, and its
    value. Slots are appended and later, by :meth:`compact`, dropped; they are never rewritten.

    Args:
        batch_size: rows, at least 1.
        windows: for each layer its sliding window in logical positions, or None.
        as_offset: makes of positions [B, T] what the model hands to its rotary modules.
        grouped_scores: give masks an axis for the query heads of a group, [B, 1, 1, T, S].
    """

    def __init__(
        self,
        batch_size: int,
        windows: Sequence[int | None],
        as_offset: Callable[[np.ndarray], Positions | mx.array] = Positions,
        grouped_scores: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._as_offset = as_offset
        self._grouped_scores = grouped_scores
        self.layers = [LayerCache(self, window) for window in windows]
        self._table = np.zeros((batch_size, BLOCK), np.int32)
        self.n_slots = 0
        self.offset: Positions | mx.array | int = 0
        self.recorder: AttentionRecorder | None = None
        self._new: np.ndarray | None = None
        self._mask: mx.array | str | None = None
        self._windowed: dict[int, mx.array] = {}

    @property
    def slot_positions(self) -> np.ndarray:
        """Logical position of each slot, [B, S], in slot order."""
        return self._table[:, : self.n_slots]

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values occupy, room for slots to come included."""
        return sum(array.nbytes for layer in self.layers for array in layer.state)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with the logits, so that no graph outlives its step."""
        return [array for layer in self.layers for array in layer.state]

    def replicate(self, n: int) -> None:
        """Repeat every row n times, its copies side by side: rows 0, 0, 1, 1, ... for n = 2."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.select(np.repeat(np.arange(self.batch_size), n))

    def select(self, rows: Sequence[int] | np.ndarray) -> None:
        """Keep these rows, in this order; a row may be named more than once.

        Args:
            rows: indices in [0, B).
        """
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or rows.size == 0 or rows.min() < 0 or rows.max() >= self.batch_size:
            raise ValueError(f"rows must be indices in [0, {self.batch_size}), got {rows.tolist()}")
        chosen = mx.array(rows.astype(np.int32))
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
        self._table = self._table[rows]
        self.batch_size = rows.size

    def compact(self, keep: Sequence[int] | np.ndarray) -> None:
        """Keep these slots, in this order; positions do not change. One gather for each layer.

        Args:
            keep: slot indices in [0, S), [S'] for all rows alike or [B, S'] row by row.
        """
        keep = np.asarray(keep, np.int64)
        if keep.ndim not in (1, 2) or (keep.ndim == 2 and keep.shape[0] != self.batch_size):
            raise ValueError(f"keep must be [S'] or [{self.batch_size}, S'], got {keep.shape}")
        if keep.size and (keep.min() < 0 or keep.max() >= self.n_slots):
            raise ValueError(f"keep must be slots in [0, {self.n_slots}), got {keep.tolist()}")
        kept = keep.shape[-1]
        index = mx.array(keep.astype(np.int32))
        for layer in self.layers:
            for name in ("keys", "values"):
                buffer = getattr(layer, name)
                if buffer is None:
                    continue
                if keep.ndim == 1:
                    gathered = mx.take(buffer, index, axis=2)
                else:
                    gathered = mx.take_along_axis(buffer, index[:, None, :, None], axis=2)
                setattr(layer, name, gathered)
                # Evaluated layer by layer, so that one layer at a time exists twice.
                mx.eval(gathered)
            layer.n_slots = min(layer.n_slots, kept)
        chosen = np.broadcast_to(keep, (self.batch_size, kept))
        self._table = np.take_along_axis(self._table, chosen, axis=1)
        self.n_slots = kept

    def begin(
        self, positions: np.ndarray, mask: mx.array | str, recorder: AttentionRecorder | None
    ) -> None:
        """Open a forward pass over new tokens at positions [B, T], seeing what mask allows."""
        B, T = positions.shape
        S = self.n_slots
        if self.batch_size != B:
            raise ValueError(f"positions have {B} rows, the cache has {self.batch_size}")
        if isinstance(mask, str):
            if mask != "causal":
                raise ValueError(f'mask must be "causal" or an array, got {mask!r}')
        elif mask.ndim != 4 or mask.shape[-2:] != (T, S + T) or mask.shape[0] not in (1, B):
            raise ValueError(f"mask must be [{B}, 1, {T}, {S + T}], got {list(mask.shape)}")
        self.offset = self._as_offset(positions)
        self.recorder = recorder
        self._new = positions
        self._mask = mask
        self._windowed = {}

    def end(self) -> None:
        """Close the forward pass: the new tokens are slots now."""
        assert self._new is not None
        B, T = self._new.shape
        needed = self.n_slots + T
        if needed > self._table.shape[1]:
            grown = np.zeros((B, max(needed, 2 * self.n_slots)), np.int32)
            grown[:, : self.n_slots] = self.slot_positions
            self._table = grown
        self._table[:, self.n_slots : needed] = self._new
        self.n_slots = needed
        self._close()

    def abandon(self) -> None:
        """Close a forward pass that failed: forget what it appended."""
        for layer in self.layers:
            layer.n_slots = min(layer.n_slots, self.n_slots)
        self._close()

    def _close(self) -> None:
        self.offset = 0
        self.recorder = self._new = self._mask = None
        self._windowed = {}

    def mask_within(self, window: int | None, return_array: bool) -> mx.array | str | None:
        """This pass's mask, narrowed to keys less than ``window`` logical positions behind."""
        assert self._new is not None and self._mask is not None
        new = self._new
        T, S = new.shape[1], self.n_slots
        oldest = min(int(new.min()), int(self.slot_positions.min())) if S else int(new.min())
        if window is None or int(new.max()) - oldest < window:
            window = 0
        if isinstance(self._mask, str) and window == 0 and not return_array:
            # The kernels do plain causality without an array; one query sees everything.
            return None if T == 1 else self._mask
        if window not in self._windowed:
            narrowed = self._narrowed(self._mask, window)
            self._windowed[window] = narrowed[:, :, None] if self._grouped_scores else narrowed
        return self._windowed[window]

    def _narrowed(self, mask: mx.array | str, window: int) -> mx.array:
        assert self._new is not None
        B, T = self._new.shape
        S = self.n_slots
        if isinstance(mask, str):
            mask = (mx.arange(S, S + T)[:, None] >= mx.arange(S + T)[None])[None, None]
        if window == 0:
            return mask
        queries = mx.array(self._new)  # [B, T]
        keys = mx.array(np.concatenate([self.slot_positions, self._new], axis=1))  # [B, S + T]
        near = (queries[:, None, :, None] - keys[:, None, None, :]) < window
        if mask.dtype == mx.bool_:
            return mask & near
        return mx.where(near, mask, mx.array(mx.finfo(mask.dtype).min, mask.dtype))
