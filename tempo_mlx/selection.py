"""Which tokens of a distribution form the parallel set."""

from dataclasses import dataclass

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
    """

    ids: mx.array
    probabilities: mx.array


@dataclass(frozen=True)
class Selected:
    """The parallel set of a step, on the host.

    Args:
        ids: token ids [N], most probable first; empty where the generation ends.
        probabilities: [N].
        endings: end tokens that qualified.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    endings: list[Ending]


def most_probable(p: mx.array, k: int) -> Candidates:
    """The k most probable tokens of p [V], most probable first."""
    k = min(k, p.shape[0])
    if k == 1:
        ids = mx.argmax(p, keepdims=True)
    else:
        ids = mx.argpartition(-p, k - 1)[:k]
        ids = ids[mx.argsort(-p[ids])]
    return Candidates(ids, p[ids])


def gumbel_top_k(p: mx.array, k: int, key: mx.array) -> Candidates:
    """k tokens drawn from p [V] without replacement, in the order of drawing.

    The k largest of log p + Gumbel noise are such a draw (Kool, van Hoof and Welling,
    "Stochastic Beams and Where to Find Them", ICML 2019; Vieira 2014 for the trick itself).
    """
    perturbed = mx.log(p) + mx.random.gumbel(p.shape, key=key)
    ids = most_probable(perturbed, k).ids
    return Candidates(ids, p[ids])


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
    qualifies = probabilities >= threshold
    if not qualifies.any():
        qualifies[0] = True
    ids, probabilities = ids[qualifies], probabilities[qualifies]
    order = np.argsort(-probabilities, kind="stable")
    ids, probabilities = ids[order], probabilities[order]
    ends = np.isin(ids, list(end_tokens))
    endings = [
        Ending(int(i), float(q)) for i, q in zip(ids[ends], probabilities[ends], strict=True)
    ]
    if ends[0]:
        return Selected(ids[:0], probabilities[:0], endings)
    return Selected(ids[~ends][:max_parallel], probabilities[~ends][:max_parallel], endings)
