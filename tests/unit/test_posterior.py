"""Forward-backward and Viterbi against brute force over all paths of small lattices."""

import itertools

from tempo_mlx.rules.posterior import backward, forward, posteriors, viterbi

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def chains(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    power = draw(st.sampled_from([1, 8]))  # small probabilities, too
    initial = rng.random(sizes[0]) ** power
    steps = [rng.random(pair) ** power for pair in itertools.pairwise(sizes)]
    return sizes, initial, steps


def all_paths(sizes, initial, transitions):
    for path in itertools.product(*map(range, sizes)):
        probability = initial[path[0]]
        for transition, i, j in zip(transitions, path, path[1:], strict=False):
            probability *= transition[i, j]
        yield path, probability


@given(chains())
def test_posterior_is_the_share_of_all_paths_through_a_token(case):
    sizes, initial, transitions = case
    total = [np.zeros(size) for size in sizes]
    for path, probability in all_paths(*case):
        for s, i in enumerate(path):
            total[s][i] += probability
    for found, expected in zip(posteriors(initial, transitions), total, strict=True):
        np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-9)


@given(chains())
def test_forward_is_the_share_of_the_paths_that_end_in_a_token(case):
    sizes, initial, transitions = case
    for s, alpha in enumerate(forward(initial, transitions)):
        expected = np.zeros(sizes[s])
        for path, probability in all_paths(sizes[: s + 1], initial, transitions[:s]):
            expected[path[-1]] += probability
        np.testing.assert_allclose(alpha, expected / expected.sum(), rtol=1e-9)


@given(chains())
def test_backward_is_proportional_to_what_follows_a_token(case):
    sizes, _, transitions = case
    for s, beta in enumerate(backward(sizes[-1], transitions)):
        expected = np.zeros(sizes[s])
        for path, probability in all_paths(sizes[s:], np.ones(sizes[s]), transitions[s:]):
            expected[path[0]] += probability
        np.testing.assert_allclose(beta / beta.sum(), expected / expected.sum(), rtol=1e-9)


@given(chains())
def test_viterbi_is_the_best_of_all_paths(case):
    sizes, initial, transitions = case
    chain, logprob = viterbi(initial, transitions)
    probabilities = dict(all_paths(sizes, initial, transitions))
    assert probabilities[tuple(chain)] == pytest.approx(max(probabilities.values()), rel=1e-9)
    assert logprob == pytest.approx(np.log(max(probabilities.values())), rel=1e-9, abs=1e-9)


def test_without_evidence_tokens_are_equal():
    gammas = posteriors(np.array([0.5, 0.5]), [np.zeros((2, 3))])
    np.testing.assert_allclose(gammas[0], 1 / 2)
    np.testing.assert_allclose(gammas[1], 1 / 3)
