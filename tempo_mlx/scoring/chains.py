"""How new slots are divided into forward passes where layers are recurrent.

A token is read from the state that the one before it has left. A pass reads tokens that start from
different states; or chunks of equally many tokens, of which each continues the one before, and only
a chunk's last token has a state then. So texts are cut into chains: where they branch, and where
later texts are likely to go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..models.states import NONE
from .passes import Segment, passes
from .prefix_tree import PrefixTree

#: Most slots that are put together for the chunks of a pass, where each has a copy of its own.
GATHERED_SLOTS = 1 << 15

#: Part of the states that there is room for, of which a pass may hold copies.
COPIED_STATES = 1 / 4


@dataclass
class Chain:
    """Slots that are still to be read, of which each continues the one before.

    Args:
        slots: at least 1.
        before: the slot that the first one continues; NONE at the beginning of a text.
        source: place of the state that the first one starts from, NONE at the beginning of a text.
        target: place of the state that is left.
        length: slots of the text up to the chain's last one.
    """

    slots: list[int]
    before: int
    source: int
    target: int
    length: int

    def advance(self, n: int) -> None:
        """The first n slots were read."""
        self.before, self.source = self.slots[n - 1], self.target
        self.slots = self.slots[n:]


def chains(segments: Sequence[Segment], marks: Iterable[int], trie: PrefixTree) -> list[Chain]:
    """Cut new slots into chains, at ``marks`` and where a segment begins behind them."""
    new = {slot for segment in segments for slot in segment.slots}
    before = [int(trie.parent[segment.slots[0]]) for segment in segments]
    # First what is there: all the rest may take the places of what was used longest ago.
    places = {slot: trie.states.use(slot) for slot in before if slot != NONE and slot not in new}
    places[NONE] = NONE
    cuts = {*before, *marks}
    found = []
    for segment, slot_before in zip(segments, before, strict=True):
        slots, length = segment.slots, segment.length - len(segment.slots)
        ends = [i for i, slot in enumerate(slots, 1) if slot in cuts or i == len(slots)]
        for start, end in zip([0, *ends], ends, strict=False):
            last = slots[end - 1]
            source, places[last] = places[slot_before], trie.states.add(last)
            chain = slots[start:end], slot_before, source, places[last], length + end
            found.append(Chain(*chain))
            slot_before = last
    return found


def chain_passes(
    found: list[Chain], trie: PrefixTree, chunk_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Divide chains into forward passes.

    Each pass reads equally many tokens of some of the chains that can go on, so many that it reads
    the most tokens that a pass can read now.

    Args:
        found: chains whose texts share much stand side by side.
        trie: what their slots and states belong to.
        chunk_size: tokens of a pass.

    Yields:
        slots [N] and their rows [N], row by row; and of each token or chunk the places of the state
        that it starts from and of the one that it leaves, [R].
    """
    most_states = max(1, int(trie.states.limit * COPIED_STATES))
    while found:
        unread = {chain.slots[-1] for chain in found}
        ready = [chain for chain in found if chain.before not in unread]
        # The rows of a pass start from states, or none of them does.
        ready = [chain for chain in ready if chain.source == NONE] or ready
        n, batch = _most(ready, chunk_size, most_states)
        if n > 1:
            yield _chunks(batch, n)
        else:
            yield from _single_tokens(batch, trie, chunk_size)
        for chain in batch:
            chain.advance(n)
        found = [chain for chain in found if chain.slots]


def _most(ready: list[Chain], chunk_size: int, most_states: int) -> tuple[int, list[Chain]]:
    """How many tokens to read of each of which chains, so that they are most in all."""
    lengths = np.minimum([len(chain.slots) for chain in ready], chunk_size)
    steps = np.unique([1, *lengths])
    counts = len(lengths) - np.searchsorted(np.sort(lengths), steps)
    # Single tokens share a row with those that see the same slots.
    gathered = GATHERED_SLOTS // max(chain.length for chain in ready)
    room = np.where(steps > 1, np.minimum(chunk_size // steps, gathered), chunk_size)
    counts = np.minimum(counts, np.clip(room, 1, most_states))
    best = int(np.argmax(counts * steps))
    enough = [chain for chain, n in zip(ready, lengths, strict=True) if n >= steps[best]]
    return int(steps[best]), enough[: counts[best]]


def _chunks(batch: list[Chain], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The next n tokens of each chain, in a row of its own."""
    slots = np.array([chain.slots[:n] for chain in batch]).reshape(-1)
    return slots, np.repeat(np.arange(len(batch)), n), *_states(batch)


def _single_tokens(
    batch: list[Chain], trie: PrefixTree, chunk_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The next token of each chain."""
    first = np.array([chain.slots[0] for chain in batch])
    lengths = (trie.depth[first] + 1).tolist()
    shared = [0, *trie.shared(first)]
    segments = [Segment([s], n, m) for s, n, m in zip(first.tolist(), lengths, shared, strict=True)]
    done = 0
    for slots, rows in passes(segments, chunk_size):
        yield slots, rows, *_states(batch[done : done + len(slots)])
        done += len(slots)


def _states(batch: list[Chain]) -> tuple[np.ndarray, np.ndarray]:
    sources = np.array([chain.source for chain in batch])
    return sources, np.array([chain.target for chain in batch])
