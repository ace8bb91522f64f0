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

    def fit(self, n: int) -> bool:
        """Whether there is room for n states more."""
        return self.used + n <= self.capacity

    def keep(self, live: np.ndarray, n: int = 0) -> None:
        """Let go of all but the places ``live``, ascending, which become 0, 1, ..; and have room
        for n more."""
        self.used = len(live)
        if not len(live):
            self._arrays = [[None] * len(arrays) for arrays in self._arrays]
            self.capacity = 0
        elif n:
            room = 2 * len(live) if self.limit is None else min(2 * len(live), self.limit)
            self._move(live, max(len(live) + n, room))
        elif len(live) < self.capacity:
            self._move(live, len(live))

    def store(self, n: int) -> int:
        """Take the states that a pass made of its n rows, for which there is room; or the first
        ones. Returns the place of the first row; the others follow it."""
        first = self.used
        self.used += n
        if self.capacity:
            self._write(slice(first, self.used))
            return first
        self._arrays = [list(layer.cache) for layer in self._layers]
        self.release_layers()
        self.capacity = n
        return 0

    def taken(self, places: np.ndarray) -> list[mx.array | None]:
        """The arrays of these places [n, ..], of all layers one after another."""
        index = mx.array(places.astype(np.int32))
        return [x if x is None else x[index] for arrays in self._arrays for x in arrays]

    def give(self, given: list[mx.array | None], n: int) -> int:
        """As :meth:`store`, of arrays that :meth:`taken` returned elsewhere."""
        given = list(given)
        for layer in self._layers:
            layer.cache = [given.pop(0) for _ in layer.cache]  # type: ignore[misc]
        return self.store(n)

    def _write(self, where: slice) -> None:
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
