"""One next distribution out of the N rows of a parallel set."""

from collections.abc import Callable

import mlx.core as mx

LOG2_E = 1.4426950408889634


def mixture(p: mx.array, logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = sum_i w_i p_i(x). The order of the rows does not matter."""
    return weights @ p


def mean(p: mx.array, logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = 1/N sum_i p_i(x)."""
    return p.mean(axis=0)


def product(p: mx.array, logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) ~ prod_i p_i(x)^w_i: softmax of the weighted mean of log p_i."""
    # The rows' normalisers are constants of the softmax. A row that excludes a token vetoes it,
    # but 0 x -inf would be NaN.
    return mx.softmax(weights @ mx.maximum(logits, -1e30))


def last(p: mx.array, logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = p_N(x): what an implementation that feeds the tokens one by one would read."""
    return p[-1]


def _softmax(logits: mx.array) -> mx.array:
    """softmax over the last axis, by powers of 2: on x86 mlx's exp takes 2.7 times as long."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers = mx.power(2.0, shifted * LOG2_E)
    return powers / powers.sum(axis=-1, keepdims=True)


#: Name -> rule (rows p_i [N, V], their logits [N, V], weights [N] summing to 1) -> p [V]; all fp32.
COMBINE: dict[str, Callable[[mx.array, mx.array, mx.array], mx.array]] = {
    "mixture": mixture,
    "mean": mean,
    "product": product,
    "last": last,
}


def combine(
    rule: str, logits: mx.array, weights: mx.array, temp: float = 1.0
) -> tuple[mx.array, mx.array]:
    """The next distribution, and the rows that it was made of.

    Args:
        rule: a key of :data:`COMBINE`.
        logits: [N, V], one row for each token of the set.
        weights: selection probabilities of the set's tokens, [N]; renormalised here.
        temp: temperature of every row's softmax, above 0.

    Returns:
        p [V] and the rows p_i [N, V], fp32, each summing to 1. Lazy: rows that the rule does not
        use and nobody reads are not computed.
    """
    logits = logits.astype(mx.float32)
    if temp != 1.0:
        logits = logits / temp
    rows = _softmax(logits)
    if rows.shape[0] == 1:
        return rows[0], rows
    return COMBINE[rule](rows, logits, weights / weights.sum()), rows
