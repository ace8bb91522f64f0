"""Prefixes of texts that have been read, for the prompts that come later and begin with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..models import SlotStore

#: Tokens of a prompt that must be known at least: prompts that share less are read together.
LEAST = 8


@dataclass(eq=False)
class Edge:
    """Tokens that follow each other in every text that has the first of them here.

    Args:
        tokens: at least one.
        slots: one row, the slots of these tokens; a recurrent state at none of them but the last.
        used: when it was last needed.
        after: what follows, by its first token.
    """

    tokens: tuple[int, ...]
    slots: SlotStore
    used: int
    after: dict[int, "Edge"] = field(default_factory=dict)


class PrefixCache:
    """A radix tree over token ids whose edges hold the slots of their tokens.

    What texts have in common is held once. What was not needed for longest is dropped first, ends
    of texts before what they continue.

    Recurrent layers go on from a state only, and states are held where a text that was read ended:
    a prompt is then known up to the last such place.
    """

    def __init__(self) -> None:
        self._first: dict[int, Edge] = {}
        self._clock = 0
        #: bytes of all slots and states
        self.nbytes = 0

    def __len__(self) -> int:
        """Tokens held."""
        return sum(len(edge.tokens) for edge, _ in self._edges(self._first))

    def covers(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens need not be read: 0 or at least :data:`LEAST`.

        The last one must always be read.
        """
        end, known = 0, 0
        for edge, n in self._path(tokens[:-1]):
            end += n
            if not edge.slots.states or (n == len(edge.tokens) and _has_state(edge)):
                known = end
        return known if known >= LEAST else 0

    def first(self, tokens: Sequence[int], n: int) -> SlotStore:
        """A store of one row with the slots of a prompt's first n tokens, as :meth:`covers` said.

        Args:
            tokens: of the prompt.
            n: at least 1.
        """
        self._clock += 1
        path = self._path(tokens[:n])
        for edge, _ in path:
            edge.used = self._clock
        store = path[0][0].slots.extract(0)
        for edge, _ in path[1:]:
            store.adopt(edge.slots, 0, 0)
        if store.n_slots > n:
            store.compact(np.arange(n))
        return store

    def insert(self, tokens: Sequence[int], store: SlotStore, row: int, slots: np.ndarray) -> None:
        """Hold a text that has been read.

        Args:
            tokens: of the text; none is allowed.
            store: what read it.
            row: of the store.
            slots: of the tokens, in their order.
        """
        self._clock += 1
        after, done = self._first, 0
        last: Edge | None = None
        while done < len(tokens):
            edge = after.get(tokens[done])
            if edge is None:
                held = _held(store, row, slots[done:])
                edge = Edge(tuple(tokens[done:]), held, self._clock)
                self.nbytes += held.nbytes
                after[tokens[done]] = edge
                return
            n = _shared(edge.tokens, tokens[done:])
            if n < len(edge.tokens):
                edge = self._split(edge, n, after)
            edge.used = self._clock
            last, after, done = edge, edge.after, done + n
        if last is not None and last.slots.states and not _has_state(last):
            self._replace(last, _held(store, row, slots[done - len(last.tokens) :]))

    def shrink(self, most: int) -> None:
        """Drop what was not needed for longest until at most so many bytes are held."""
        while self._first and self.nbytes > most:
            ends = [(e, around) for e, around in self._edges(self._first) if not e.after]
            edge, around = min(ends, key=lambda end: end[0].used)
            del around[edge.tokens[0]]
            self.nbytes -= edge.slots.nbytes

    def _path(self, tokens: Sequence[int]) -> list[tuple[Edge, int]]:
        """The edges along a text, each with how many of its tokens the text has."""
        found: list[tuple[Edge, int]] = []
        after, done = self._first, 0
        while done < len(tokens) and (edge := after.get(tokens[done])) is not None:
            n = _shared(edge.tokens, tokens[done:])
            found.append((edge, n))
            if n < len(edge.tokens):
                break
            after, done = edge.after, done + n
        return found

    def _split(self, edge: Edge, n: int, around: dict[int, Edge]) -> Edge:
        """Let an edge end behind its first n tokens; another one goes on from there."""
        rest = np.arange(n, len(edge.tokens))
        behind = Edge(edge.tokens[n:], _held(edge.slots, 0, rest), edge.used, edge.after)
        before = Edge(edge.tokens[:n], _held(edge.slots, 0, np.arange(n)), edge.used)
        before.after[behind.tokens[0]] = behind
        around[before.tokens[0]] = before
        self.nbytes += before.slots.nbytes + behind.slots.nbytes - edge.slots.nbytes
        return before

    def _replace(self, edge: Edge, slots: SlotStore) -> None:
        self.nbytes += slots.nbytes - edge.slots.nbytes
        edge.slots = slots

    def _edges(self, after: dict[int, Edge]) -> Iterator[tuple[Edge, dict[int, Edge]]]:
        """All edges, each with the edges that begin where it does."""
        waiting = [after]
        while waiting:
            around = waiting.pop()
            for edge in list(around.values()):
                yield edge, around
                waiting.append(edge.after)


def _has_state(edge: Edge) -> bool:
    return bool(edge.slots.has_state(np.array([len(edge.tokens) - 1]))[0])


def _held(store: SlotStore, row: int, slots: np.ndarray) -> SlotStore:
    """A store of its own with these slots of a row, evaluated."""
    alone = store.extract(row)
    alone.compact(slots)
    if alone.states:
        alone.drop_states(np.arange(alone.n_slots - 1))
        alone.compact(np.arange(alone.n_slots))
    mx.eval(alone.state)
    return alone


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first tokens two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
