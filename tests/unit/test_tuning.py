"""Weights by exact sweeps, against every hypothesis at every weight, and where they are planted."""

from dataclasses import asdict

from tempo_mlx.scoring.rescoring import Weights
from tempo_mlx.scoring.tuning import (
    Judged,
    Sweep,
    best_weights,
    envelope,
    free_weights,
    normalized,
    tune,
    word_errors,
)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = st.integers(-5, 5).map(float)


@settings(max_examples=200)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8))
def test_the_envelope_is_the_highest_line_everywhere(lines):
    slope, offset = np.array(lines).T
    crossings, winners = envelope(slope, offset)
    assert len(winners) == len(crossings) + 1 and (np.diff(crossings) > 0).all()
    inner = (crossings[1:] + crossings[:-1]) / 2
    ends = [crossings[0] - 1, crossings[-1] + 1] if len(crossings) else [0.3]
    for at in np.concatenate([inner, ends]):
        values = slope * at + offset
        winner = winners[np.searchsorted(crossings, at)]
        assert values[winner] == pytest.approx(values.max())


def random_lists(rng, n=12, size=6):
    return [
        Judged(
            np.column_stack([rng.normal(0, 3, (size, 3)), rng.integers(1, 6, (size, 2))]),
            rng.integers(0, 5, size),
            5,
            str(i),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("name", ["acoustic_scale", "alpha", "word_bonus", "token_penalty"])
def test_a_sweep_counts_the_errors_of_the_best_hypotheses_at_every_weight(name):
    rng = np.random.default_rng(0)
    lists = random_lists(rng)
    others = Weights(0.7, 0.3, -0.2, 0.1)
    sweep = Sweep(lists, name, others)
    counts = rng.integers(0, 3, len(lists))

    def errors(value, counts):
        weights = Weights(**{**asdict(others), name: value})
        chosen = [j.errors[np.argmax(weights.totals(j.features))] for j in lists]
        return int(np.array(chosen) @ counts)

    for value in rng.normal(0, 5, 50):
        at = np.searchsorted(sweep.places, value)
        assert sweep.errors()[at] == errors(value, np.ones(len(lists), int))
        assert sweep.errors(counts)[at] == errors(value, counts)
    fewest, value = sweep.best()
    assert fewest == errors(value, np.ones(len(lists), int)) == sweep.errors().min()


def planted(rng, n, weight, size=8, noise=0.0):
    """Lists whose hypotheses with the fewest errors have the highest total at a weight of alpha."""
    lists = []
    for i in range(n):
        ac, new = rng.normal(0, 4, size), rng.normal(0, 4, size)
        quality = ac + weight * new + rng.normal(0, noise, size)
        errors = np.argsort(np.argsort(-quality))
        features = np.column_stack([ac, np.zeros(size), new, np.full((size, 2), 5)])
        lists.append(Judged(features, np.minimum(errors, 5), 5, f"s{i // 3}"))
    return lists


def test_a_planted_weight_is_found_within_its_interval():
    lists = planted(np.random.default_rng(1), 300, weight=0.8, noise=1.0)
    found = tune(lists, resamples=200, restarts=3)
    low, high = found.intervals["alpha"]
    assert low <= 0.8 <= high and high - low < 1
    assert found.helps and found.weights.acoustic_scale == 1
    rates = [found.oracle, found.tuned, found.rescored, found.decoder]
    assert [rate.wer for rate in rates] == sorted(rate.wer for rate in rates)
    for rate in rates:
        assert rate.low <= rate.wer <= rate.high


def test_a_model_that_is_noise_gets_no_weight():
    lists = planted(np.random.default_rng(2), 300, weight=0.0, noise=2.0)
    found = tune(lists, resamples=200, restarts=3)
    low, high = found.intervals["alpha"]
    assert (found.weights.alpha, found.helps) == (0, False) and low <= 0 <= high


def test_groups_are_never_split(monkeypatch):
    from tempo_mlx.scoring import tuning

    seen = []

    def watched(lists, *arguments):
        seen.append({each.group for each in lists})
        return best_weights(lists, *arguments)

    monkeypatch.setattr(tuning, "best_weights", watched)
    lists = planted(np.random.default_rng(3), 30, 1.0)
    tune(lists, folds=5, restarts=0, resamples=10)
    everyone = {each.group for each in lists}
    assert len(seen) == 11
    left_out = [everyone - each for each in seen[:5]]
    assert sum(map(len, left_out)) == len(everyone) and set.union(*left_out) == everyone


def test_only_weights_that_change_something_are_free():
    lists = planted(np.random.default_rng(0), 3, 1.0)
    assert free_weights(lists) == ["alpha"]
    assert free_weights(random_lists(np.random.default_rng(0))) == list(asdict(Weights()))
    with pytest.raises(ValueError, match="at least 2 groups, got 1"):
        tune(lists)


def test_errors_are_those_of_the_alignment():
    pytest.importorskip("jiwer")
    references = ["a b c", "a b c", "a b c", "", "a b", ""]
    texts = ["a b c", "a x c d", "", "a", "b", ""]
    assert word_errors(references, texts).tolist() == [0, 2, 3, 1, 1, 0]
    assert normalized("  It’s 5%, “OK”?  semi-final ") == "it's 5 ok semi final"
