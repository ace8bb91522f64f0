"""Selection: what is kept, in which order, and how it is drawn."""

from tempo_mlx.decode.step_candidates import StepCandidates
from tempo_mlx.rules.selection import (
    SAMPLING,
    NonFiniteLogitsError,
    candidate_scores,
    gumbel,
    keep,
    most_probable,
)

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def distributions(draw):
    size = draw(st.integers(3, 30))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return rng.dirichlet(np.full(size, draw(st.sampled_from([0.1, 0.5, 2.0]))))


def select(p, threshold, max_parallel, ends=frozenset()):
    p = mx.array(p, mx.float32)
    # Between two other sets, so that a mix-up of rows shows.
    several = mx.stack([p[::-1], p, mx.ones_like(p) / p.size])
    rows = mx.concatenate([3 * several[:1], mx.stack([p, 2 * p]), several[2:]])
    ids = most_probable(several, max_parallel + len(ends))
    found = StepCandidates.of_rows(ids, several, rows, [[1], [2], [1]]).of(1)
    kept = keep(found, threshold, max_parallel, frozenset(ends))
    np.testing.assert_array_equal(kept.transitions, [kept.probabilities, 2 * kept.probabilities])
    return kept


@given(distributions(), st.floats(0.01, 1), st.integers(1, 8))
def test_kept_tokens_are_the_most_probable_ones_above_the_threshold(p, threshold, max_parallel):
    p = p.astype(np.float32)
    kept = select(p, threshold, max_parallel)
    order = np.argsort(-p, kind="stable")
    expected = [i for i in order if p[i] >= np.float32(threshold)][:max_parallel] or [order[0]]
    np.testing.assert_allclose(p[kept.ids], p[expected])
    np.testing.assert_allclose(kept.probabilities, p[kept.ids])
    assert len(set(kept.ids.tolist())) == len(kept.ids)


@given(distributions(), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(1, 8))
def test_a_higher_threshold_keeps_a_beginning_of_the_set(p, one, other, max_parallel):
    more = select(p, min(one, other), max_parallel).ids.tolist()
    fewer = select(p, max(one, other), max_parallel).ids.tolist()
    assert more[: len(fewer)] == fewer


@given(distributions(), st.floats(0.01, 0.5), st.integers(1, 8), st.data())
def test_end_tokens_are_recorded_and_never_kept(p, threshold, max_parallel, data):
    ends = data.draw(st.sets(st.integers(0, len(p) - 1), min_size=1, max_size=2))
    p = p.astype(np.float32)
    kept = select(p, threshold, max_parallel, ends)
    assert not ends & set(kept.ids.tolist())
    most = int(np.argmax(p))
    if most in ends:
        assert len(kept.ids) == 0 and kept.endings[0].id == most
    else:
        others = sum(p[i] >= np.float32(threshold) for i in range(len(p)) if i not in ends)
        assert len(kept.ids) == min(max(others, 1), max_parallel)


@given(st.integers(60, 20_000), st.integers(1, 20), st.integers(0, 10**6))
def test_most_probable_of_any_vocabulary_is_what_sorting_finds(size, k, seed):
    p = np.random.default_rng(seed).permutation(3 * size).reshape(3, size).astype(np.float32)
    found = np.array(most_probable(mx.array(p), k))
    np.testing.assert_array_equal(found, np.argsort(-p, axis=1)[:, :k])


def draw(p, k, key):
    """k ids drawn from p [V] without replacement."""
    scores = gumbel(mx.array(p, mx.float32)[None], mx.array([[0, key]], mx.uint32))
    return most_probable(scores, k)[0]


def test_draws_are_without_replacement_and_repeat_with_their_key():
    p = mx.softmax(mx.random.normal((40,), key=mx.random.key(1)))
    first = draw(p, 10, 5).tolist()
    assert len(set(first)) == 10
    assert first == draw(p, 10, 5).tolist()
    assert first != draw(p, 10, 6).tolist()


def test_first_draw_follows_the_distribution_and_so_does_the_second_given_the_first():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    n = 4000
    several = mx.broadcast_to(mx.array(p, mx.float32), (n, 4))
    keys = mx.random.split(mx.random.key(0), n)
    ids = np.array(most_probable(gumbel(several, keys), 2))
    for token in range(4):
        expected = p[token]
        bound = 4 * np.sqrt(expected * (1 - expected) / n)
        assert abs((ids[:, 0] == token).mean() - expected) < bound
    after_best = ids[ids[:, 0] == 0, 1]
    for token in (1, 2, 3):
        expected = p[token] / 0.5
        bound = 4 * np.sqrt(expected * (1 - expected) / len(after_best))
        assert abs((after_best == token).mean() - expected) < bound


def test_if_no_draw_qualifies_the_first_is_kept():
    p = mx.array([[0.4, 0.3, 0.2, 0.1]])
    firsts = set()
    for key in range(10):
        drawn = draw(p[0], 3, key)
        kept = keep(StepCandidates.of_rows(drawn[None], p, p, [[1]]).of(0), 0.9, 3, frozenset())
        assert kept.ids.tolist() == drawn[:1].tolist()
        firsts.add(int(drawn[0]))
    assert len(firsts) > 1


def test_a_deterministic_row_keeps_its_order_next_to_a_drawn_one():
    p = mx.softmax(mx.random.normal((2, 40), key=mx.random.key(1)))
    rules = [SAMPLING["deterministic"], SAMPLING["gumbel"]]
    scores = candidate_scores(p, rules, [np.zeros(2, np.uint32), np.array([0, 5], np.uint32)])
    both = most_probable(scores, 5).tolist()
    assert both[0] == most_probable(p[:1], 5)[0].tolist()
    assert both[1] == draw(p[1], 5, 5).tolist()


def test_not_a_number_is_an_error():
    p = mx.softmax(mx.array([[1.0, float("nan"), 0.0]]))
    for k in (1, 2):
        with pytest.raises(NonFiniteLogitsError, match="not finite"):
            keep(
                StepCandidates.of_rows(most_probable(p, k), p, p, [[1]]).of(0), 0.1, k, frozenset()
            )
