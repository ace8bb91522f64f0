"""Texts as paths in one tree of tokens, whose nodes have slots in a store."""

from collections.abc import Sequence

import numpy as np

from ..models import SlotStore

#: Parent of a text's first token.
NONE = -1


class PrefixTree:
    """A trie over token ids; nodes can be dropped, and their numbers are used again.

    Args:
        store: of one row; holds what was read.
        limit: nodes at most, at least 1.
        n_states: nodes with a recurrent state at most.
    """

    def __init__(self, store: SlotStore, limit: int, n_states: int = 0):
        self.store, self.limit, self.n_states = store, limit, n_states
        #: of each node: the node before it, its place in its texts, its token, when it was used
        #: last, and its slot in the store, NONE before it was read
        self.parent = np.zeros(0, np.int64)
        self.depth = np.zeros(0, np.int64)
        self.token = np.zeros(0, np.int64)
        self.used = np.zeros(0, np.int64)
        self.slot = np.zeros(0, np.int64)
        #: numbers that were ever in use, the first of all
        self.size = 0
        #: nodes whose states are not needed once the next pass has read them
        self.spent: list[int] = []
        #: advances by 1 with each part of the work; what the current part uses is never dropped
        self.clock = 0
        #: nodes dropped; whoever counts them sets it back to 0
        self.dropped = 0
        self._children: dict[tuple[int, int], int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Nodes."""
        return len(self._children)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Nodes of the longest beginning of a text that is known, now in use."""
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
        """Add the tokens behind a known path; returns their nodes, None if there is no room.

        Room is made by dropping what was used longest ago, ends of texts first.
        """
        n = len(tokens)
        missing = n - len(self._free) - (self.limit - self.size)
        if missing > 0 and not self._drop(missing):
            return None
        nodes = [self._free.pop() for _ in range(min(n, len(self._free)))]
        fresh = n - len(nodes)
        nodes += range(self.size, self.size + fresh)
        self.size += fresh
        self._widen(self.size)
        before = path[-1] if path else NONE
        for depth, (token, node) in enumerate(zip(tokens, nodes, strict=True), len(path)):
            self._children[before, token] = node
            self.parent[node], self.depth[node], self.token[node] = before, depth, token
            before = node
        self.used[nodes], self.slot[nodes] = self.clock, NONE
        return nodes

    def place(self, nodes: np.ndarray) -> None:
        """Give nodes that are about to be read the slots behind the last one, in this order.

        Nodes that are read again, for want of a state, leave the slots that they had.
        """
        self.slot[nodes] = NONE
        store = self.store
        if store.n_slots + len(nodes) > self.limit:
            held = np.flatnonzero(self.slot[: self.size] != NONE)
            held = held[np.argsort(self.slot[held])]
            store.compact(self.slot[held], room=self.limit - len(held))
            self.slot[held] = np.arange(len(held))
        self.slot[nodes] = store.n_slots + np.arange(len(nodes))
        store.spent = self.slot[self.spent]

    def slots_of(self, nodes: np.ndarray) -> np.ndarray:
        """Slots of nodes, :data:`NONE` of none."""
        return np.where(nodes == NONE, NONE, self.slot[nodes])

    def have_states(self, nodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether nodes have recurrent states, [n]."""
        return self.store.has_state(self.slot[nodes])

    def make_room_for_states(self, n: int, sources: Sequence[int]) -> None:
        """Let go of the states of what was used longest ago, so that n more have room.

        Args:
            n: states.
            sources: nodes whose states are needed.
        """
        read = np.flatnonzero(self.slot[: self.size] != NONE)
        held = read[self.have_states(read)]
        excess = len(held) + n - self.n_states
        if excess > 0:
            old = held[~np.isin(held, sources)]
            old = old[np.argsort(self.used[old], kind="stable")]
            # More than needed, so that the order is made once for many.
            self.store.drop_states(self.slot[old[: max(excess, len(old) // 8)]])

    def chains(self, nodes: np.ndarray) -> np.ndarray:
        """Each node and what precedes it in its text, [n, longest], -1 where there is no more."""
        columns = [nodes]
        while True:
            last = columns[-1]
            before = np.where(last == NONE, NONE, self.parent[last])
            if (before == NONE).all():
                return np.stack(columns, axis=1)
            columns.append(before)

    def shared(self, nodes: np.ndarray) -> np.ndarray:
        """Of each node but the first: how many of its text's nodes the one before it has, too."""
        chains, depth = self.chains(nodes), self.depth[nodes]
        paths = np.full(chains.shape, NONE)
        node, back = np.nonzero(chains != NONE)
        paths[node, depth[node] - back] = chains[node, back]
        same = (paths[1:] == paths[:-1]) & (paths[1:] != NONE)
        shared: np.ndarray = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        return shared

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
        for key in zip(self.parent[gone].tolist(), self.token[gone].tolist(), strict=True):
            del self._children[key]
        self._free += gone.tolist()
        if self.n_states:
            self.store.drop_states(self.slot[gone[self.slot[gone] != NONE]])
        self.slot[gone] = NONE
        self.dropped += len(gone)
        return True

    def _widen(self, needed: int) -> None:
        more = max(needed, 2 * len(self.parent)) - len(self.parent)
        if needed > len(self.parent):
            for name in ("parent", "depth", "token", "used", "slot"):
                setattr(self, name, np.append(getattr(self, name), np.zeros(more, np.int64)))


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first entries two lists share."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
