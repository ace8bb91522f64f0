"""The vocabulary layer, for the tokens whose next token is asked about."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..numerics import log_p_at
from ..rules.selection import require_finite
from .requests import ScoreRequest, ScoringStats, TokenLogprobs

#: Places of tokens [R] -> what the layers made of them [R, D].
Rows = Callable[[np.ndarray], mx.array]

#: Tokens whose logits exist at the same time.
HEAD_ROWS = 128


class VocabularyRows:
    """The vocabulary layer, for the tokens whose next token is asked about.

    Args:
        logits: what it makes of outputs of the layers, [1, R, D] -> [1, R, V].
        sets: see :class:`~.prefix_tree_scorer.PrefixTreeScorer`.
        stats: counts its rows.
    """

    def __init__(
        self,
        logits: Callable[[mx.array], mx.array],
        sets: Sequence[Sequence[int]],
        stats: ScoringStats,
    ):
        self._logits, self._stats = logits, stats
        self._ids = sets
        self._sets: np.ndarray | None = None  # 1 for each token of a set, [V, K]

    def answer(
        self, asked: list[tuple[ScoreRequest, list[int]]], hidden: Rows, state: list[mx.array]
    ) -> list[TokenLogprobs]:
        """TokenLogprobs questions about texts that were read.

        Args:
            asked: each question with the places of its tokens, [read].
            hidden: places [R] -> outputs of the layers [R, D].
            state: arrays to evaluate with the first answers.
        """
        # Every token asked about: the place that it follows, its id, and whose it is.
        places = [np.array(path[q.start - 1 : len(q.tokens) - 1], np.int64) for q, path in asked]
        ids = [np.array(q.tokens[q.start :], np.int64) for q, _ in asked]
        ends = np.array([path[-1] for q, path in asked if q.after], np.int64)
        rows, at = np.unique(np.concatenate([*places, ends]), return_inverse=True)
        n_tokens = len(at) - len(ends)
        wants_best = any(question.greedy for question, _ in asked)
        logprobs, after, best = self._look_up(
            rows, at[:n_tokens], np.concatenate(ids), len(ends) > 0, wants_best, hidden, state
        )
        require_finite(logprobs.sum())
        answers, following = [], iter(at[n_tokens:])
        bounds = np.cumsum([0, *map(len, ids)])
        for (question, _), start, stop in zip(asked, bounds, bounds[1:], strict=False):
            behind = after[next(following)] if question.after else None
            greedy = best[at[start:stop]] == question.tokens[question.start :]
            answers.append(
                TokenLogprobs(logprobs[start:stop], behind, greedy if question.greedy else None)
            )
        return answers

    def _look_up(
        self,
        rows: np.ndarray,
        at: np.ndarray,
        ids: np.ndarray,
        after: bool,
        wants_best: bool,
        hidden: Rows,
        state: list[mx.array],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log p [n] of ids in rows[at], of the sets in each row [R, K], and each row's best id [R]
        if it is wanted."""
        best = np.zeros(len(rows), np.int64)
        logprobs = np.zeros(len(at))
        sets = np.zeros((len(rows), len(self._ids)))
        for start in range(0, len(rows), HEAD_ROWS):
            chunk = rows[start : start + HEAD_ROWS]
            own = np.flatnonzero((at >= start) & (at < start + HEAD_ROWS))
            logits = self._logits(hidden(chunk)[None])[0].astype(mx.float32)
            mx.eval(logits, *state)
            state = []
            members = self._members(logits.shape[-1]) if after else None
            logprobs[own], masses = log_p_at(logits, at[own] - start, ids[own], members)
            if masses is not None:
                sets[start : start + HEAD_ROWS] = masses
            if wants_best:
                best[start : start + HEAD_ROWS] = np.array(mx.argmax(logits, axis=-1))
        self._stats.rows += len(rows)
        return logprobs, sets, best

    def _members(self, V: int) -> np.ndarray:
        if self._sets is None:
            members = np.zeros((V, len(self._ids)), np.float32)
            for column, ids in enumerate(self._ids):
                members[list(ids), column] = 1
            self._sets = members
        return self._sets
