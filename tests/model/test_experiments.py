"""The built-in suite on the embedded model: a batch against runs alone, captures against stock."""

from tempo_mlx import PositionedModel
from tempo_mlx.experiments.capture import TOP
from tempo_mlx.experiments.running import run_batched, run_one_by_one
from tempo_mlx.experiments.suite_files import read_suite
from tempo_mlx.experiments.validation import compare, tolerance

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture(scope="module")
def found(embedded):
    groups = read_suite("parallel-attention").expand().groups[:3]
    return groups, dict(run_batched(*embedded, groups, 32))


@pytest.mark.slow
def test_a_batch_makes_what_every_run_makes_alone(embedded, found):
    groups, batched = found
    allowed = tolerance(PositionedModel.of(embedded[0]))
    for number, outcome in run_one_by_one(*embedded, groups):
        for run, other in zip(batched[number].runs, outcome.runs, strict=True):
            why, _ = compare(run, other, allowed)
            assert why is None, why
        [pair], [alone] = batched[number].pairs, outcome.pairs
        np.testing.assert_allclose(pair.ab, alone.ab, rtol=1e-3, atol=allowed)
        np.testing.assert_allclose(pair.ba, alone.ba, rtol=1e-3, atol=allowed)


def test_attention_sums_to_one_and_conditions_part_after_the_first_set(found):
    _, batched = found
    for outcome in batched.values():
        for run in outcome.runs:
            received, steps = run.arrays["received"], run.arrays["query_step"]
            assert received.shape[1:] == (30, 9)
            for step in range(run.n_steps - 1):
                np.testing.assert_allclose(received[steps == step].sum(axis=0), 1, atol=1e-4)
        sizes = np.bincount(outcome.runs[0].tokens["step"])
        first_set = int(np.flatnonzero(sizes > 1)[0])
        [pair] = outcome.pairs
        np.testing.assert_allclose(pair.ab[: first_set + 1], 0, atol=1e-3)
        assert max(pair.ab) > 0.01


def test_the_first_distribution_is_that_of_the_stock_model(embedded, found):
    model, tokenizer = embedded
    groups, batched = found
    for group, outcome in zip(groups, batched.values(), strict=False):
        logits = np.array(model(mx.array([tokenizer.encode(group[0].prompt)]))[0, -1], np.float64)
        p = np.exp(logits - logits.max())
        p = p / p.sum()
        best = np.sort(p)[::-1][:TOP]
        for run in outcome.runs:
            np.testing.assert_allclose(run.arrays["next_probabilities"][0], best, atol=1e-4)
            np.testing.assert_allclose(p[run.arrays["next_ids"][0]], best, atol=1e-4)
