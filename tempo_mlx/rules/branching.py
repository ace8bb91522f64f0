"""Selection where each token continues one other token: in trees, and recombined."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..lattice.lattice import Ending
from .selection import Candidates, Selected, require_finite


def recombine(kept: Selected, scores: np.ndarray, slots: Sequence[int]) -> Selected:
    """Give each token of a set the parent that makes the most probable text.

    score(j) = max over i of score(i) + log p_i(x_j); the argmax is j's parent. Speech decoders call
    it hypothesis recombination.

    Args:
        kept: the set, its transitions from the M tokens of the set before.
        scores: log-probabilities of the texts that end there, [M], nats.
        slots: of these tokens, [M].
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

    Of each leaf the tokens with p >= threshold qualify, at most ``max_parallel``, or the most
    probable one where none does. Of all these texts the ``beam_width`` most probable stay, and of
    them none that is more than ``beam_margin`` nats behind the best. Texts that end are endings.

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
    # As many of each leaf as may be kept; the first one whatever it is.
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
