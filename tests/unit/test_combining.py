"""Combining rules against NumPy in double precision."""

from tempo_mlx.combining import COMBINE, combine

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def rows(draw):
    n, v = draw(st.integers(1, 5)), draw(st.integers(2, 20))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return rng.normal(size=(n, v)) * 3, rng.uniform(0.05, 1, n), draw(st.floats(0.3, 3))


def in_numpy(rule, logits, weights, temp):
    p = np.exp(logits / temp)
    p /= p.sum(axis=1, keepdims=True)
    w = weights / weights.sum()
    if rule == "mixture":
        return (w[:, None] * p).sum(axis=0)
    if rule == "mean":
        return p.mean(axis=0)
    if rule == "last":
        return p[-1]
    product = np.prod(p ** w[:, None], axis=0)
    return product / product.sum()


@pytest.mark.parametrize("rule", COMBINE)
@given(rows())
def test_rule_is_its_formula(rule, case):
    logits, weights, temp = case
    p, each = combine(rule, mx.array(logits, mx.float32), mx.array(weights, mx.float32), temp)
    np.testing.assert_allclose(np.array(each).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.array(p), in_numpy(rule, logits, weights, temp), atol=2e-6)


@pytest.mark.parametrize("rule", ["mixture", "mean", "product"])
@given(rows(), st.randoms())
def test_order_of_the_set_changes_rounding_only(rule, case, random):
    logits, weights, temp = case
    order = list(range(len(weights)))
    random.shuffle(order)
    first, _ = combine(rule, mx.array(logits, mx.float32), mx.array(weights, mx.float32), temp)
    second, _ = combine(
        rule, mx.array(logits[order], mx.float32), mx.array(weights[order], mx.float32), temp
    )
    np.testing.assert_allclose(np.array(first), np.array(second), atol=1e-6)


def test_a_token_that_one_row_excludes_is_zero_in_the_product_not_nan():
    logits = mx.array([[0.0, -mx.inf, 1.0], [0.0, 5.0, 1.0]])
    p = np.array(combine("product", logits, mx.array([0.5, 0.5]))[0])
    assert p[1] == 0 and p.sum() == pytest.approx(1)


def test_half_precision_rows_are_combined_in_single_precision():
    logits = mx.random.normal((3, 50), key=mx.random.key(0)).astype(mx.bfloat16)
    assert combine("mixture", logits, mx.ones(3))[0].dtype == mx.float32
