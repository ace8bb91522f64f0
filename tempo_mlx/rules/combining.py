"""Combine the N rows of each parallel set into one next distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..arguments import shown
from ..errors import TempoError
from ..numerics import powers, softmax, tempered
from .rule import Rule, find


def mixture(w: np.ndarray) -> np.ndarray:
    """p(x) = sum_i w_i p_i(x). The order of the rows does not matter."""
    weights: np.ndarray = w / w.sum()
    return weights


def mean(w: np.ndarray) -> np.ndarray:
    """p(x) = 1/N sum_i p_i(x)."""
    return np.full(len(w), 1 / len(w))


def product(w: np.ndarray) -> np.ndarray:
    """p(x) ~ prod_i p_i(x)^w_i: softmax of the weighted mean of log p_i."""
    weights: np.ndarray = w / w.sum()
    return weights


def last(w: np.ndarray) -> np.ndarray:
    """p(x) = p_N(x): the row that is read if the tokens are fed one by one."""
    weights: np.ndarray = np.eye(len(w))[-1]
    return weights


@dataclass(frozen=True)
class CombiningRule(Rule):
    """A rule (selection probabilities of a set's tokens [N]) -> factors of its rows [N].

    Args:
        in_logs: whether the factors weight the rows' log p_i, with normalisation afterwards. If
            not, they weight the rows p_i themselves, and must be at least 0 and sum to 1.
    """

    in_logs: bool = False

    def factors(self, w: np.ndarray) -> np.ndarray:
        """The rule's factors, [N].

        Raises:
            TempoError: if the rule returns invalid factors.
        """
        found = np.asarray(self(w), np.float64)
        fits = found.shape == w.shape and bool(np.isfinite(found).all())
        if not fits or not (self.in_logs or (found.min() >= 0 and abs(found.sum() - 1) < 1e-6)):
            wanted = "" if self.in_logs else " of at least 0 that sum to 1"
            raise TempoError(
                f"combine {self.name} must return {len(w)} numbers{wanted}, got {shown(found)}"
            )
        return found


#: Name -> rule.
COMBINE: dict[str, CombiningRule] = {
    rule.name: rule
    for rule in (
        CombiningRule("mixture", mixture),
        CombiningRule("mean", mean),
        CombiningRule("product", product, in_logs=True),
        CombiningRule("last", last),
    )
}


def combining_rule(given: Any) -> CombiningRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("combine", given, COMBINE, CombiningRule)


def most_probable_of(
    logits: mx.array, temps: Sequence[float] | None = None
) -> tuple[mx.array, mx.array]:
    """The most probable token of each row of logits [N, V], without computing the distributions.

    Args:
        temps: temperature of each row, above 0; None means 1.

    Returns:
        ids and probabilities, fp32, [N, 1] each.
    """
    # exp(0) = 1 for the maximum.
    _, _, total = powers(_at_temperatures(logits, temps))
    return mx.argmax(logits, axis=-1, keepdims=True), 1 / total


def _at_temperatures(logits: mx.array, temps: Sequence[float] | None) -> mx.array:
    """Logits [N, V] divided by the temperature of each row, fp32."""
    logits = logits.astype(mx.float32)
    if temps is None or all(temp == 1.0 for temp in temps):
        return logits
    return tempered(logits, mx.array(np.asarray(temps, np.float32))[:, None])


def combine(
    logits: mx.array,
    rules: Sequence[CombiningRule | str],
    weights: Sequence[np.ndarray],
    temps: Sequence[float] | None = None,
) -> tuple[mx.array, mx.array]:
    """The next distribution of each set, and the distributions of the single rows.

    Args:
        logits: rows of G sets, one set after another, [N, V].
        rules: one for each set, or their names, [G].
        weights: for each set, the selection probabilities of its tokens; renormalised here.
        temps: for each set, the softmax temperature of its rows, above 0; None means 1.

    Returns:
        p [G, V] and the rows p_i [N, V], fp32, each summing to 1. Both are lazy, so unused rows
        are not computed.
    """
    chosen = [combining_rule(rule) for rule in rules]
    sizes = [len(w) for w in weights]
    if temps is not None:
        temps = [temp for temp, n in zip(temps, sizes, strict=True) for _ in range(n)]
    logits = _at_temperatures(logits, temps)
    rows = softmax(logits)
    if all(n == 1 for n in sizes):
        return rows, rows
    factors = np.zeros((len(sizes), sum(sizes)), np.float32)
    end = 0
    for group, (rule, w) in enumerate(zip(chosen, weights, strict=True)):
        factors[group, end : end + len(w)] = rule.factors(np.asarray(w, np.float64))
        end += len(w)
    mixed = mx.array(factors)
    in_logs = [rule.in_logs for rule in chosen]
    if not any(in_logs):
        return mixed @ rows, rows
    # The softmax cancels the rows' normalisers. A row that excludes a token vetoes it; clipping
    # avoids 0 x -inf = NaN.
    products = softmax(mixed @ mx.maximum(logits, -1e30))
    if all(in_logs):
        return products, rows
    return mx.where(mx.array(in_logs)[:, None], products, mixed @ rows), rows
