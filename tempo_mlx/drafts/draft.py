"""A tree of drafted tokens, and how wide it should be.

A pass over m tokens costs c(m) passes over one. A draft of n tokens, each accepted with
probability q_i, yields 1 + sum of q_i tokens in a pass that costs c(n + 1). A token is accepted
only if the tokens before it are, so the q_i fall along every path, and taking them from the
largest down always gives a tree. The tree that maximises tokens over cost is drafted, or none
where nothing gains enough.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np

#: Expected speed-up from which drafting is worth its own overhead.
LEAST_GAIN = 1.05

#: A path less probable than this is not drafted any further.
LEAST_CHANCE = 0.02

#: Tokens that one pass drafts at most.
MOST_DRAFTED = 64

#: No parent: the token follows the text itself.
TEXT = -1


@dataclass(frozen=True)
class Candidate:
    """A token that may come next at some place of a source.

    Args:
        token: id.
        chance: probability that it comes next, estimated from how the source did so far.
        place: of the source, once this token has come.
    """

    token: int
    chance: float
    place: Any


class Source(Protocol):
    """Something that guesses what follows a text, and learns from what did follow."""

    def append(self, token: int, alone: bool = True) -> None:
        """Take note of the token that follows the text, and of how well it was guessed.

        Args:
            token: id.
            alone: whether it is all that follows; a guess of one of several tokens was wrong.
        """

    def begin(self) -> Any:
        """The place at the end of the text."""

    def candidates(self, place: Any) -> Sequence[Candidate]:
        """What may follow a place, most probable first; the chances sum to at most 1."""


@dataclass(frozen=True, eq=False)
class Draft:
    """Drafted tokens that form a tree below the end of a text.

    Args:
        tokens: ids, [n], every token after its parent.
        parents: place of the token before, or :data:`TEXT`, [n].
        chances: estimated probability that a token is accepted with all before it, [n].
    """

    tokens: np.ndarray
    parents: np.ndarray
    chances: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> np.ndarray:
        """Tokens on the path to each token, itself included, [n]."""
        depths = np.ones(len(self), np.int64)
        for i, parent in enumerate(self.parents.tolist()):
            if parent != TEXT:
                depths[i] = depths[parent] + 1
        return depths

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return bool((self.parents == np.arange(-1, len(self) - 1)).all())

    def sees(self) -> np.ndarray:
        """Which drafted tokens each one follows, itself included, booleans [n, n]."""
        seen = np.eye(len(self), dtype=bool)
        for i, parent in enumerate(self.parents.tolist()):
            if parent != TEXT:
                seen[i] |= seen[parent]
        return seen

    def path(self, place: int) -> list[int]:
        """Ids on the path to a token, itself included."""
        ids: list[int] = []
        while place != TEXT:
            ids.append(int(self.tokens[place]))
            place = int(self.parents[place])
        return ids[::-1]

    def child(self, place: int, token: int) -> int | None:
        """The place of a token that follows a place or :data:`TEXT`; None if it was not drafted."""
        found = np.flatnonzero((self.parents == place) & (self.tokens == token))
        return int(found[0]) if len(found) else None


class Drafter:
    """What guesses how one text goes on.

    Args:
        sources: each knows the text so far.
        most: tokens drafted for one pass at most.
    """

    def __init__(self, sources: Sequence[Source], most: int = MOST_DRAFTED):
        self.sources = list(sources)
        self.most = most

    def append(self, token: int, alone: bool = True) -> None:
        """Take note of the token that follows, alone or as the first of a set."""
        for source in self.sources:
            source.append(token, alone)

    def begin(self) -> list[tuple[Source, Any]]:
        """Every source's place at the end of the text."""
        return [(source, source.begin()) for source in self.sources]

    def expects(self, cost: Callable[[int], float]) -> bool:
        """Whether a draft is likely to be worth it after the next token, whichever that is."""
        best = max(_children(self.begin()), key=lambda c: c.chance, default=None)
        if best is None:
            return False
        ahead = _grown([best.places], [self.most], [self.most], 1, cost)[0]
        return best.chance * (1 + ahead.chances.sum()) / cost(1 + len(ahead)) > 1


@dataclass(frozen=True)
class _Child:
    """A token that sources agree on: the highest of their chances, and where each of them is."""

    token: int
    chance: float
    places: list[tuple[Source, Any]]


def _children(places: list[tuple[Source, Any]]) -> list[_Child]:
    found: dict[int, _Child] = {}
    for source, place in places:
        for candidate in source.candidates(place):
            known = found.get(candidate.token)
            after = [*(known.places if known else []), (source, candidate.place)]
            chance = max(candidate.chance, known.chance if known else 0.0)
            found[candidate.token] = _Child(candidate.token, chance, after)
    return list(found.values())


def plan(
    drafters: Sequence[Drafter | None],
    rows: int,
    cost: Callable[[int], float],
    steps: Sequence[int],
) -> list[Draft | None]:
    """The drafts of the texts that take a pass together.

    Args:
        drafters: of each text; None drafts nothing.
        rows: tokens that the pass reads in any case, at least 1.
        cost: tokens of a pass -> its time.
        steps: that each text may take behind the set that is read: no draft is deeper.

    Returns:
        the draft of each text, None where it has none.
    """
    roots = [[] if drafter is None else drafter.begin() for drafter in drafters]
    most = [0 if drafter is None else drafter.most for drafter in drafters]
    grown = _grown(roots, most, steps, rows, cost)
    return [draft if len(draft) else None for draft in grown]


def _grown(
    roots: Sequence[list[tuple[Source, Any]]],
    most: Sequence[int],
    deepest: Sequence[int],
    rows: int,
    cost: Callable[[int], float],
) -> list[Draft]:
    """Grow the trees of all texts best first, and cut them where tokens over cost is highest."""
    order = count()
    heap: list[tuple[float, int, int, int, int, _Child]] = []

    def push(text: int, parent: int, depth: int, chance: float, places: Any) -> None:
        if depth > deepest[text]:
            return
        for child in _children(places):
            reached = chance * child.chance
            if reached >= LEAST_CHANCE:
                heapq.heappush(heap, (-reached, next(order), text, parent, depth, child))

    for text, places in enumerate(roots):
        push(text, TEXT, 1, 1.0, places)
    sizes = [0] * len(roots)
    taken: list[tuple[int, int, int, float]] = []  # text, token, parent, chance
    # Every text that takes part yields a token in any case.
    expected = float(max(1, len(roots)))
    without = expected / cost(rows)
    best, best_at = without * LEAST_GAIN, 0
    while heap and len(taken) < MOST_DRAFTED:
        negative, _, text, parent, depth, child = heapq.heappop(heap)
        if sizes[text] == most[text]:
            continue
        taken.append((text, child.token, parent, -negative))
        expected -= negative
        rate = expected / cost(rows + len(taken))
        if rate > best:
            best, best_at = rate, len(taken)
        push(text, sizes[text], depth + 1, -negative, child.places)
        sizes[text] += 1
    drafts = []
    for text in range(len(roots)):
        own = [entry[1:] for entry in taken[:best_at] if entry[0] == text]
        drafts.append(_by_paths(own))
    return drafts


def _by_paths(taken: list[tuple[int, int, float]]) -> Draft:
    """The draft of (token, parent, chance), path by path, the most probable one first.

    So what is accepted is mostly a beginning of what was appended.
    """
    children: dict[int, list[int]] = {}
    for i, (_, parent, _) in enumerate(taken):
        children.setdefault(parent, []).append(i)
    order: list[int] = []
    stack = children.get(TEXT, [])[::-1]
    while stack:
        i = stack.pop()
        order.append(i)
        stack += children.get(i, [])[::-1]
    places = {TEXT: TEXT} | {old: new for new, old in enumerate(order)}
    return Draft(
        np.array([taken[i][0] for i in order], np.int64),
        np.array([places[taken[i][1]] for i in order], np.int64),
        np.array([taken[i][2] for i in order], np.float64),
    )
