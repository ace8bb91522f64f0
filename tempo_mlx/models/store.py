"""What a model has read: slots of keys and values, and states of recurrent layers, in rows.

Everything that this package computes stands on one store: a sequence to a row; several short ones
beside each other; a tree, whose branches share what they have in common; or many texts that share
their beginnings, of which a pass reads some.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList

from ..errors import TempoError
from .attention import AttentionRecorder
from .forward_pass import ForwardPass, Spread
from .quantization import KVQuantization
from .rows import TokenRows
from .states import NONE, BranchStates, RecurrentLayer, States

#: Slots by which the buffers of a single row grow.
BLOCK = 256

#: Keys or values [B, H_kv, capacity, D]; quantised, three arrays: the packed numbers, their scales
#: and their biases, which differ in the last axis only.
Buffer = mx.array | tuple[mx.array, ...]


class LayerCache:
    """One layer's keys and values, behind the protocol that mlx-lm's attention modules speak.

    Args:
        owner: the cache whose forward pass is running.
        window: sliding window of the layer in logical positions; None where it sees everything.
    """

    #: of the numbers that keys and values are kept as; only there once they are quantised: by
    #: their being there mlx-lm chooses the attention for it
    bits: int
    group_size: int

    def __init__(self, owner: "SlotStore", window: int | None):
        # Weak, so that a cache that goes out of use frees its memory at once.
        self._owner = weakref.ref(owner)
        self.window = window
        self.keys: Any = None  # a Buffer, [B, H_kv, capacity, D]
        self.values: Any = None  # a Buffer, [B, H_kv, capacity, D_v]
        self.n_slots = 0
        #: the pass that is running
        self.forward_pass: ForwardPass | None = None

    @property
    def owner(self) -> "SlotStore":
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def offset(self) -> mx.array | int:
        """Position of each row's first new token: what the model hands to its rotary modules."""
        return 0 if self.forward_pass is None else self.forward_pass.offset

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        windows = [w for w in (self.window, window_size) if w is not None]
        return self.owner.mask_within(min(windows) if windows else None, return_array)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Buffer, Buffer]:
        """Append keys [R, H_kv, T, D] and values; returns those of all slots."""
        running = self.forward_pass
        assert running is not None, "a cache is used by a PositionedModel only"
        for name, new in (("keys", self._stored(keys)), ("values", self._stored(values))):
            buffer = self.owner.with_room(getattr(self, name), new, running.end)
            tree_map(running.write, buffer, new)
            setattr(self, name, buffer)
        self.n_slots = running.end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Buffer, Buffer]:
        """Keys and values of all slots, [B, H_kv, S, D]; in a pass, of those that its rows read."""
        running, n = self.forward_pass, self.n_slots

        def fetched(buffer: mx.array) -> mx.array:
            stored = buffer[..., :n, :]
            return stored if running is None else running.fetched(stored)

        return tree_map(fetched, self.keys), tree_map(fetched, self.values)

    def quantize(self, how: KVQuantization) -> None:
        """Keep keys and values as ``mx.quantize`` makes them, from now on."""
        self.bits, self.group_size = how.bits, how.group_size
        for name in ("keys", "values"):
            if getattr(self, name) is not None:
                setattr(self, name, self._stored(getattr(self, name)))
        # So that one layer at a time exists twice.
        mx.eval(self.state)

    def _stored(self, new: mx.array) -> Buffer:
        """Keys or values as the layer keeps them."""
        if not hasattr(self, "bits"):
            return new
        return tuple(mx.quantize(new, group_size=self.group_size, bits=self.bits))

    @property
    def state(self) -> list[mx.array]:
        kept = [buffer for buffer in (self.keys, self.values) if buffer is not None]
        return [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(kept))]


#: What a layer keeps: a sliding window of its keys in logical positions, None for all of them;
#: states; or several of these.
Kind = int | States | tuple["Kind", ...] | None


def layer_of(
    kind: Kind,
    make: Callable[[int | None], Any],
    attention: list[Any],
    recurrent: list[RecurrentLayer],
) -> Any:
    """What a layer of a model gets as its cache.

    Args:
        kind: what the layer keeps.
        make: the cache of keys and values with a window.
        attention, recurrent: take what was made.
    """
    if isinstance(kind, tuple):
        return CacheList(*(layer_of(part, make, attention, recurrent) for part in kind))
    if isinstance(kind, States):
        recurrent.append(RecurrentLayer(kind))
        return recurrent[-1]
    attention.append(make(kind))
    return attention[-1]


class SlotStore:
    """Slots of all layers for B batch rows, each row with a number of slots of its own.

    A slot is one entry of the store: a token's key, rotated once at its logical position, its
    value and, in some, the state of recurrent layers behind it. Slots are appended and later, by
    :meth:`compact`, dropped; they are never rewritten. A pass costs what it reads and appends: in
    between, nothing that is held is copied but when a buffer is full.

    Args:
        batch_size: rows, at least 1.
        kinds: what each layer keeps.
        spread_rows: see :class:`.forward_pass.ForwardPass`.
        grouped_scores: give masks an axis for the query heads of a group, [B, 1, 1, T, S].
        quantization: how keys and values are quantised, once a token is far enough; None for not.
    """

    def __init__(
        self,
        batch_size: int,
        kinds: Sequence[Kind],
        spread_rows: Spread = False,
        grouped_scores: bool = False,
        quantization: KVQuantization | None = None,
    ):
        if batch_size < 1:
            raise TempoError(f"batch_size must be at least 1, got {batch_size}")
        self._spread_rows = spread_rows
        self._grouped_scores = grouped_scores
        self._kinds = tuple(kinds)
        self.quantization = quantization
        #: whether keys and values are quantised by now
        self.is_quantized = False
        #: keys and values of the attention layers, in order
        self.kv: list[LayerCache] = []
        recurrent: list[RecurrentLayer] = []
        #: what the model's layers get
        self.layers = [
            layer_of(kind, lambda window: LayerCache(self, window), self.kv, recurrent)
            for kind in kinds
        ]
        self.states = BranchStates(recurrent)
        #: what the layers made of each token, [1, 1, S, D], where the caller keeps it
        self._outputs = LayerCache(self, None)
        #: whether every slot keeps its state, so that any may be continued; else only those of the
        #: pass that was a sequence's last
        self.keeps_states = False
        #: slots of a single row whose states are not needed once the next pass has read them
        self.spent: np.ndarray | None = None
        #: place of each slot's state, [B, S]
        self._places = np.full((batch_size, BLOCK if recurrent else 0), NONE, np.int32)
        self._table = np.zeros((batch_size, BLOCK), np.int32)
        #: slots of each row, [B]
        self.counts = np.zeros(batch_size, np.int64)
        #: slots that the buffers have room for
        self.capacity = 0
        #: slots that a row may have room for, where that is less than a whole block more
        self.capacity_limit: int | None = None
        self._running: ForwardPass | None = None
        #: the last token's position of the pass, and 1
        self._reached = 0

    @property
    def running(self) -> ForwardPass | None:
        """The pass that is running; its layers know it."""
        return self._running

    @running.setter
    def running(self, forward_pass: ForwardPass | None) -> None:
        self._running = forward_pass
        for layer in self.kv:
            layer.forward_pass = forward_pass

    def mask_within(self, window: int | None, return_array: bool) -> mx.array | str | None:
        """The running pass's mask, narrowed to keys less than ``window`` positions behind."""
        assert self.running is not None
        return self.running.mask_within(window, return_array)

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
        """Bytes of keys, values and states, room for more included."""
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with the logits, so that no graph outlives its step."""
        layers = [*self.kv, self._outputs]
        return [array for layer in layers for array in layer.state] + self.states.state

    def room(self, needed: int) -> int:
        """Slots that the buffers will have room for once ``needed`` are in the longest row.

        A single row grows by blocks of 256, several rows by smaller ones; and by an eighth at
        least, so that what is held is copied a bounded number of times.
        """
        if needed <= self.capacity:
            return self.capacity
        step = max(16, BLOCK // self.batch_size)
        grown = max(needed, self.capacity * 9 // 8)
        rounded = -(-grown // step) * step
        if self.capacity_limit is None:
            return rounded
        return max(needed, min(rounded, self.capacity_limit))

    def with_room(self, buffer: Any, new: Any, needed: int) -> Any:
        """A buffer [B, H, capacity, D] with room for ``needed`` slots of the new tokens' kind."""
        if buffer is None:
            return tree_map(lambda like: self._grown(None, like, needed), new)
        return tree_map(lambda old, like: self._grown(old, like, needed), buffer, new)

    def _grown(self, buffer: mx.array | None, like: mx.array, needed: int) -> mx.array:
        capacity = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and needed <= capacity:
            return buffer
        self.capacity = self.room(needed)
        _, H, _, D = like.shape
        used = min(capacity, self.n_slots)
        grown = mx.zeros((self.batch_size, H, self.capacity - used, D), like.dtype)
        return grown if buffer is None else mx.concatenate([buffer[..., :used, :], grown], axis=2)

    def quantize(self) -> None:
        """Keep keys and values as the store's quantisation says, from now on."""
        assert self.quantization is not None
        if not self.is_quantized:
            self.is_quantized = True
            for layer in self.kv:
                layer.quantize(self.quantization)

    def continue_as(self, quantization: KVQuantization | None) -> None:
        """Let what is appended be quantised in another way than a former run's.

        Raises:
            TempoError: if it is too late for that.
        """
        if self.is_quantized and quantization != self.quantization:
            raise TempoError(
                "kv_bits and kv_group_size must stay as they were: the text that goes on has been "
                "quantised with them"
            )
        self.quantization = quantization

    def _quantize_with(self, others: "Sequence[SlotStore]") -> None:
        """Before slots of other stores are taken over: all are quantised if one is."""
        if any(store.is_quantized for store in (self, *others)):
            for store in (self, *others):
                store.quantize()

    def replicate(self, n: int) -> None:
        """Repeat every row n times, its copies side by side: rows 0, 0, 1, 1, ... for n = 2.

        Nothing is copied before the first token is appended to one of them.
        """
        if n < 1:
            raise TempoError(f"n must be at least 1, got {n}")
        for layer in self.kv:
            if layer.keys is not None:
                layer.keys, layer.values = tree_map(
                    lambda buffer: _repeated(buffer, n), (layer.keys, layer.values)
                )
        self._table = np.repeat(self._table, n, axis=0)
        self._places = np.repeat(self._places, n, axis=0)
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
        for layer in self.kv:
            if layer.keys is not None:
                layer.keys, layer.values = tree_map(
                    lambda buffer: buffer[chosen], (layer.keys, layer.values)
                )
        self._table, self._places = self._table[rows], self._places[rows]
        self.counts = self.counts[rows]

    def compact(
        self, keep: np.ndarray | Sequence[int] | Sequence[np.ndarray], room: int = 0
    ) -> None:
        """Keep these slots, in this order; positions do not change. One gather for each layer.

        Args:
            keep: slot indices in [0, S): [S'] for all rows alike, [B, S'] row by row, or one
                array for each row, of any lengths.
            room: for so many slots more that are going to be appended.
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

        width = index.shape[-1]
        index = np.pad(index, [(0, 0)] * (index.ndim - 1) + [(0, room)])
        device = mx.array(index.astype(np.int32))

        def gather(buffer: mx.array) -> mx.array:
            if index.ndim == 1:
                return mx.take(buffer, device, axis=2)
            return mx.take_along_axis(buffer, device[:, None, :, None], axis=2)

        chosen = np.broadcast_to(index, (self.batch_size, width + room))
        self._replace(gather, np.arange(self.batch_size)[:, None], chosen, counts)

    def rearrange(self, rows: np.ndarray, slots: np.ndarray, counts: np.ndarray) -> None:
        """Make new rows of the slots of any rows: slot s of row b comes from (rows, slots)[b, s].

        Args:
            rows, slots: [B', S'], sources; anything valid behind a row's last slot.
            counts: slots of each new row, [B'].
        """
        row_index, slot_index = mx.array(rows.astype(np.int32)), mx.array(slots.astype(np.int32))

        def gather(buffer: mx.array) -> mx.array:
            return mx.contiguous(buffer[row_index, :, slot_index].transpose(0, 2, 1, 3))

        self._replace(gather, rows, slots, np.asarray(counts, np.int64))

    def rearrange_row(self, row: int, slots: np.ndarray) -> None:
        """Keep these slots of one row, in this order, and no other row."""
        if self.batch_size > 1:
            self.select([row])
        self.compact(slots)

    def _replace(
        self,
        gather: Callable[[mx.array], mx.array],
        rows: np.ndarray,
        slots: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        """Move the slots (rows, slots) [B', S'] of all layers by ``gather``."""
        width = slots.shape[1]
        for layer in [*self.kv, self._outputs]:
            for name in ("keys", "values"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    gathered = tree_map(gather, buffer)
                    del buffer
                    setattr(layer, name, gathered)
                    # Evaluated layer by layer, so that one layer at a time exists twice.
                    mx.eval(gathered)
            layer.n_slots = min(layer.n_slots, width)
        self._table, self.counts = self._table[rows, slots], counts
        self.capacity = min(self.capacity, width)
        if self.states:
            self._places = self._places[rows, slots]
            self._keep_live_states(self._live_places())

    def extract(self, row: int) -> "SlotStore":
        """A cache of its own for one row, with that row's slots only."""
        if not 0 <= row < self.batch_size:
            raise TempoError(f"row must be in [0, {self.batch_size}), got {row}")
        count = int(self.counts[row])
        alone = self._empty(1)
        alone._quantize_with([self])
        for layer, copy in zip(self.kv, alone.kv, strict=True):
            if layer.keys is not None:
                copy.keys, copy.values = tree_map(
                    lambda buffer: buffer[row : row + 1, :, :count], (layer.keys, layer.values)
                )
                copy.n_slots = count
        alone._table = self._table[row : row + 1, :count].copy()
        alone.counts, alone.capacity = np.array([count]), count
        if self.states:
            alone._places = np.full((1, count), NONE, np.int32)
            alone._take_states(0, np.arange(count), self, row, np.arange(count))
        return alone

    @classmethod
    def merge(cls, caches: Sequence["SlotStore"]) -> "SlotStore":
        """One cache with the rows of all, in order; the caches of one model."""
        if not caches:
            raise TempoError("caches must name at least 1 cache")
        merged = caches[0]._empty(sum(cache.batch_size for cache in caches))
        merged._quantize_with(caches)
        width = max(cache.n_slots for cache in caches)
        for i, layer in enumerate(merged.kv):
            parts = [cache.kv[i] for cache in caches]
            for name in ("keys", "values"):
                filled = [(p, getattr(p, name)) for p in parts if getattr(p, name) is not None]
                if filled:
                    like = filled[0][1]
                    rows = [
                        _padded(getattr(part, name), like, cache.batch_size, width)
                        for part, cache in zip(parts, caches, strict=True)
                    ]
                    joined = tree_map(lambda *each: mx.concatenate(list(each), axis=0), *rows)
                    setattr(layer, name, joined)
                    layer.n_slots = width
        merged._table = np.zeros((merged.batch_size, max(width, 1)), np.int32)
        merged.counts = np.concatenate([cache.counts for cache in caches])
        merged._table[:, :width] = np.concatenate(
            [np.pad(c.slot_positions, ((0, 0), (0, width - c.n_slots))) for c in caches]
        )
        merged.capacity = width
        if merged.states:
            merged._places = np.full(merged._table.shape, NONE, np.int32)
            sources = [(cache, row) for cache in caches for row in range(cache.batch_size)]
            for row, (cache, source) in enumerate(sources):
                own = np.arange(cache.counts[source])
                merged._take_states(row, own, cache, source, own)
        return merged

    def adopt(self, other: "SlotStore", source: int, row: int) -> np.ndarray:
        """Append the slots of a row of another cache to a row of this one; returns their slots."""
        count, start = int(other.counts[source]), int(self.counts[row])
        end = start + count
        self._quantize_with([other])

        def copy(buffer: mx.array, new: mx.array) -> None:
            buffer[row, :, start:end] = new[source, :, :count]

        for layer, theirs in zip(self.kv, other.kv, strict=True):
            for name in ("keys", "values"):
                new = getattr(theirs, name)
                if new is not None:
                    buffer = self.with_room(getattr(layer, name), new, end)
                    tree_map(copy, buffer, new)
                    setattr(layer, name, buffer)
                    layer.n_slots = max(layer.n_slots, end)
        self._widen(end)
        self._table[row, start:end] = other._table[source, :count]
        self.counts[row] = end
        slots = np.arange(start, end)
        if self.states:
            self._places[row, start:] = NONE
            self._take_states(row, slots, other, source, np.arange(count))
        return slots

    def states_after(self, n: int) -> int:
        """States that there is room for once n more are kept beside those of the slots."""
        if self.states.fit(n):
            return self.states.capacity
        return len(self._live_places()) + n

    def last_states(self) -> dict[str, mx.array]:
        """States of each row's last slot, ``states.<i>`` [B, ..]; empty where there are none."""
        if not self.states or (self.counts == 0).any():
            return {}
        places = self._places[np.arange(self.batch_size), self.counts - 1]
        taken = self.states.taken(places)
        return {f"states.{i}": array for i, array in enumerate(taken) if array is not None}

    def fill(self, arrays: dict[str, mx.array], positions: np.ndarray) -> None:
        """Take the slots of an empty cache from arrays.

        Args:
            arrays: ``layers.<i>.keys`` and ``layers.<i>.values``, [B, H_kv, S, D] each; and what
                :meth:`last_states` returned.
            positions: of the slots, [B, S].

        Raises:
            ValueError: if their shapes do not fit.
        """
        B, S = positions.shape
        for i, layer in enumerate(self.kv):
            keys, values = (arrays.pop(f"layers.{i}.{name}", None) for name in ("keys", "values"))
            if keys is not None and values is not None:
                layer.keys, layer.values, layer.n_slots = keys, values, S
        for layer in self.kv:
            if any(a.ndim != 4 or (a.shape[0], a.shape[2]) != (B, S) for a in layer.state):
                raise TempoError(f"the arrays are not [{B}, H_kv, {S}, D]")
        states = [arrays.pop(f"states.{i}", None) for i in range(self.states.n_arrays)]
        if arrays:
            raise TempoError(f"the model has no {sorted(arrays)[0]}")
        self._table = positions.astype(np.int32)
        self.counts, self.capacity = np.full(B, S), S
        if self.states and S:
            if any(state is not None and len(state) != B for state in states):
                raise TempoError(f"the states are not [{B}, ..]")
            self._places = np.full((B, S), NONE, np.int32)
            self._places[:, -1] = self.states.give(states, B) + np.arange(B)

    def truncate(self, n: int, row: int | None = None) -> None:
        """Keep the first n slots of each row that has more, or of one row."""
        if row is None:
            self.counts = np.minimum(self.counts, n)
        else:
            self.counts[row] = min(self.counts[row], n)
        for layer in self.kv:
            layer.n_slots = min(layer.n_slots, self.n_slots)

    def move(self, row: int, slots: np.ndarray, start: int) -> None:
        """Copy slots of a row to the places from ``start`` on, which are not after any of them."""
        index, end = mx.array(slots.astype(np.int32)), start + len(slots)
        for layer in self.kv:
            for buffer in layer.state:
                buffer[row, :, start:end] = mx.take(buffer[row], index, axis=1)
        self._table[row, start:end] = self._table[row, slots]

    def align(self) -> None:
        """Let all rows append at the same slot from now on; what is skipped stays unused.

        Not where layers are recurrent, which continue the last slot.
        """
        if not self.states:
            self.counts[:] = self.n_slots

    def clear(self, row: int) -> None:
        """Forget the slots of a row."""
        self.counts[row] = 0

    def _empty(self, batch_size: int) -> "SlotStore":
        empty = SlotStore(
            batch_size, self._kinds, self._spread_rows, self._grouped_scores, self.quantization
        )
        empty.keeps_states = self.keeps_states
        return empty

    def _live_places(self) -> np.ndarray:
        """Places of the states that slots have, ascending."""
        present = np.arange(self._places.shape[1]) < self.counts[:, None]
        places = np.unique(self._places[present])
        return places[places != NONE]

    def _make_room_for_states(self, n: int) -> None:
        """Have room for n states more; what no slot needs goes when room is made."""
        if self.keeps_states and self.states.fit(n):
            return
        live = self._live_places()
        if not len(live) or not self.states.fit(n):
            self._keep_live_states(live, n)

    def _keep_live_states(self, live: np.ndarray, n: int = 0) -> None:
        self.states.keep(live, n)
        found = self._places != NONE
        at = np.searchsorted(live, self._places[found])
        at[at == len(live)] = 0
        known = live[at] == self._places[found] if len(live) else np.zeros(len(at), bool)
        self._places[found] = np.where(known, at, NONE)

    def _take_states(
        self, row: int, slots: np.ndarray, other: "SlotStore", source: int, theirs: np.ndarray
    ) -> None:
        """Copy the states of another cache's slots to slots of this one."""
        places = other._places[source, theirs]
        have = places != NONE
        if not have.any():
            return
        chosen, of_slot = np.unique(places[have], return_inverse=True)
        self._make_room_for_states(len(chosen))
        first = self.states.give(other.states.taken(chosen), len(chosen))
        self._places[row, slots[have]] = first + of_slot

    def _widen(self, needed: int) -> None:
        """Room in the tables for ``needed`` slots."""
        if self.states and needed > self._places.shape[1]:
            more = max(needed, 2 * self._places.shape[1]) - self._places.shape[1]
            self._places = np.pad(self._places, ((0, 0), (0, more)), constant_values=NONE)
        width = self._table.shape[1]
        if needed > width:
            grown = np.zeros((self.batch_size, max(needed, 2 * width)), np.int32)
            grown[:, :width] = self._table
            self._table = grown

    def preceding(self, rows: TokenRows, reads: np.ndarray | None = None) -> np.ndarray:
        """The slot before each new token in its row, [N]; see :meth:`begin` for ``reads``."""
        if reads is not None:
            return self.counts[0] - 1 + np.arange(len(rows))
        return self.counts[rows.sequences] + rows.rank - 1

    def begin(
        self,
        positions: np.ndarray,
        mask: mx.array | str,
        recorder: AttentionRecorder | None,
        rows: TokenRows | None = None,
        parents: np.ndarray | None = None,
        reads: np.ndarray | None = None,
    ) -> None:
        """Open a forward pass over new tokens.

        Args:
            positions: of the new tokens, [B, T] of a chunk or [N, 1] of a step.
            mask: "causal" or an array broadcast to [B, 1, T, S'] or [N, 1, 1, S'], over the slots
                that there are after this pass, S' of the longest sequence.
            recorder: takes note of attention.
            rows: of a step, the sequences of its tokens.
            parents: where layers are recurrent, the slot that each row continues, in its own
                sequence, [R]; -1 where nothing was read before. None for the last slots.
            reads: of a store of one row, the slots that the pass's B sequences read, their own new
                tokens' included, [B, S']. The new tokens follow the last slot, in their order.
                None where the sequences are the store's rows, read whole.
        """
        positions = np.asarray(positions)
        R, T = positions.shape
        if reads is None and rows is None and self.batch_size != R:
            raise TempoError(f"positions have {R} rows, the cache has {self.batch_size}")
        if reads is not None:
            after = self.counts + R * T
        else:
            after = self.counts + (T if rows is None else rows.counts)
        end = int(after.max())
        width = end if reads is None else reads.shape[1]
        alike = (self.counts == self.counts[0]).all()
        if isinstance(mask, str):
            if mask != "causal":
                raise TempoError(f'mask must be "causal" or an array, got {mask!r}')
            if not alike or (rows is not None and not rows.is_aligned):
                raise TempoError('mask "causal" needs rows of equally many slots; give an array')
        elif mask.ndim != 4 or mask.shape[-2:] != (T, width) or mask.shape[0] not in (1, R):
            raise TempoError(f"mask must be [{R}, 1, {T}, {width}], got {list(mask.shape)}")
        self._widen(end)
        start = sequences = slots = None
        if reads is not None:
            start = int(self.counts[0])
            self._table[0, start:end] = positions.reshape(-1)
            keys = self._table[0, reads]
        elif alike and (rows is None or rows.is_rectangular):
            start = int(self.counts[0])
            columns = positions if rows is None else positions.reshape(rows.batch_size, -1)
            self._table[:, start:end] = columns
            keys = self._table[:, :end]
        else:
            sequences = np.repeat(np.arange(R), T) if rows is None else rows.sequences
            rank = np.tile(np.arange(T), R) if rows is None else rows.rank
            slots = self.counts[sequences] + rank
            self._table[sequences, slots] = positions.reshape(-1)
            keys = self._table[:, :end]
        if rows is not None and len(keys) > 1:
            keys = keys[rows.sequences]
        self.running = ForwardPass(
            positions,
            keys,
            mask,
            start,
            end,
            rows,
            sequences,
            slots,
            self._spread_rows,
            recorder,
            self._grouped_scores,
            reads,
        )
        self._after = after
        self._reached = int(positions.max()) + 1
        if self.states:
            self._load_states(R, T, rows, parents, reads is None)

    def _load_states(
        self,
        R: int,
        T: int,
        rows: TokenRows | None,
        parents: np.ndarray | None,
        by_sequence: bool,
    ) -> None:
        """Give the layers the states that the R rows of the model start from, and note which slot
        those will belong to that they end with: of a chunk, its last one's."""
        if not by_sequence:
            sequences = np.zeros(R, np.int64)
            last = self.counts[0] + T * np.arange(1, R + 1) - 1
        elif rows is None:
            sequences = np.arange(self.batch_size)
            last = self._after - 1
        else:
            sequences = rows.sequences
            last = self.counts[sequences] + rows.rank
        if parents is None:
            parents = self.counts[sequences] - 1
        read = parents >= 0
        places = np.where(read, self._places[sequences, np.maximum(parents, 0)], NONE)
        if (places[read] == NONE).any():
            raise RuntimeError("a token continues a slot whose state was dropped")
        if read.any() and not read.all():
            raise RuntimeError("a step mixes tokens that begin a text with others")
        self.states.load(places)
        self._ends = sequences, last

    def _store_states(self) -> None:
        """The states that the pass has made belong to its tokens; of a chunk, to the last ones."""
        sequences, slots = self._ends
        if not self.keeps_states:
            self._places[sequences] = NONE
        elif self.spent is not None:
            self._places[0, self.spent] = NONE
            self.spent = None
        columns = np.arange(self._places.shape[1])
        new = (columns >= self.counts[:, None]) & (columns < self._after[:, None])
        self._places[new] = NONE
        n = len(sequences)
        self._make_room_for_states(n)
        self._places[sequences, slots] = self.states.store(n) + np.arange(n)

    def has_state(self, slots: np.ndarray) -> np.ndarray:
        """Whether slots of a single row have states, [n]; a negative number is none."""
        return (slots >= 0) & (self._places[0, slots] != NONE)

    @property
    def n_states(self) -> int:
        """Slots of a single row that have states."""
        return int(np.count_nonzero(self._places[0, : self.n_slots] != NONE))

    def drop_states(self, slots: np.ndarray) -> None:
        """Let go of the states of slots of a single row."""
        self._places[0, slots] = NONE

    def keep_outputs(self, outputs: mx.array) -> None:
        """Keep what the layers made of the last pass's N tokens, [N, D], in a store of one row."""
        layer, new, end = self._outputs, outputs[None, None], self.n_slots
        layer.keys = self.with_room(layer.keys, new, end)
        layer.keys[..., end - len(outputs) : end, :] = new

    def outputs(self, slots: np.ndarray) -> mx.array:
        """What the layers made of the tokens in these slots, [n, D]."""
        assert self._outputs.keys is not None
        index = mx.array(slots.astype(np.int32))
        return mx.take(self._outputs.keys, index, axis=2).squeeze((0, 1))

    def end(self) -> None:
        """Close the forward pass: the new tokens are slots now."""
        if self.states:
            self._store_states()
        self.counts = self._after
        self.running = None
        if self.quantization is not None and self._reached >= self.quantization.start:
            self.quantize()

    def abandon(self) -> None:
        """Close a forward pass that failed: forget what it appended."""
        for layer in self.kv:
            layer.n_slots = min(layer.n_slots, self.n_slots)
        self.states.release_layers()
        self.running = None


def _repeated(buffer: mx.array, n: int) -> mx.array:
    B = buffer.shape[0]
    views = mx.broadcast_to(buffer[:, None], (B, n, *buffer.shape[1:]))
    return mx.flatten(views, 0, 1)


def _padded(buffer: Any, like: Any, rows: int, width: int) -> Any:
    """The first ``width`` slots of a buffer, [rows, H, width, D]; zeros where it has none."""

    def padded(like: mx.array, buffer: mx.array | None = None) -> mx.array:
        _, H, _, D = like.shape
        have = 0 if buffer is None else min(width, buffer.shape[2])
        missing = mx.zeros((rows, H, width - have, D), like.dtype)
        if buffer is None:
            return missing
        return mx.concatenate([buffer[:, :, :have], missing], axis=2)

    return tree_map(padded, like) if buffer is None else tree_map(padded, like, buffer)
