"""Combining rules against NumPy in double precision."""

from tempo_mlx.numerics import log_softmax_at, softmax
from tempo_mlx.rules.combining import COMBINE, combine, most_probable_of

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


@pytest.mark.parametrize("temp", [1e-6, 1e-4, 0.01, 100.0, 1e6])
def test_extreme_temperatures_are_exact(temp):
    rng = np.random.default_rng(3)
    logits = (20 + rng.normal(size=(2, 50)) * min(temp, 10)).astype(np.float32)
    weights = np.array([0.7, 0.2])
    shifted = logits.astype(float) - logits.max(axis=1, keepdims=True)
    for rule in ("mixture", "last"):
        p, _ = combine(mx.array(logits), [rule], [weights], [temp])
        expected = in_numpy(rule, shifted, weights, float(np.float32(temp)))
        np.testing.assert_allclose(np.array(p)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", COMBINE)
@given(rows())
def test_rule_is_its_formula(rule, case):
    logits, weights, temp = case
    p, each = combine(mx.array(logits, mx.float32), [rule], [weights], [temp])
    np.testing.assert_allclose(np.array(each).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.array(p)[0], in_numpy(rule, logits, weights, temp), atol=2e-6)


@given(rows(), st.lists(st.floats(0.3, 3), min_size=5, max_size=5))
def test_the_best_token_alone_is_that_of_the_distribution(case, temps):
    logits = case[0].astype(np.float32)
    temps = temps[: len(logits)]
    ids, p = most_probable_of(mx.array(logits), temps)
    np.testing.assert_array_equal(np.array(ids)[:, 0], logits.argmax(axis=1))
    scaled = logits.astype(float) / np.array(temps)[:, None]
    expected = np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)).max(axis=1)
    np.testing.assert_allclose(np.array(p)[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("rule", ["mixture", "mean", "product"])
@given(rows(), st.randoms())
def test_order_of_the_set_changes_rounding_only(rule, case, random):
    logits, weights, temp = case
    order = list(range(len(weights)))
    random.shuffle(order)
    first, _ = combine(mx.array(logits, mx.float32), [rule], [weights], [temp])
    second, _ = combine(mx.array(logits[order], mx.float32), [rule], [weights[order]], [temp])
    np.testing.assert_allclose(np.array(first), np.array(second), atol=1e-6)


def test_a_token_that_one_row_excludes_is_zero_in_the_product_not_nan():
    logits = mx.array([[0.0, -mx.inf, 1.0], [0.0, 5.0, 1.0]])
    p = np.array(combine(logits, ["product"], [np.array([0.5, 0.5])])[0])[0]
    assert p[1] == 0 and p.sum() == pytest.approx(1)


def test_half_precision_rows_are_combined_in_single_precision():
    logits = mx.random.normal((3, 50), key=mx.random.key(0)).astype(mx.bfloat16)
    assert combine(logits, ["mixture"], [np.ones(3)])[0].dtype == mx.float32


@given(st.lists(st.tuples(st.sampled_from(sorted(COMBINE)), rows()), min_size=1, max_size=5))
def test_sets_combined_together_equal_each_alone(cases):
    V = min(logits.shape[1] for _, (logits, _, _) in cases)
    cases = [(rule, logits[:, :V], weights, temp) for rule, (logits, weights, temp) in cases]
    together, rows_ = combine(
        mx.array(np.concatenate([logits for _, logits, _, _ in cases]), mx.float32),
        [rule for rule, *_ in cases],
        [weights for _, _, weights, _ in cases],
        [temp for *_, temp in cases],
    )
    assert rows_.shape == (sum(len(weights) for _, _, weights, _ in cases), V)
    for p, (rule, logits, weights, temp) in zip(together, cases, strict=True):
        np.testing.assert_allclose(np.array(p), in_numpy(rule, logits, weights, temp), atol=2e-6)


def test_rows_of_a_large_vocabulary_sum_to_one():
    logits = 3 * mx.random.normal((4, 150_000), key=mx.random.key(2))
    _, each = combine(logits, ["mixture"], [np.ones(4)])
    np.testing.assert_allclose(np.array(each).astype(np.float64).sum(axis=1), 1, atol=2e-5)


def test_log_probabilities_are_exact_over_a_large_vocabulary():
    rng = np.random.default_rng(1)
    logits = (3 * rng.normal(size=(4, 150_000)) + 10).astype(np.float32)
    logits[:, 7] += 15
    ids = rng.integers(0, 150_000, (4, 30))
    wide = logits.astype(np.float64)
    expected = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
    expected = np.take_along_axis(expected, ids, axis=1)
    found = np.array(log_softmax_at(mx.array(logits), mx.array(ids)))
    np.testing.assert_allclose(found, expected, atol=3e-5)
    p = np.take_along_axis(np.array(softmax(mx.array(logits)), np.float64), ids, axis=1)
    np.testing.assert_allclose(np.log(p), expected, atol=3e-5)
