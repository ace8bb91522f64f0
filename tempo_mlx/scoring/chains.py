"""How new nodes are divided into forward passes where layers are recurrent.

A token is read from the state that the one before it has left. A pass reads tokens that start from
different states; or chunks of equally many tokens, of which each continues the one before, and only
a chunk's last token has a state then. So texts are cut into chains: where they branch, and where
later texts are likely to go on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .passes import Segment, passes
from .prefix_tree import NONE, PrefixTree

#: Most slots that are put together for the chunks of a pass, where each has a copy of its own.
GATHERED_SLOTS = 1 << 15

#: Part of the states that there is room for, of which a pass may hold copies.
COPIED_STATES = 1 / 4


@dataclass
class Chain:
    """Nodes that are still to be read, of which each continues the one before.

    Args:
        nodes: at least 1.
        before: the node that the first one continues; NONE at the beginning of a text.
        length: nodes of the text up to the chain's last one.
        is_begun: whether part of it was read; only its last node keeps its state.
    """

    nodes: list[int]
    before: int
    length: int
    is_begun: bool = False

    def advance(self, n: int) -> None:
        """The first n nodes were read."""
        self.before, self.is_begun = self.nodes[n - 1], True
        self.nodes = self.nodes[n:]


def chains(segments: Sequence[Segment], marks: Iterable[int], trie: PrefixTree) -> list[Chain]:
    """Cut new nodes into chains, at ``marks`` and where a segment begins behind them."""
    before = [int(trie.parent[segment.nodes[0]]) for segment in segments]
    cuts = {*before, *marks}
    found = []
    for segment, node_before in zip(segments, before, strict=True):
        nodes, length = segment.nodes, segment.length - len(segment.nodes)
        ends = [i for i, node in enumerate(nodes, 1) if node in cuts or i == len(nodes)]
        for start, end in zip([0, *ends], ends, strict=False):
            found.append(Chain(nodes[start:end], node_before, length + end))
            node_before = nodes[end - 1]
    trie.make_room_for_states(len(found), before)
    return found


def chain_passes(
    found: list[Chain], trie: PrefixTree, chunk_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide chains into forward passes.

    Each pass reads equally many tokens of some of the chains that can go on, so many that it reads
    the most tokens that a pass can read now. States inside chains are dropped.

    Args:
        found: chains whose texts share much stand side by side.
        trie: what their nodes belong to.
        chunk_size: tokens of a pass.

    Yields:
        nodes [N] and their rows [N], row by row.
    """
    most_states = max(1, int(trie.n_states * COPIED_STATES))
    while found:
        unread = {chain.nodes[-1] for chain in found}
        ready = [chain for chain in found if chain.before not in unread]
        # The rows of a pass start from states, or none of them does.
        ready = [chain for chain in ready if chain.before == NONE] or ready
        n, batch = _most(ready, chunk_size, most_states)
        for part, nodes, rows in _chunks(batch, n) if n > 1 else _single(batch, trie, chunk_size):
            trie.spent = [chain.before for chain in part if chain.is_begun]
            yield nodes, rows
        for chain in batch:
            chain.advance(n)
        found = [chain for chain in found if chain.nodes]


def _most(ready: list[Chain], chunk_size: int, most_states: int) -> tuple[int, list[Chain]]:
    """How many tokens to read of each of which chains, so that they are most in all."""
    lengths = np.minimum([len(chain.nodes) for chain in ready], chunk_size)
    steps = np.unique([1, *lengths])
    counts = len(lengths) - np.searchsorted(np.sort(lengths), steps)
    # Single tokens share a row with those that see the same slots.
    gathered = GATHERED_SLOTS // max(chain.length for chain in ready)
    room = np.where(steps > 1, np.minimum(chunk_size // steps, gathered), chunk_size)
    counts = np.minimum(counts, np.clip(room, 1, most_states))
    best = int(np.argmax(counts * steps))
    enough = [chain for chain, n in zip(ready, lengths, strict=True) if n >= steps[best]]
    return int(steps[best]), enough[: counts[best]]


def _chunks(batch: list[Chain], n: int) -> Iterator[tuple[list[Chain], np.ndarray, np.ndarray]]:
    """The next n tokens of each chain, one row a chain."""
    nodes = np.array([chain.nodes[:n] for chain in batch]).reshape(-1)
    yield batch, nodes, np.repeat(np.arange(len(batch)), n)


def _single(
    batch: list[Chain], trie: PrefixTree, chunk_size: int
) -> Iterator[tuple[list[Chain], np.ndarray, np.ndarray]]:
    """The next token of each chain."""
    first = np.array([chain.nodes[0] for chain in batch])
    lengths = (trie.depth[first] + 1).tolist()
    shared = [0, *trie.shared(first)]
    segments = [Segment([s], n, m) for s, n, m in zip(first.tolist(), lengths, shared, strict=True)]
    done = 0
    for nodes, rows in passes(segments, chunk_size):
        yield batch[done : done + len(nodes)], nodes, rows
        done += len(nodes)
