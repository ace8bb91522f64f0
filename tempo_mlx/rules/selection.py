"""Which tokens of a distribution form the parallel set."""

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
        ids: token ids [K], in the order in which they would be kept; of a tree's M leaves [M, K].
        probabilities: of the same shape, fp32.
        transitions: p_i(x_j) of each candidate j in each row i of the set before, [N, K], fp32.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    transitions: np.ndarray


@dataclass(frozen=True, eq=False)
class Selected:
    """The parallel set of a step, on the host.

    Args:
        ids: token ids [N], most probable first; empty where the generation ends.
        probabilities: [N].
        transitions: p_i(x_j) from the M rows of the set before, [M, N].
        endings: end tokens that qualified.
        end_transitions: p_i of each of them, [M, E].
        parents: the row that each token continues, [N], where tokens have parents.
        logprobs: of the texts that end with the tokens, [N], nats, where tokens have parents.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    transitions: np.ndarray
    endings: list[Ending]
    end_transitions: np.ndarray | None = None
    parents: np.ndarray | None = None
    logprobs: np.ndarray | None = None

    def with_rows(self, present: list[bool]) -> "Selected":
        """The same set, with rows of zeros for the tokens of the set before that had no row."""
        transitions = np.zeros((len(present), len(self.ids)), np.float32)
        transitions[present] = self.transitions
        return replace(self, transitions=transitions)


#: Neighbours in the vocabulary of which first the best one is found.
NEIGHBOURS = 64

#: Tokens that are partitioned as fast as blocks of them are looked for.
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
        # The k largest lie in the k blocks with the largest maxima: to find those is one pass over
        # the vocabulary, where partitioning it takes many.
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
    """The key of a run's draw, uint32 [2]; every seed and number of the draw has its own.

    Args:
        seed: of the run, at least 0.
        draw: its number, at least 0.
    """
    return np.random.SeedSequence([seed, draw]).generate_state(2)


def gumbel(p: mx.array, keys: mx.array) -> mx.array:
    """Scores [G, V] whose k largest are a draw of k tokens from p [G, V] without replacement.

    log p + Gumbel noise (Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them",
    ICML 2019; Vieira 2014 for the trick itself).

    Args:
        p: distributions.
        keys: of each row's noise, uint32 [G, 2].
    """
    noise = mx.vmap(lambda key: mx.random.gumbel(p.shape[-1:], key=key))(keys)
    return mx.log(p) + noise


def by_probability(p: mx.array, keys: mx.array) -> mx.array:
    """The distributions themselves."""
    return p


@dataclass(frozen=True)
class SamplingRule(Rule):
    """A rule (p [G, V], keys uint32 [G, 2]) -> scores [G, V]; the highest ones are candidates.

    Arrays are mlx's; the rule is called at every step and must not read them.

    Args:
        draws: whether it draws, by the keys, so that the seed matters.
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
    """Scores [G, V] of distributions p [G, V], each by its rule.

    Args:
        p: distributions.
        rules: of each row, [G].
        keys: of each row's noise, uint32 [2] each; what they are does not matter to rules that
            do not draw.
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

    Where none qualifies, the first candidate is kept: the most probable token, or with Gumbel
    sampling the first one drawn. An end token is never kept: it becomes an ending, and where it is
    the most probable one that qualifies, the set is empty.

    Raises:
        NonFiniteLogitsError: if a probability is not a number.
    """
    # A handful of candidates: lists are faster than arrays.
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
