"""Word lattices: the best texts of one, and how a language model scores it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import TempoError
from .rescoring import FEATURES, Hypothesis, NBest, RescoredList, Weights, ranked
from .scorer import ContinuationScorer

#: What a state of a search holds for a state of the lattice: a total and its features [5].
Reached = tuple[float, np.ndarray]

#: Places of the new log-probability and the tokens among the features.
NEW, TOKENS = FEATURES.index("new"), FEATURES.index("tokens")


@dataclass(frozen=True, eq=False)
class Arc:
    """An edge of a lattice.

    Args:
        source, target: states.
        word: "" for none.
        features: what it adds to the :data:`.FEATURES` of a path, [5].
    """

    source: int
    target: int
    word: str
    features: np.ndarray


class WordLattice:
    """Texts that share their parts: paths from a start state to an end state.

    Args:
        start: a state.
        arcs: of an acyclic graph; those that no path takes are dropped.
        ends: state -> what ending there adds to the features, [5].

    Raises:
        TempoError: if the graph has a cycle, or no path.
    """

    def __init__(self, start: int, arcs: Sequence[Arc], ends: dict[int, np.ndarray]):
        self.start, self.ends = start, ends
        leaving: dict[int, list[Arc]] = {}
        for arc in arcs:
            leaving.setdefault(arc.source, []).append(arc)
        #: states that the start reaches, each before those that it leads to
        self.order = _order(start, leaving)
        place = {state: i for i, state in enumerate(self.order)}
        #: number of paths from a state to an end; several may have one text
        self.n_paths: dict[int, int] = {}
        for state in reversed(self.order):
            onward = sum(self.n_paths[arc.target] for arc in leaving.get(state, []))
            self.n_paths[state] = onward + (state in ends)
        if not self.n_paths[start]:
            raise TempoError("no path leads from the lattice's start to its end")
        self._place = place
        self.leaving = {
            state: [arc for arc in leaving.get(state, []) if self.n_paths[arc.target]]
            for state in self.order
            if self.n_paths[state]
        }

    def best_texts(self, factors: np.ndarray, n: int) -> list[tuple[str, np.ndarray]]:
        """The n texts with the highest totals, best first, each with the features of its best path.

        The search is A*: a beginning of texts is a set of lattice states, and what it may still
        come to is known exactly.

        Args:
            factors: of the features in a total, [5].
            n: texts at most, at least 1.
        """
        onward = self._onward(factors)
        counter = 0  # breaks ties
        first = self._closed({self.start: (0.0, np.zeros(len(FEATURES)))}, factors)
        heap: list[tuple[float, int, str, dict[int, Reached] | None, np.ndarray | None]] = [
            (-onward[self.start], 0, "", first, None)
        ]
        found: list[tuple[str, np.ndarray]] = []
        while heap and len(found) < n:
            _, _, text, reached, features = heapq.heappop(heap)
            if reached is None:
                assert features is not None
                found.append((text, features))
                continue
            ended = [
                (total + float(self.ends[state] @ factors), own + self.ends[state])
                for state, (total, own) in reached.items()
                if state in self.ends
            ]
            if ended:
                total, own = max(ended, key=lambda each: each[0])
                counter += 1
                heapq.heappush(heap, (-total, counter, text, None, own))
            following: dict[str, dict[int, Reached]] = {}
            for state, (total, own) in reached.items():
                for arc in self.leaving[state]:
                    if arc.word:
                        _take(following.setdefault(arc.word, {}), arc, total, own, factors)
            for word, states in following.items():
                closed = self._closed(states, factors)
                bound = max(total + onward[state] for state, (total, _) in closed.items())
                counter += 1
                longer = f"{text} {word}" if text else word
                heapq.heappush(heap, (-bound, counter, longer, closed, None))
        return found

    def best_histories(self, factors: np.ndarray) -> dict[int, str]:
        """State -> the text of the best path that leads to it."""
        best: dict[int, tuple[float, str]] = {self.start: (0.0, "")}
        for state in self.leaving_order:
            total, text = best[state]
            for arc in self.leaving[state]:
                reached = total + float(arc.features @ factors)
                if arc.target not in best or reached > best[arc.target][0]:
                    longer = f"{text} {arc.word}".strip() if arc.word else text
                    best[arc.target] = reached, longer
        return {state: text for state, (_, text) in best.items()}

    def content(self) -> list[Any]:
        """All that it holds, JSON-ready."""
        arcs = [
            [arc.source, arc.target, arc.word, arc.features.tolist()]
            for state in self.leaving_order
            for arc in self.leaving[state]
        ]
        ends = sorted((state, own.tolist()) for state, own in self.ends.items())
        return [self.start, arcs, ends]

    @property
    def leaving_order(self) -> list[int]:
        """States that are on a path, each before those that it leads to."""
        return [state for state in self.order if state in self.leaving]

    def _closed(self, reached: dict[int, Reached], factors: np.ndarray) -> dict[int, Reached]:
        """With the states that arcs without words lead to."""
        closed = dict(reached)
        waiting = [self._place[state] for state in reached]
        heapq.heapify(waiting)
        done = -1
        while waiting:
            at = heapq.heappop(waiting)
            if at == done:
                continue
            done, state = at, self.order[at]
            total, own = closed[state]
            for arc in self.leaving[state]:
                if not arc.word:
                    _take(closed, arc, total, own, factors)
                    heapq.heappush(waiting, self._place[arc.target])
        return closed

    def _onward(self, factors: np.ndarray) -> dict[int, float]:
        """State -> the highest total from it to an end."""
        onward: dict[int, float] = {}
        for state in reversed(self.leaving_order):
            totals = [float(a.features @ factors) + onward[a.target] for a in self.leaving[state]]
            if state in self.ends:
                totals.append(float(self.ends[state] @ factors))
            onward[state] = max(totals)
        return onward


def paths_of(utt: str, lattice: WordLattice, weights: Weights, n: int) -> NBest:
    """The n best texts of a lattice by the decoder's own scores; "all_paths" says if that is all.

    Args:
        utt: name of the utterance.
        lattice: whose arcs have no new scores yet.
        weights: the acoustic scale and word bonus count; lm in full.
        n: at least 1.
    """
    found = lattice.best_texts(replace(weights, alpha=0.0, token_penalty=0.0).factors, n + 1)
    hypotheses = [Hypothesis(text, float(f[0]), float(f[1])) for text, f in found[:n]]
    return NBest(utt, hypotheses, given={"all_paths": len(found) <= n})


def rescore_in_one_pass(
    scorer: ContinuationScorer,
    utt: str,
    lattice: WordLattice,
    weights: Weights,
    n: int,
    end: bool | str = True,
) -> RescoredList:
    """An approximation for lattices with more paths than can be read.

    Each word is scored once, behind the best text that leads to its state by the decoder's own
    scores; all paths through a state share that history. A text's new score is the sum along its
    path.

    Args:
        scorer: its weight and bonus do not count.
        utt: name of the utterance.
        lattice: whose arcs have no new scores yet.
        weights: what the parts of a total count.
        n: texts that are returned, at least 1.
        end: whether the end of a text counts, and how it ends.
    """
    histories = lattice.best_histories(replace(weights, alpha=0.0, token_penalty=0.0).factors)
    arcs = [arc for state in lattice.leaving_order for arc in lattice.leaving[state]]
    spoken = [arc for arc in arcs if arc.word]
    scores = iter(
        scorer.score_texts([arc.word for arc in spoken], [histories[arc.source] for arc in spoken])
    )
    scored = []
    for arc in arcs:
        features = arc.features.astype(np.float64)
        if arc.word:
            score = next(scores)
            features[NEW], features[TOKENS] = score.logprob, score.n_tokens
        scored.append(replace(arc, features=features))
    reached = [state for state in lattice.ends if state in lattice.leaving]
    ends = {state: lattice.ends[state].astype(np.float64) for state in reached}
    if end:
        states = list(ends)
        over = scorer.score_texts([histories[state] for state in states], end=end)
        for state, score in zip(states, over, strict=True):
            ends[state][NEW] += score.end or 0.0
    found = WordLattice(lattice.start, scored, ends).best_texts(weights.factors, n)
    hypotheses = [Hypothesis(text, float(f[0]), float(f[1])) for text, f in found]
    given = {"approximate": "one pass, recombined histories"}
    return ranked(NBest(utt, hypotheses, given=given), np.array([f for _, f in found]), weights)


def _take(
    states: dict[int, Reached], arc: Arc, total: float, own: np.ndarray, factors: np.ndarray
) -> None:
    """Reach an arc's target by it, if that is better than how it was reached."""
    reached = total + float(arc.features @ factors)
    if arc.target not in states or reached > states[arc.target][0]:
        states[arc.target] = reached, own + arc.features


def _order(start: int, leaving: dict[int, list[Arc]]) -> list[int]:
    """States that the start reaches, each before those that it leads to."""
    order: list[int] = []
    open_states, done = {start}, set()
    stack = [(start, iter(leaving.get(start, [])))]
    while stack:
        state, arcs = stack[-1]
        arc = next(arcs, None)
        if arc is None:
            stack.pop()
            open_states.discard(state)
            done.add(state)
            order.append(state)
        elif arc.target in open_states:
            raise TempoError(f"the lattice has a cycle through state {arc.target}")
        elif arc.target not in done:
            open_states.add(arc.target)
            stack.append((arc.target, iter(leaving.get(arc.target, []))))
    return order[::-1]
