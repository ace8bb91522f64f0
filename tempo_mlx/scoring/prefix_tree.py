"""Texts as paths in one tree of tokens, whose nodes are the slots of a pool."""

from collections.abc import Sequence

import numpy as np

from .state_places import StatePlaces

#: Parent of a text's first token.
NONE = -1


class PrefixTree:
    """A trie over token ids; each node holds a slot, and nodes can be dropped.

    Args:
        limit: nodes at most, at least 1.
        n_states: nodes with a recurrent state at most.
    """

    def __init__(self, limit: int, n_states: int = 0):
        self.limit = limit
        #: the nodes that have a state
        self.states = StatePlaces(n_states)
        #: of each slot: the slot before it, its place in its texts, and when it was used last
        self.parent = np.zeros(0, np.int64)
        self.depth = np.zeros(0, np.int64)
        self.used = np.zeros(0, np.int64)
        self.token = np.zeros(0, np.int64)
        #: slots that were ever in use, the first of all
        self.size = 0
        #: advances by 1 with each part of the work; what the current part uses is never dropped
        self.clock = 0
        self.dropped = 0
        self._children: dict[tuple[int, int], int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Nodes."""
        return len(self._children)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Slots of the longest beginning of a text that is known, now in use."""
        found, node = [], NONE
        for token in tokens:
            child = self._children.get((node, token))
            if child is None:
                break
            found.append(child)
            node = child
        self.used[found] = self.clock
        return found

    def extend(self, path: list[int], tokens: Sequence[int]) -> list[int] | None:
        """Add the tokens behind a known path; returns their slots, None if there is no room.

        Room is made by dropping what was used longest ago, ends of texts first.
        """
        n = len(tokens)
        missing = n - len(self._free) - (self.limit - self.size)
        if missing > 0 and not self._drop(missing):
            return None
        slots = [self._free.pop() for _ in range(min(n, len(self._free)))]
        fresh = n - len(slots)
        slots += range(self.size, self.size + fresh)
        self.size += fresh
        self._widen(self.size)
        node = path[-1] if path else NONE
        for depth, (token, slot) in enumerate(zip(tokens, slots, strict=True), len(path)):
            self._children[node, token] = slot
            self.parent[slot], self.depth[slot], self.token[slot] = node, depth, token
            node = slot
        self.used[slots] = self.clock
        return slots

    def chains(self, slots: np.ndarray) -> np.ndarray:
        """Each slot and what precedes it in its text, [n, longest], -1 where there is no more."""
        columns = [slots]
        while True:
            last = columns[-1]
            before = np.where(last == NONE, NONE, self.parent[last])
            if (before == NONE).all():
                return np.stack(columns, axis=1)
            columns.append(before)

    def shared(self, slots: np.ndarray) -> np.ndarray:
        """Of each slot but the first: how many of its text's slots the one before it has, too."""
        chains, depth = self.chains(slots), self.depth[slots]
        paths = np.full(chains.shape, NONE)
        node, back = np.nonzero(chains != NONE)
        paths[node, depth[node] - back] = chains[node, back]
        same = (paths[1:] == paths[:-1]) & (paths[1:] != NONE)
        return np.logical_and.accumulate(same, axis=1).sum(axis=1)

    def clear(self) -> None:
        """Drop all nodes."""
        self.states.clear()
        self._children.clear()
        self._free, self.size = [], 0
        self.parent = self.depth = self.used = self.token = np.zeros(0, np.int64)

    def _drop(self, n: int) -> bool:
        """Drop at least n nodes that the current part does not use; False if there are not."""
        alive = np.fromiter(self._children.values(), np.int64, len(self._children))
        old = alive[self.used[alive] < self.clock]
        if len(old) < n:
            return False
        # A node is used whenever one behind it is, so this order has every node behind its own.
        order = np.lexsort((-self.depth[old], self.used[old]))
        # More than needed, so that the order is made once for many.
        gone = old[order[: max(n, len(old) // 8)]]
        for node, token, slot in zip(
            self.parent[gone].tolist(), self.token[gone].tolist(), gone.tolist(), strict=True
        ):
            del self._children[node, token]
            self._free.append(slot)
        self.states.remove(gone.tolist())
        self.dropped += len(gone)
        return True

    def _widen(self, needed: int) -> None:
        more = max(needed, 2 * len(self.parent)) - len(self.parent)
        if needed > len(self.parent):
            for name in ("parent", "depth", "used", "token"):
                setattr(self, name, np.append(getattr(self, name), np.zeros(more, np.int64)))


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first entries two lists share."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
