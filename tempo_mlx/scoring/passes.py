"""How the new nodes of a trie are divided into forward passes and rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Pairs of tokens and slots up to which it does not matter how many of them see each other.
SMALL_AREA = 4096

#: How much larger the attention of texts in one row may be than that of each alone.
SHARED_AREA = 1.5

#: How much of a batch's attention may be padding, as a multiple of what is not.
PADDED_AREA = 4


@dataclass(frozen=True)
class Segment:
    """New nodes of one text: they follow each other, behind nodes that were there.

    ``length`` counts the text's nodes, ``shared`` those that the segment before has, too.
    """

    nodes: list[int]
    length: int
    shared: int


def passes(segments: list[Segment], chunk_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide new nodes into forward passes, and each pass into rows.

    Texts share a row while that makes their attention, of T tokens on S slots, not much larger
    than it is for each alone.

    Yields:
        nodes [N] and their rows [N], row by row.
    """
    rows: list[tuple[list[int], int]] = []  # slots, and how many they see
    alone = 0
    for segment in segments:
        area = len(segment.nodes) * segment.length
        if rows:
            slots, sees = rows[-1]
            sees += segment.length - segment.shared
            together = (len(slots) + len(segment.nodes)) * sees
            if together <= max(SMALL_AREA, SHARED_AREA * (alone + area)):
                rows[-1] = slots + segment.nodes, sees
                alone += area
                continue
        rows.append((list(segment.nodes), segment.length))
        alone = area
    batch: list[tuple[list[int], int]] = []
    for slots, sees in rows:
        for start in range(0, len(slots), chunk_size):
            row = slots[start : start + chunk_size], sees
            if batch and not _fit([*batch, row], chunk_size):
                yield _side_by_side(batch)
                batch = []
            batch.append(row)
    if batch:
        yield _side_by_side(batch)


def _fit(batch: list[tuple[list[int], int]], chunk_size: int) -> bool:
    """Whether rows go together: not too many tokens, not too much padding."""
    widths = [len(slots) for slots, _ in batch]
    area = sum(len(slots) * sees for slots, sees in batch)
    padded = len(batch) * max(widths) * max(sees for _, sees in batch)
    return sum(widths) <= chunk_size and padded <= max(16 * SMALL_AREA, PADDED_AREA * area)


def _side_by_side(batch: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    slots = np.concatenate([np.array(slots, np.int64) for slots, _ in batch])
    return slots, np.repeat(np.arange(len(batch)), [len(slots) for slots, _ in batch])


def visible(chains: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each row has to hold, and what each of its tokens sees of that.

    Args:
        chains: the slots that each token sees, [N, longest], -1 where there is no more.
        rows: the row of each token, [N].

    Returns:
        slots of each row, [B, S]; where a row has fewer it names one of them again. And the mask
        [N, S], True where a token sees the slot at that place of its row.
    """
    N, B, P = len(rows), int(rows.max()) + 1, int(chains.max()) + 1
    token, _ = present = np.nonzero(chains >= 0)
    named, place = np.unique(rows[token] * P + chains[present], return_inverse=True)
    row, slot = named // P, named % P
    first = np.searchsorted(row, np.arange(B))
    S = int(np.bincount(row).max())
    seen = np.repeat(slot[first][:, None], S, axis=1)
    seen[row, np.arange(len(named)) - first[row]] = slot
    mask = np.zeros((N, S), bool)
    mask[token, place - first[rows[token]]] = True
    return seen, mask
