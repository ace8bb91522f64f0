"""Selection for visibility tree and recombined, where each token continues one other token."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..lattice.lattice import Ending
from .selection import Candidates, Selected, require_finite


def recombine(kept: Selected, scores: np.ndarray, slots: Sequence[int]) -> Selected:
    """Give each token of a set the parent that makes the most probable text.

    score(j) = max over i of score(i) + log p_i(x_j); the argmax is j's parent. Known as hypothesis
    recombination in speech decoding.

    Args:
        kept: the set, with its transitions from the M tokens of the previous set.
        scores: log-probabilities of the texts that end at those M tokens, [M], nats.
        slots: of those tokens, [M].
    """
    assert kept.end_transitions is not None

    def best(transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore"):
            joint = scores[:, None] + np.log(transitions.astype(np.float64))
        return joint.argmax(axis=0), joint.max(axis=0)

    parents, logprobs = best(kept.transitions)
    endings = kept.endings and [
        replace(ending, parent=int(slots[row]), logprob=float(logprob))
        for ending, row, logprob in zip(kept.endings, *best(kept.end_transitions), strict=True)
    ]
    return replace(kept, parents=parents, logprobs=logprobs, endings=endings)


def branch(
    candidates: Candidates,
    scores: np.ndarray,
    slots: Sequence[int],
    threshold: float,
    max_parallel: int,
    beam_width: int,
    beam_margin: float | None,
    end_tokens: frozenset[int],
) -> Selected:
    """Continue each leaf by its own candidates, and keep the most probable texts.

    At each leaf, tokens with p >= threshold qualify, up to ``max_parallel``; if none does, the most
    probable token does. The ``beam_width`` most probable of the resulting texts are kept, except
    those more than ``beam_margin`` nats below the best. Texts with an end token become endings.

    Args:
        candidates: ids and probabilities [M, K] of each of M leaves, most probable first; texts are
            scored by the transitions.
        scores: log-probabilities of the leaves' texts, [M], nats.
        slots: of the leaves, [M].
        threshold, max_parallel, beam_width, beam_margin: see :class:`~tempo_mlx.Settings`.
        end_tokens: ids that end a text.

    Raises:
        NonFiniteLogitsError: if a probability is not a number.
    """
    ids, p = candidates.ids, candidates.probabilities
    require_finite(p.sum())
    # The first candidate of each leaf always qualifies.
    qualified = (p >= threshold) & (np.arange(p.shape[1]) < max_parallel)
    qualified[:, 0] = True
    own = candidates.transitions
    with np.errstate(divide="ignore"):
        joint = np.where(qualified, scores[:, None] + np.log(own.astype(np.float64)), -np.inf)
    best = np.argsort(-joint, axis=None, kind="stable")[:beam_width]
    best = best[np.isfinite(joint.flat[best])]
    if beam_margin is not None:
        best = best[joint.flat[best] >= joint.flat[best[0]] - beam_margin]
    leaves, places = np.unravel_index(best, joint.shape)
    chosen, chances, logprobs = ids[leaves, places], p[leaves, places], joint[leaves, places]
    ends = np.isin(chosen, list(end_tokens))
    endings = [
        Ending(int(id), float(chance), int(slots[leaf]), float(logprob))
        for id, chance, leaf, logprob in zip(
            chosen[ends], chances[ends], leaves[ends], logprobs[ends], strict=True
        )
    ]
    parents = leaves[~ends]
    transitions = np.zeros((len(scores), len(parents)), np.float32)
    transitions[parents, np.arange(len(parents))] = own[leaves, places][~ends]
    return Selected(
        chosen[~ends],
        chances[~ends],
        transitions,
        endings,
        parents=parents,
        logprobs=logprobs[~ends],
    )
