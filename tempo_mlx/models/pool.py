"""Slots that belong to no row: keys and values of many texts' tokens, put together where needed.

Texts that come and go, and share their beginnings, do not fit into the rows of a batch. Here every
slot stands by itself; for a forward pass, the slots that its tokens see are gathered into rows.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .attention import AttentionRecorder
from .cache import Kind, LayerCache, Passes, layer_of
from .forward_pass import ForwardPass, Spread, token_by_token
from .rows import TokenRows
from .states import NONE, BranchStates, RecurrentLayer

#: Slots by which a pool grows at least.
BLOCK = 256


class PooledLayer(LayerCache):
    """One layer's keys and values, [1, H_kv, capacity, D]."""

    owner: "SlotPool"  # type: ignore[assignment]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the new tokens' keys and values; returns those that the rows see."""
        pool = self.owner
        self.keys = pool.written(self.keys, keys)
        self.values = pool.written(self.values, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Keys and values of the slots that the sequences see, [B, H_kv, S, D]."""
        assert self.keys is not None and self.values is not None
        pool, running = self.owner, self.forward_pass
        assert running is not None
        keys, values = pool.gathered(self.keys), pool.gathered(self.values)
        return running.fetched(keys), running.fetched(values)


class SlotPool(Passes):
    """Keys, values and outputs of the layers, of tokens that are numbered by their slots; and
    recurrent states, numbered by places, of those tokens that the caller wants to continue.

    Made by :meth:`.PositionedModel.make_pool`; a forward pass takes it in place of a cache, after
    :meth:`plan`.

    Args:
        kinds, spread_rows, grouped_scores: as of :class:`.cache.BatchedKVCache`.
        limit: slots that it may have room for, at least 1.
        n_states: states that it may have room for.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        limit: int,
        n_states: int = 0,
        spread_rows: Spread = False,
        grouped_scores: bool = False,
    ):
        self._spread_rows, self._grouped_scores = spread_rows, grouped_scores
        self.kv: list[PooledLayer] = []
        recurrent: list[RecurrentLayer] = []
        #: what the model's layers get
        self.layers = [
            layer_of(kind, lambda window: PooledLayer(self, window), self.kv, recurrent)  # type: ignore[arg-type]
            for kind in kinds
        ]
        self.states = BranchStates(recurrent)
        self.limit, self._n_states = limit, n_states
        #: slots that the buffers have room for
        self.capacity = 0
        self._positions = np.zeros(0, np.int32)
        self._hidden: mx.array | None = None  # [capacity, D]
        self._slots = np.zeros(0, np.int64)
        self._seen = np.zeros((1, 0), np.int64)
        self._sources = self._targets = np.zeros(0, np.int64)
        self._write: mx.array | slice = slice(0, 0)
        self._gather = mx.zeros(0)

    @property
    def nbytes(self) -> int:
        """Bytes that all arrays occupy, room for slots to come included."""
        return sum(array.nbytes for array in self.state)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with what a pass returns."""
        arrays = [array for layer in self.kv for array in layer.state] + self.states.state
        return arrays if self._hidden is None else [*arrays, self._hidden]

    @property
    def batch_size(self) -> int:
        """Rows of the planned pass."""
        return len(self._seen)

    def grow(self, needed: int) -> None:
        """Have room for ``needed`` slots, at most ``limit``; doubles what is there at least."""
        if needed <= self.capacity:
            return
        wanted = max(needed, 2 * self.capacity)
        capacity = max(needed, min(self.limit, -(-wanted // BLOCK) * BLOCK))
        more = capacity - self.capacity
        self._positions = np.append(self._positions, np.zeros(more, np.int32))
        for layer in self.kv:
            for name in ("keys", "values"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    new = mx.zeros((*buffer.shape[:2], more, buffer.shape[3]), buffer.dtype)
                    grown = mx.concatenate([buffer, new], axis=2)
                    del buffer
                    setattr(layer, name, grown)
                    # Layer by layer, so that one layer at a time exists twice.
                    mx.eval(grown)
        if self._hidden is not None:
            new = mx.zeros((more, self._hidden.shape[1]), self._hidden.dtype)
            self._hidden = mx.concatenate([self._hidden, new])
        self.capacity = capacity

    def plan(
        self,
        slots: np.ndarray,
        seen: np.ndarray,
        sources: np.ndarray | None = None,
        targets: np.ndarray | None = None,
    ) -> None:
        """Say where the tokens of the next pass go, and what its rows see.

        Args:
            slots: of the tokens, [N], below ``capacity``.
            seen: slots of each row, its own tokens' included, [B, S]; a row that sees fewer names
                any of them again, masked.
            sources, targets: where layers are recurrent, the places of the states from which the
                model's rows start, all NONE at the beginning of texts, and of those that they end
                with, [R]: a row is a token, or a chunk of tokens of which each continues the one
                before.
        """
        if sources is not None and targets is not None:
            self._sources, self._targets = sources, targets
        self._slots, self._seen = slots, seen
        first, n = int(slots[0]), len(slots)
        if (slots == np.arange(first, first + n)).all():
            self._write = slice(first, first + n)
        else:
            self._write = mx.array(slots.astype(np.int32))
        self._gather = mx.array(seen.reshape(-1).astype(np.int32))

    def preceding(self, rows: TokenRows) -> np.ndarray:
        """The slot before each planned token in its row, [N]; of a row's first one, any."""
        return np.append(NONE, self._slots[:-1])

    def begin(
        self,
        positions: np.ndarray,
        mask: mx.array | str,
        recorder: AttentionRecorder | None,
        rows: TokenRows | None = None,
        parents: np.ndarray | None = None,
    ) -> None:
        """Open the planned pass; arguments as of :meth:`.cache.BatchedKVCache.begin`."""
        self._positions[self._slots] = positions.reshape(-1)
        keys = self._positions[self._seen]
        if rows is not None and self.batch_size > 1:
            keys = keys[rows.sequences]
        self.running = ForwardPass(
            positions,
            keys,
            mask,
            None,
            rows,
            spread=self._spread_rows,
            recorder=recorder,
            grouped_scores=self._grouped_scores,
        )
        if self.states:
            self.states.load(self._sources)

    def end(self) -> None:
        """Close the pass."""
        if self.states:
            self.states.put(self._targets, self._n_states)
        self.running = None

    def abandon(self) -> None:
        """Close a pass that failed."""
        self.states.release_layers()
        self.running = None

    def written(self, buffer: mx.array | None, new: mx.array) -> mx.array:
        """A buffer [1, H_kv, capacity, D] with the new tokens' keys or values in their slots."""
        tokens = token_by_token(new).transpose(1, 0, 2)[None]  # [1, H_kv, N, D]
        if buffer is None:
            buffer = mx.zeros((1, tokens.shape[1], self.capacity, tokens.shape[3]), new.dtype)
        buffer[:, :, self._write] = tokens
        return buffer

    def gathered(self, buffer: mx.array) -> mx.array:
        """What the rows see of a buffer, [B, H_kv, S, D]."""
        _, H, _, D = buffer.shape
        rows = mx.take(buffer[0], self._gather, axis=1)
        return rows.reshape(H, *self._seen.shape, D).transpose(1, 0, 2, 3)

    def keep_hidden(self, hidden: mx.array) -> None:
        """Keep what the layers made of the planned pass's tokens, [N, D]."""
        if self._hidden is None:
            self._hidden = mx.zeros((self.capacity, hidden.shape[1]), hidden.dtype)
        self._hidden[self._write] = hidden

    def hidden(self, slots: np.ndarray) -> mx.array:
        """What the layers made of the tokens in these slots, [n, D]."""
        assert self._hidden is not None
        return self._hidden[mx.array(slots.astype(np.int32))]
