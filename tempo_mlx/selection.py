"""Which tokens of a distribution form the parallel set."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from .lattice import Ending


class NonFiniteLogitsError(ValueError):
    """The model returned NaN or infinite logits."""


@dataclass(frozen=True)
class Candidates:
    """The tokens that may enter the set, still on the device.

    Args:
        ids: token ids [K], in the order in which they would be kept.
        probabilities: [K], fp32.
        transitions: p_i(x_j) of each candidate j in each row i of the set before, [N, K], fp32.
    """

    ids: mx.array
    probabilities: mx.array
    transitions: mx.array

    @classmethod
    def of(cls, ids: mx.array, p: mx.array, rows: mx.array) -> "Candidates":
        """Candidates ``ids`` of p [V], which was combined from rows [N, V]."""
        return cls(ids, p[ids], rows[:, ids])


@dataclass(frozen=True)
class Selected:
    """The parallel set of a step, on the host.

    Args:
        ids: token ids [N], most probable first; empty where the generation ends.
        probabilities: [N].
        transitions: p_i(x_j) from the M rows of the set before, [M, N].
        endings: end tokens that qualified.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    transitions: np.ndarray
    endings: list[Ending]

    def with_rows(self, present: list[bool]) -> "Selected":
        """The same set, with rows of zeros for the tokens of the set before that had no row."""
        transitions = np.zeros((len(present), len(self.ids)), np.float32)
        transitions[present] = self.transitions
        return replace(self, transitions=transitions)


def most_probable(p: mx.array, k: int) -> mx.array:
    """Ids of the k most probable tokens of p [V], most probable first."""
    k = min(k, p.shape[0])
    if k == 1:
        return mx.argmax(p, keepdims=True)
    ids = mx.argpartition(-p, k - 1)[:k]
    return ids[mx.argsort(-p[ids])]


def gumbel_top_k(p: mx.array, k: int, key: mx.array) -> mx.array:
    """Ids of k tokens drawn from p [V] without replacement, in the order of drawing.

    The k largest of log p + Gumbel noise are such a draw (Kool, van Hoof and Welling,
    "Stochastic Beams and Where to Find Them", ICML 2019; Vieira 2014 for the trick itself).
    """
    return most_probable(mx.log(p) + mx.random.gumbel(p.shape, key=key), k)


def keep(
    candidates: Candidates, threshold: float, max_parallel: int, end_tokens: frozenset[int]
) -> Selected:
    """Keep the candidates with p >= threshold, at most ``max_parallel``, most probable first.

    Where none qualifies, the first candidate is kept: the most probable token, or with Gumbel
    sampling the first one drawn. An end token is never kept: it becomes an ending, and where it is
    the most probable one that qualifies, the set is empty. Reads the device: the step's one
    synchronisation.

    Raises:
        NonFiniteLogitsError: if a probability is not a number.
    """
    ids = np.array(candidates.ids)
    probabilities = np.array(candidates.probabilities)
    if not np.isfinite(probabilities).all():
        raise NonFiniteLogitsError(
            "the model returned logits that are not finite (NaN or inf); its weights may be "
            "damaged or its precision too low, try another dtype"
        )
    qualified = np.flatnonzero(probabilities >= threshold)
    if not qualified.size:
        qualified = np.array([0])
    qualified = qualified[np.argsort(-probabilities[qualified], kind="stable")]
    ends = np.isin(ids[qualified], list(end_tokens))
    endings = [Ending(int(ids[i]), float(probabilities[i])) for i in qualified[ends]]
    kept = qualified[~ends][: 0 if ends[0] else max_parallel]
    transitions = np.array(candidates.transitions)
    return Selected(ids[kept], probabilities[kept], transitions[:, kept], endings)
