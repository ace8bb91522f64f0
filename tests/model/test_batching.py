"""Batches of the embedded model against each prompt alone and against mlx-lm."""

from tempo_mlx import Settings, batch_generate, generate
from tempo_mlx.rules.pruning import Pruning

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

PROMPTS = [
    "Once upon a time, there was a",
    "The cat",
    "According to the research, the most important reason why people in cities sleep less is",
    "She said to him",
    "def fibonacci(n):",
]

EACH = [
    Settings(threshold=0.1, max_tokens=8),
    Settings(threshold=0.05, max_tokens=8, visibility="visible", max_parallel=6),
    Settings(threshold=1.0, max_tokens=5),
    Settings(threshold=0.08, max_tokens=7, visibility="hidden", combine="product"),
    Settings(threshold=0.05, max_tokens=9, pruning=Pruning(rule="attention", layers=4)),
]


def sets_of(result):
    return [[token.id for token in step.tokens] for step in result.lattice.steps]


@pytest.fixture(scope="module")
def each_alone(embedded):
    model, tokenizer = embedded
    return [
        generate(
            model, tokenizer, prompt, **{f: getattr(each, f) for f in each.__dataclass_fields__}
        )
        for prompt, each in zip(PROMPTS, EACH, strict=True)
    ]


@pytest.mark.xdist_group("each alone")
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 5])
def test_every_prompt_is_what_it_gives_alone(embedded, each_alone, batch_size):
    model, tokenizer = embedded
    batch = batch_generate(model, tokenizer, PROMPTS, EACH, batch_size=batch_size, verify=True)
    for result, alone in zip(batch.results, each_alone, strict=True):
        assert sets_of(result) == sets_of(alone)
        for step, other in zip(result.lattice.steps, alone.lattice.steps, strict=True):
            np.testing.assert_allclose(
                [token.probability for token in step.tokens],
                [token.probability for token in other.tokens],
                atol=1e-4,
            )
            assert [t.pruned_at for t in step.tokens] == [t.pruned_at for t in other.tokens]
        assert result.verification.max_logit_difference < 1e-3


def test_threshold_one_is_greedy_decoding_by_mlx_lm(embedded):
    model, tokenizer = embedded
    prompts = PROMPTS[1:4]
    batch = batch_generate(model, tokenizer, prompts, threshold=1.0, max_tokens=8)
    for result, prompt in zip(batch.results, prompts, strict=True):
        ids = mx.array(tokenizer.encode(prompt))
        stock = [int(token) for token, _ in generate_step(ids, model, max_tokens=8)]
        ours = [ids[0] for ids in sets_of(result) if ids]
        assert ours == stock[: len(ours)]
        assert len(ours) == 8 or stock[len(ours)] in tokenizer.eos_token_ids
