"""The key-value cache: slots, one sequence state for all layers and batch rows."""

import weakref
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..errors import TempoError
from .attention import AttentionRecorder
from .forward_pass import AsOffset, ForwardPass
from .layout import Layout
from .positions import Positions

#: Slots by which the buffers of a single row grow.
BLOCK = 256


class LayerCache:
    """One layer's keys and values, behind the protocol that mlx-lm's attention modules speak.

    Args:
        owner: the cache whose forward pass is running.
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
    def running(self) -> ForwardPass:
        running = self.owner.running
        assert running is not None, "a cache is used by a PositionedModel only"
        return running

    @property
    def offset(self) -> Positions | mx.array | int:
        """Positions of the new tokens: what the model hands to its rotary modules."""
        running = self.owner.running
        return 0 if running is None else running.offset

    @property
    def attention_recorder(self) -> AttentionRecorder | None:
        return self.running.recorder

    @property
    def packing(self) -> Layout | None:
        return self.running.packing

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        windows = [w for w in (self.window, window_size) if w is not None]
        return self.owner.mask_within(min(windows) if windows else None, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, H_kv, T, D] and values; returns those of all slots."""
        running, owner = self.running, self.owner
        if self.keys is None or self.values is None or running.end > self.keys.shape[2]:
            self.keys = owner.with_room(self.keys, keys, running.end)
            self.values = owner.with_room(self.values, values, running.end)
        running.write(self.keys, keys)
        running.write(self.values, values)
        self.n_slots = running.end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all slots, [B, H_kv, S, D]."""
        assert self.keys is not None and self.values is not None
        return self.keys[..., : self.n_slots, :], self.values[..., : self.n_slots, :]

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]


class BatchedKVCache:
    """Slots of all layers for B batch rows, each row with a number of slots of its own.

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
        as_offset: AsOffset = Positions,
        grouped_scores: bool = False,
    ):
        if batch_size < 1:
            raise TempoError(f"batch_size must be at least 1, got {batch_size}")
        self._as_offset = as_offset
        self._grouped_scores = grouped_scores
        self.layers = [LayerCache(self, window) for window in windows]
        self._table = np.zeros((batch_size, BLOCK), np.int32)
        #: slots of each row, [B]
        self.counts = np.zeros(batch_size, np.int64)
        #: slots that the buffers have room for
        self.capacity = 0
        #: slots that a row may have room for, where that is less than a whole block more
        self.capacity_limit: int | None = None
        self.running: ForwardPass | None = None

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.counts)

    @property
    def n_slots(self) -> int:
        """Slots of the longest row: the width S of the next mask before its new tokens."""
        return int(self.counts.max())

    @property
    def slot_positions(self) -> np.ndarray:
        """Logical position of each slot, [B, S], in slot order; 0 behind a row's last slot."""
        present = np.arange(self.n_slots) < self.counts[:, None]
        return np.where(present, self._table[:, : self.n_slots], 0)

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values occupy, room for slots to come included."""
        return sum(array.nbytes for layer in self.layers for array in layer.state)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with the logits, so that no graph outlives its step."""
        return [array for layer in self.layers for array in layer.state]

    def room(self, needed: int) -> int:
        """Slots that the buffers will have room for once ``needed`` are in the longest row.

        A single row grows by blocks of 256. Several rows grow by smaller blocks, and by an eighth
        at least, so that a growing batch is copied a bounded number of times.
        """
        if needed <= self.capacity:
            return self.capacity
        step = max(16, BLOCK // self.batch_size)
        grown = needed if self.batch_size == 1 else max(needed, self.capacity * 9 // 8)
        rounded = -(-grown // step) * step
        if self.capacity_limit is None:
            return rounded
        return max(needed, min(rounded, self.capacity_limit))

    def with_room(self, buffer: mx.array | None, new: mx.array, needed: int) -> mx.array:
        """A buffer [B, H, capacity, D] with room for ``needed`` slots of the new tokens' kind."""
        capacity = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and needed <= capacity:
            return buffer
        self.capacity = self.room(needed)
        _, H, _, D = new.shape
        used = min(capacity, self.n_slots)
        grown = mx.zeros((self.batch_size, H, self.capacity - used, D), new.dtype)
        return grown if buffer is None else mx.concatenate([buffer[..., :used, :], grown], axis=2)

    def replicate(self, n: int) -> None:
        """Repeat every row n times, its copies side by side: rows 0, 0, 1, 1, ... for n = 2.

        Nothing is copied before the first token is appended to one of them.
        """
        if n < 1:
            raise TempoError(f"n must be at least 1, got {n}")
        for layer in self.layers:
            layer.keys, layer.values = _repeated(layer.keys, n), _repeated(layer.values, n)
        self._table = np.repeat(self._table, n, axis=0)
        self.counts = np.repeat(self.counts, n)

    def select(self, rows: Sequence[int] | np.ndarray) -> None:
        """Keep these rows, in this order; a row may be named more than once.

        Args:
            rows: indices in [0, B).
        """
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or rows.size == 0 or rows.min() < 0 or rows.max() >= self.batch_size:
            raise TempoError(f"rows must be indices in [0, {self.batch_size}), got {rows.tolist()}")
        chosen = mx.array(rows.astype(np.int32))
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
        self._table = self._table[rows]
        self.counts = self.counts[rows]

    def compact(self, keep: np.ndarray | Sequence[int] | Sequence[np.ndarray]) -> None:
        """Keep these slots, in this order; positions do not change. One gather for each layer.

        Args:
            keep: slot indices in [0, S): [S'] for all rows alike, [B, S'] row by row, or one
                array for each row, of any lengths.
        """
        if len(keep) and not np.isscalar(keep[0]) and not isinstance(keep, np.ndarray):
            if len(keep) != self.batch_size:
                raise TempoError(f"keep must name {self.batch_size} rows, got {len(keep)}")
            each = [np.asarray(slots, np.int64) for slots in keep]
            counts = np.array([len(slots) for slots in each])
            index = np.zeros((self.batch_size, counts.max()), np.int64)
            for row, slots in enumerate(each):
                index[row, : len(slots)] = slots
        else:
            index = np.asarray(keep, np.int64)
            if index.ndim not in (1, 2) or (index.ndim == 2 and len(index) != self.batch_size):
                raise TempoError(f"keep must be [S'] or [{self.batch_size}, S'], got {index.shape}")
            counts = np.full(self.batch_size, index.shape[-1])
        if index.size and (index.min() < 0 or index.max() >= self.n_slots):
            raise TempoError(f"keep must be slots in [0, {self.n_slots}), got {index.tolist()}")

        device = mx.array(index.astype(np.int32))

        def gather(buffer: mx.array) -> mx.array:
            if index.ndim == 1:
                return mx.take(buffer, device, axis=2)
            return mx.take_along_axis(buffer, device[:, None, :, None], axis=2)

        table = np.take_along_axis(
            self._table, np.broadcast_to(index, (self.batch_size, index.shape[-1])), axis=1
        )
        self._replace(gather, table, counts)

    def rearrange(self, rows: np.ndarray, slots: np.ndarray, counts: np.ndarray) -> None:
        """Make new rows of the slots of any rows: slot s of row b comes from (rows, slots)[b, s].

        Args:
            rows, slots: [B', S'], sources; anything valid behind a row's last slot.
            counts: slots of each new row, [B'].
        """
        row_index, slot_index = mx.array(rows.astype(np.int32)), mx.array(slots.astype(np.int32))

        def gather(buffer: mx.array) -> mx.array:
            return mx.contiguous(buffer[row_index, :, slot_index].transpose(0, 2, 1, 3))

        self._replace(gather, self._table[rows, slots], np.asarray(counts, np.int64))

    def rearrange_row(self, row: int, slots: np.ndarray) -> None:
        """Keep these slots of one row, in this order, and no other row."""
        if self.batch_size > 1:
            self.select([row])
        self.compact(slots)

    def _replace(
        self, gather: Callable[[mx.array], mx.array], table: np.ndarray, counts: np.ndarray
    ) -> None:
        width = table.shape[1]
        for layer in self.layers:
            for name in ("keys", "values"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    gathered = gather(buffer)
                    del buffer
                    setattr(layer, name, gathered)
                    # Evaluated layer by layer, so that one layer at a time exists twice.
                    mx.eval(gathered)
            layer.n_slots = min(layer.n_slots, width)
        self._table, self.counts = table, counts
        self.capacity = min(self.capacity, width)

    def extract(self, row: int) -> "BatchedKVCache":
        """A cache of its own for one row, with that row's slots only."""
        if not 0 <= row < self.batch_size:
            raise TempoError(f"row must be in [0, {self.batch_size}), got {row}")
        count = int(self.counts[row])
        alone = self._empty(1)
        for layer, copy in zip(self.layers, alone.layers, strict=True):
            if layer.keys is not None and layer.values is not None:
                copy.keys = layer.keys[row : row + 1, :, :count]
                copy.values = layer.values[row : row + 1, :, :count]
                copy.n_slots = count
        alone._table = self._table[row : row + 1, :count].copy()
        alone.counts, alone.capacity = np.array([count]), count
        return alone

    @classmethod
    def merge(cls, caches: Sequence["BatchedKVCache"]) -> "BatchedKVCache":
        """One cache with the rows of all, in order; the caches of one model."""
        if not caches:
            raise TempoError("caches must name at least 1 cache")
        merged = caches[0]._empty(sum(cache.batch_size for cache in caches))
        width = max(cache.n_slots for cache in caches)
        for i, layer in enumerate(merged.layers):
            parts = [cache.layers[i] for cache in caches]
            for name in ("keys", "values"):
                filled = [(p, getattr(p, name)) for p in parts if getattr(p, name) is not None]
                if filled:
                    like = filled[0][1]
                    rows = [
                        _padded(getattr(part, name), like, cache.batch_size, width)
                        for part, cache in zip(parts, caches, strict=True)
                    ]
                    setattr(layer, name, mx.concatenate(rows, axis=0))
                    layer.n_slots = width
        merged._table = np.zeros((merged.batch_size, max(width, 1)), np.int32)
        merged.counts = np.concatenate([cache.counts for cache in caches])
        merged._table[:, :width] = np.concatenate(
            [np.pad(c.slot_positions, ((0, 0), (0, width - c.n_slots))) for c in caches]
        )
        merged.capacity = width
        return merged

    def adopt(self, other: "BatchedKVCache", source: int, row: int) -> np.ndarray:
        """Append the slots of a row of another cache to a row of this one; returns their slots."""
        count, start = int(other.counts[source]), int(self.counts[row])
        end = start + count
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            for name in ("keys", "values"):
                new = getattr(theirs, name)
                if new is not None:
                    buffer = self.with_room(getattr(layer, name), new, end)
                    buffer[row, :, start:end] = new[source, :, :count]
                    setattr(layer, name, buffer)
                    layer.n_slots = max(layer.n_slots, end)
        self._widen(end)
        self._table[row, start:end] = other._table[source, :count]
        self.counts[row] = end
        return np.arange(start, end)

    def fill(self, arrays: dict[str, mx.array], positions: np.ndarray) -> None:
        """Take the slots of an empty cache from arrays.

        Args:
            arrays: ``layers.<i>.keys`` and ``layers.<i>.values``, [B, H_kv, S, D] each.
            positions: of the slots, [B, S].

        Raises:
            ValueError: if their shapes do not fit.
        """
        B, S = positions.shape
        for i, layer in enumerate(self.layers):
            keys, values = (arrays.pop(f"layers.{i}.{name}", None) for name in ("keys", "values"))
            if keys is not None and values is not None:
                layer.keys, layer.values, layer.n_slots = keys, values, S
        for layer in self.layers:
            if any(a.ndim != 4 or (a.shape[0], a.shape[2]) != (B, S) for a in layer.state):
                raise TempoError(f"the arrays are not [{B}, H_kv, {S}, D]")
        if arrays:
            raise TempoError(f"the model has no {sorted(arrays)[0]}")
        self._table = positions.astype(np.int32)
        self.counts, self.capacity = np.full(B, S), S

    def truncate(self, n: int) -> None:
        """Keep the first n slots of each row that has more."""
        self.counts = np.minimum(self.counts, n)
        for layer in self.layers:
            layer.n_slots = min(layer.n_slots, self.n_slots)

    def align(self) -> None:
        """Let all rows append at the same slot from now on; what is skipped stays unused."""
        self.counts[:] = self.n_slots

    def clear(self, row: int) -> None:
        """Forget the slots of a row."""
        self.counts[row] = 0

    def _empty(self, batch_size: int) -> "BatchedKVCache":
        windows = [layer.window for layer in self.layers]
        return BatchedKVCache(batch_size, windows, self._as_offset, self._grouped_scores)

    def _widen(self, needed: int) -> None:
        """Room in the table of positions for ``needed`` slots."""
        width = self._table.shape[1]
        if needed > width:
            grown = np.zeros((self.batch_size, max(needed, 2 * width)), np.int32)
            grown[:, :width] = self._table
            self._table = grown

    def begin(
        self,
        positions: np.ndarray,
        mask: mx.array | str,
        recorder: AttentionRecorder | None,
        layout: Layout | None = None,
        packed: bool = False,
    ) -> np.ndarray:
        """Open a forward pass over new tokens.

        Args:
            positions: of the new tokens, [B, T], by rows.
            mask: "causal" or [B, 1, T, S + T'], as they see the slots after this pass.
            recorder: takes note of attention.
            layout: how the tokens lie in the rows; None where every row has T of them.
            packed: whether the model sees the tokens as [1, N], not by rows.

        Returns:
            the positions as the model is to see them.
        """
        positions = np.asarray(positions)
        B, T = positions.shape
        if self.batch_size != B:
            raise TempoError(f"positions have {B} rows, the cache has {self.batch_size}")
        counts = np.full(B, T) if layout is None else layout.counts
        after = self.counts + counts
        end = int(after.max())
        if isinstance(mask, str):
            if mask != "causal":
                raise TempoError(f'mask must be "causal" or an array, got {mask!r}')
            if (after != end).any() or (counts != T).any():
                raise TempoError('mask "causal" needs rows of equally many slots; give an array')
        elif mask.ndim != 4 or mask.shape[-2:] != (T, end) or mask.shape[0] not in (1, B):
            raise TempoError(f"mask must be [{B}, 1, {T}, {end}], got {list(mask.shape)}")
        start = slots = None
        if not packed and (counts == T).all() and (self.counts == self.counts[0]).all():
            start, layout = int(self.counts[0]), None
        elif layout is None:
            layout = Layout(np.repeat(np.arange(B), T), B)
        self._widen(end)
        if layout is None:
            self._table[:, end - T : end] = positions
        else:
            slots = self.counts[layout.rows] + layout.rank
            self._table[layout.rows, slots] = positions[layout.rows, layout.rank]
        seen = positions
        if packed and layout is not None:
            seen = positions[layout.rows, layout.rank][None]
        self.running = ForwardPass(
            self._as_offset(seen),
            positions,
            self._table[:, :end],
            mask,
            start,
            layout,
            slots,
            packed,
            recorder,
            self._grouped_scores,
        )
        self._after = after
        return seen

    def end(self) -> None:
        """Close the forward pass: the new tokens are slots now."""
        self.counts = self._after
        self.running = None

    def abandon(self) -> None:
        """Close a forward pass that failed: forget what it appended."""
        for layer in self.layers:
            layer.n_slots = min(layer.n_slots, self.n_slots)
        self.running = None

    def mask_within(self, window: int | None, return_array: bool) -> mx.array | str | None:
        """The running pass's mask, narrowed to keys less than ``window`` positions behind."""
        assert self.running is not None
        return self.running.mask_within(window, return_array)


def _repeated(buffer: mx.array | None, n: int) -> mx.array | None:
    if buffer is None:
        return None
    B = buffer.shape[0]
    views = mx.broadcast_to(buffer[:, None], (B, n, *buffer.shape[1:]))
    return mx.flatten(views, 0, 1)


def _padded(buffer: mx.array | None, like: mx.array, rows: int, width: int) -> mx.array:
    """The first ``width`` slots of a buffer, [rows, H, width, D]; zeros where it has none."""
    _, H, _, D = like.shape
    if buffer is None:
        return mx.zeros((rows, H, width, D), like.dtype)
    have = min(width, buffer.shape[2])
    missing = mx.zeros((rows, H, width - have, D), like.dtype)
    return mx.concatenate([buffer[:, :, :have], missing], axis=2)
