"""Which nodes of a trie have a recurrent state, and where."""

from collections import OrderedDict
from collections.abc import Iterable


class StatePlaces:
    """Places of the states that nodes have; the state used longest ago makes room.

    Args:
        limit: states at most; 0 where the model has none.
    """

    def __init__(self, limit: int):
        self.limit = limit
        # of each node its place; the one used longest ago comes first
        self._places: OrderedDict[int, int] = OrderedDict()
        self._free: list[int] = []
        self._size = 0

    def __len__(self) -> int:
        """States."""
        return len(self._places)

    def __contains__(self, slot: int) -> bool:
        """Whether a node has a state, or a place for the one that it is about to have."""
        return slot in self._places

    def use(self, slot: int) -> int:
        """The place of a node's state, now in use."""
        self._places.move_to_end(slot)
        return self._places[slot]

    def add(self, slot: int) -> int:
        """A place for the state of a node that has none, now in use."""
        if self._free:
            place = self._free.pop()
        elif self._size < self.limit:
            place = self._size
            self._size += 1
        else:
            _, place = self._places.popitem(last=False)
        self._places[slot] = place
        return place

    def remove(self, slots: Iterable[int]) -> None:
        """Free the places of these nodes, of those that have one."""
        for slot in slots:
            place = self._places.pop(slot, None)
            if place is not None:
                self._free.append(place)

    def clear(self) -> None:
        """Free all places."""
        self._places.clear()
        self._free, self._size = [], 0
