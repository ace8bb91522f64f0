"""Selection of the tokens that form a parallel set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TempoError
from ..lattice.lattice import Ending
from .rule import Rule, find


class NonFiniteLogitsError(TempoError):
    """The model returned NaN or infinite logits."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens that may enter a set.

    Args:
        ids: token ids [K], best first; [M, K] for the M leaves of a tree.
        probabilities: of the same shape, fp32.
        transitions: p_i(x_j) of each candidate j in each row i of the previous set, [N, K], fp32.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    transitions: np.ndarray


@dataclass(frozen=True, eq=False)
class Selected:
    """The parallel set of a step, on the host.

    Args:
        ids: token ids [N], most probable first; empty if the generation ends.
        probabilities: [N].
        transitions: p_i(x_j) from the M rows of the previous set, [M, N].
        endings: end tokens that qualified.
        end_transitions: p_i of each end token, [M, E].
        parents: the row that each token continues, [N]; None if tokens have no parents.
        logprobs: of the texts that end with the tokens, [N], nats; None if tokens have no parents.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    transitions: np.ndarray
    endings: list[Ending]
    end_transitions: np.ndarray | None = None
    parents: np.ndarray | None = None
    logprobs: np.ndarray | None = None

    def with_rows(self, present: list[bool]) -> "Selected":
        """The same set, with zero transitions from tokens of the previous set that had no row."""
        transitions = np.zeros((len(present), len(self.ids)), np.float32)
        transitions[present] = self.transitions
        return replace(self, transitions=transitions)


#: Size of the blocks of the vocabulary whose maxima are computed first.
NEIGHBOURS = 64

#: Up to this vocabulary size, partitioning the whole row is as fast as finding blocks.
FEW = 8192


def most_probable(p: mx.array, k: int) -> mx.array:
    """Ids of the k most probable tokens of each row of p [..., V], most probable first."""
    V = p.shape[-1]
    k = min(k, V)
    if k == 1:
        return mx.argmax(p, axis=-1, keepdims=True)
    if max(FEW, 4 * k * NEIGHBOURS) >= V:
        ids = mx.argpartition(-p, k - 1, axis=-1)[..., :k]
    else:
        # The k largest are in the k blocks with the largest maxima. Finding the blocks takes one
        # pass over the vocabulary; partitioning it takes many.
        blocks = -(-V // NEIGHBOURS)
        padding = [(0, 0)] * (p.ndim - 1) + [(0, blocks * NEIGHBOURS - V)]
        if blocks * NEIGHBOURS > V:
            p = mx.pad(p, padding, constant_values=-mx.inf)
        best = p.reshape(*p.shape[:-1], blocks, NEIGHBOURS).max(axis=-1)
        found = mx.argpartition(-best, k - 1, axis=-1)[..., :k]
        inside = (found[..., None] * NEIGHBOURS + mx.arange(NEIGHBOURS)).flatten(-2)
        part = mx.argpartition(-mx.take_along_axis(p, inside, axis=-1), k - 1, axis=-1)[..., :k]
        ids = mx.take_along_axis(inside, part, axis=-1)
    order = mx.argsort(-mx.take_along_axis(p, ids, axis=-1), axis=-1)
    return mx.take_along_axis(ids, order, axis=-1)


def noise_key(seed: int, draw: int) -> np.ndarray:
    """The random key of one draw, uint32 [2], different for every seed and draw.

    Args:
        seed: of the run, at least 0.
        draw: number of the draw in the run, at least 0.
    """
    return np.random.SeedSequence([seed, draw]).generate_state(2)


def gumbel(p: mx.array, keys: mx.array) -> mx.array:
    """Scores [G, V] whose k largest are k tokens drawn from p [G, V] without replacement.

    log p + Gumbel noise (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them",
    ICML 2019; Vieira 2014 for the trick itself).

    Args:
        p: distributions.
        keys: random key of each row, uint32 [G, 2].
    """
    noise = mx.vmap(lambda key: mx.random.gumbel(p.shape[-1:], key=key))(keys)
    return mx.log(p) + noise


def by_probability(p: mx.array, keys: mx.array) -> mx.array:
    """The distributions themselves."""
    return p


@dataclass(frozen=True)
class SamplingRule(Rule):
    """A rule (p [G, V], keys uint32 [G, 2]) -> scores [G, V]; the highest ones are candidates.

    Arrays are mlx arrays. The rule is called at every step and must not evaluate them.

    Args:
        draws: whether it uses the keys, so the seed matters.
    """

    draws: bool = False


#: Name -> rule.
SAMPLING: dict[str, SamplingRule] = {
    rule.name: rule
    for rule in (
        SamplingRule("deterministic", by_probability),
        SamplingRule("gumbel", gumbel, draws=True),
    )
}


def sampling_rule(given: Any) -> SamplingRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("sampling", given, SAMPLING, SamplingRule)


def candidate_scores(
    p: mx.array, rules: Sequence[SamplingRule], keys: Sequence[np.ndarray]
) -> mx.array:
    """Scores [G, V] of distributions p [G, V], each computed by its rule.

    Args:
        p: distributions.
        rules: one for each row, [G].
        keys: random key of each row, uint32 [2]; ignored by rules that do not draw.
    """
    scores = p
    for rule in dict.fromkeys(rules):
        if rule.function is not by_probability:
            rows = mx.array([each is rule for each in rules])[:, None]
            scores = mx.where(rows, rule(p, mx.array(np.stack(keys))), scores)
    return scores


def keep(
    candidates: Candidates, threshold: float, max_parallel: int, end_tokens: frozenset[int]
) -> Selected:
    """Keep the candidates with p >= threshold, at most ``max_parallel``, most probable first.

    If none qualifies, the first candidate is kept: the most probable token, or with Gumbel sampling
    the first one drawn. End tokens are not kept but become endings. If an end token is the most
    probable one that qualifies, the set is empty.

    Raises:
        NonFiniteLogitsError: if a probability is not a number.
    """
    # Lists are faster than arrays for a handful of candidates.
    ids, p = candidates.ids.tolist(), candidates.probabilities.tolist()
    require_finite(sum(p))
    least = float(np.float32(threshold))
    qualified = [i for i, each in enumerate(p) if each >= least] or [0]
    qualified.sort(key=lambda i: -p[i])
    ended = np.array([i for i in qualified if ids[i] in end_tokens], int)
    kept = np.array([i for i in qualified if ids[i] not in end_tokens], int)
    kept = kept[: 0 if ids[qualified[0]] in end_tokens else max_parallel]
    return Selected(
        candidates.ids[kept],
        candidates.probabilities[kept],
        candidates.transitions.take(kept, axis=1),
        [Ending(ids[i], p[i]) for i in ended],
        candidates.transitions.take(ended, axis=1),
    )


def require_finite(total: float) -> None:
    """Raise NonFiniteLogitsError if a sum of probabilities or of their logarithms is not finite."""
    if not math.isfinite(total):
        raise NonFiniteLogitsError(
            "the model returned logits that are not finite (NaN or inf); its weights may be "
            "damaged or its precision too low, try another dtype"
        )
