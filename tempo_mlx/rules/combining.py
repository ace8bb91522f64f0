"""One next distribution out of the N rows of each parallel set."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..numerics import powers, softmax, tempered


def mixture(w: np.ndarray) -> np.ndarray:
    """p(x) = sum_i w_i p_i(x). The order of the rows does not matter."""
    return w / w.sum()


def mean(w: np.ndarray) -> np.ndarray:
    """p(x) = 1/N sum_i p_i(x)."""
    return np.full(len(w), 1 / len(w))


def product(w: np.ndarray) -> np.ndarray:
    """p(x) ~ prod_i p_i(x)^w_i: softmax of the weighted mean of log p_i."""
    return w / w.sum()


def last(w: np.ndarray) -> np.ndarray:
    """p(x) = p_N(x): what an implementation that feeds the tokens one by one would read."""
    return np.eye(len(w))[-1]


#: Name -> rule (selection probabilities of the set's tokens [N]) -> factors of its rows [N], with
#: which the rows p_i are added up, or log p_i for the rules in :data:`IN_LOGS`.
COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mixture": mixture,
    "mean": mean,
    "product": product,
    "last": last,
}

IN_LOGS = frozenset({"product"})


def most_probable_of(
    logits: mx.array, temps: Sequence[float] | None = None
) -> tuple[mx.array, mx.array]:
    """The most probable token of each row of logits [N, V]; the distributions are not made.

    Args:
        temps: of each row its temperature, above 0; None means 1.

    Returns:
        ids and probabilities, fp32, [N, 1] each.
    """
    # The maximum's power is 1.
    _, _, total = powers(_at_temperatures(logits, temps))
    return mx.argmax(logits, axis=-1, keepdims=True), 1 / total


def _at_temperatures(logits: mx.array, temps: Sequence[float] | None) -> mx.array:
    """Logits [N, V], fp32, over the temperature of each row."""
    logits = logits.astype(mx.float32)
    if temps is None or all(temp == 1.0 for temp in temps):
        return logits
    return tempered(logits, mx.array(np.asarray(temps, np.float32))[:, None])


def combine(
    logits: mx.array,
    rules: Sequence[str],
    weights: Sequence[np.ndarray],
    temps: Sequence[float] | None = None,
) -> tuple[mx.array, mx.array]:
    """The next distribution of each set, and the rows that they were made of.

    Args:
        logits: the rows of G sets, one set after another, [N, V].
        rules: of each set, a key of :data:`COMBINE`, [G].
        weights: of each set the selection probabilities of its tokens; renormalised here.
        temps: of each set the temperature of its rows' softmax, above 0; None means 1.

    Returns:
        p [G, V] and the rows p_i [N, V], fp32, each summing to 1. Lazy: rows that no rule uses
        and nobody reads are not computed.
    """
    sizes = [len(w) for w in weights]
    if temps is not None:
        temps = [temp for temp, n in zip(temps, sizes, strict=True) for _ in range(n)]
    logits = _at_temperatures(logits, temps)
    rows = softmax(logits)
    if all(n == 1 for n in sizes):
        return rows, rows
    factors = np.zeros((len(sizes), sum(sizes)), np.float32)
    end = 0
    for group, (rule, w) in enumerate(zip(rules, weights, strict=True)):
        factors[group, end : end + len(w)] = COMBINE[rule](np.asarray(w, np.float64))
        end += len(w)
    mixed = mx.array(factors)
    in_logs = [rule in IN_LOGS for rule in rules]
    if not any(in_logs):
        return mixed @ rows, rows
    # The rows' normalisers are constants of the softmax. A row that excludes a token vetoes it,
    # but 0 x -inf would be NaN.
    products = softmax(mixed @ mx.maximum(logits, -1e30))
    if all(in_logs):
        return products, rows
    return mx.where(mx.array(in_logs)[:, None], products, mixed @ rows), rows
