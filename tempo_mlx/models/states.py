"""States of recurrent layers: one for each token that can still be continued.

A recurrent layer sums up all that was read in arrays of a fixed size. Where texts branch, each
branch has its own: before a step the states of the tokens' parents are gathered, the rows of the
step advance them, and what they make of them belongs to the new tokens.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

#: Place of a token that has no state.
NONE = -1


@dataclass(frozen=True)
class States:
    """What a recurrent layer keeps.

    Args:
        n_arrays: arrays, each of one size however long the text is.
        n_ids: its array is the ids of that many last tokens, 0 in front of a text; 0 if it is not.
    """

    n_arrays: int
    n_ids: int = 0

    def beginning(self, n: int) -> list[Any]:
        """The state of n texts that begin. mlx-lm knows None, and lets ids fill up their array."""
        if self.n_ids:
            return [mx.zeros((n, self.n_ids), mx.int64)]
        return [None] * self.n_arrays


class RecurrentLayer(ArraysCache):
    """What a recurrent layer reads and writes during a pass."""

    def __init__(self, kind: States):
        super().__init__(kind.n_arrays)
        self.kind = kind


class BranchStates:
    """The states of all recurrent layers, numbered by places.

    A state is never changed, so that several tokens may name one place.

    Args:
        layers: the model's recurrent layers.
    """

    def __init__(self, layers: list[RecurrentLayer]):
        self._layers = layers
        #: of each layer its arrays, [capacity, ..]; None before the first pass
        self._arrays: list[list[mx.array | None]] = [[None] * len(x.cache) for x in layers]
        #: places that are in use or were, the first of all
        self.used = 0
        self.capacity = 0
        #: places that there may be room for, where that is less than twice those in use
        self.limit: int | None = None

    def __bool__(self) -> bool:
        """Whether the model has recurrent layers."""
        return bool(self._layers)

    @property
    def n_arrays(self) -> int:
        """Arrays of all layers."""
        return sum(map(len, self._arrays))

    @property
    def state(self) -> list[mx.array]:
        """All arrays."""
        return [array for arrays in self._arrays for array in arrays if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, room for more included."""
        return sum(array.nbytes for array in self.state)

    def load(self, places: np.ndarray) -> None:
        """Give the layers the states of a pass's rows: places [R], or all NONE for none yet."""
        index = None if (places == NONE).all() else mx.array(places.astype(np.int32))
        whole = np.array_equal(places, np.arange(self.capacity))
        for layer, arrays in zip(self._layers, self._arrays, strict=True):
            if index is None:
                layer.cache = layer.kind.beginning(len(places))
            else:
                layer.cache = [x if x is None or whole else x[index] for x in arrays]  # type: ignore[misc]
            layer.lengths = layer.left_padding = None

    def store(self, n: int, live: np.ndarray) -> tuple[np.ndarray, int]:
        """Take the states that the pass made of its n rows.

        Args:
            n: rows of the pass.
            live: places that are still needed, in ascending order.

        Returns:
            the new place of each of the ``live`` ones, and the first place of the rows.
        """
        if not len(live):
            self._arrays = [list(layer.cache) for layer in self._layers]
            self.release_layers()
            self.used = self.capacity = n
            return live, 0
        first = self.used
        moved = live
        if first + n > self.capacity:
            # What is not needed goes when room is made for more.
            moved, first = np.arange(len(live)), len(live)
            room = 2 * len(live) if self.limit is None else min(2 * len(live), self.limit)
            self._move(live, max(len(live) + n, room))
        self._write(slice(first, first + n))
        self.used = first + n
        return moved, first

    def put(self, places: np.ndarray, limit: int) -> None:
        """Take the states that the pass made of its rows to these places, [R], below ``limit``."""
        self.used = max(self.used, int(places.max()) + 1)
        if self.used > self.capacity:
            held = np.arange(self.capacity)
            self._move(held, max(self.used, min(limit, 2 * self.capacity)))
            mx.eval(self.state)
        self._write(mx.array(places.astype(np.int32)))

    def keep(self, live: np.ndarray) -> None:
        """Let go of all but the places ``live``, which become 0, 1, .."""
        if len(live) < self.capacity:
            self._move(live, len(live))
        self.used = len(live)

    def taken(self, places: np.ndarray) -> list[mx.array | None]:
        """The arrays of these places [n, ..], of all layers one after another."""
        index = mx.array(places.astype(np.int32))
        return [x if x is None else x[index] for arrays in self._arrays for x in arrays]

    def give(
        self, given: list[mx.array | None], n: int, live: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """As :meth:`store`, of arrays that :meth:`taken` returned elsewhere."""
        given = list(given)
        for layer in self._layers:
            layer.cache = [given.pop(0) for _ in layer.cache]  # type: ignore[misc]
        return self.store(n, live)

    def _write(self, where: mx.array | slice) -> None:
        for arrays, layer in zip(self._arrays, self._layers, strict=True):
            for entry, new in enumerate(cast(list[mx.array], layer.cache)):
                array = arrays[entry]
                if array is None:
                    array = mx.zeros((self.capacity, *new.shape[1:]), new.dtype)
                array[where] = new
                arrays[entry] = array
        self.release_layers()

    def _move(self, live: np.ndarray, capacity: int) -> None:
        index = mx.array(live.astype(np.int32))
        for arrays in self._arrays:
            for entry, array in enumerate(arrays):
                if array is not None:
                    more = mx.zeros((capacity - len(live), *array.shape[1:]), array.dtype)
                    arrays[entry] = mx.concatenate([array[index], more])
        self.capacity = capacity

    def release_layers(self) -> None:
        """Let go of what the layers were given."""
        for layer in self._layers:
            layer.cache = [None] * len(layer.cache)
