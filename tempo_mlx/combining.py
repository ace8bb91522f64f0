"""One next distribution out of the N rows of a parallel set."""

from collections.abc import Callable

import mlx.core as mx


def mixture(logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = sum_i w_i p_i(x). The order of the rows does not matter."""
    return weights @ mx.softmax(logits, axis=-1)


def mean(logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = 1/N sum_i p_i(x)."""
    return mx.softmax(logits, axis=-1).mean(axis=0)


def product(logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) ~ prod_i p_i(x)^w_i: softmax of the weighted mean of log p_i."""
    # The rows' normalisers are constants of the softmax. A row that excludes a token vetoes it,
    # but 0 x -inf would be NaN.
    return mx.softmax(weights @ mx.maximum(logits, -1e30))


def last(logits: mx.array, weights: mx.array) -> mx.array:
    """p(x) = p_N(x): what an implementation that feeds the tokens one by one would read."""
    return mx.softmax(logits[-1])


#: Name -> rule (logits [N, V], weights [N] summing to 1) -> p [V], all fp32.
COMBINE: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "mixture": mixture,
    "mean": mean,
    "product": product,
    "last": last,
}


def combine(rule: str, logits: mx.array, weights: mx.array, temp: float = 1.0) -> mx.array:
    """The next distribution.

    Args:
        rule: a key of :data:`COMBINE`.
        logits: [N, V], one row for each token of the set.
        weights: selection probabilities of the set's tokens, [N]; renormalised here.
        temp: temperature of every row's softmax, above 0.

    Returns:
        p [V], fp32, summing to 1.
    """
    logits = logits.astype(mx.float32)
    if temp != 1.0:
        logits = logits / temp
    if logits.shape[0] == 1:
        return mx.softmax(logits[0])
    return COMBINE[rule](logits, weights / weights.sum())
