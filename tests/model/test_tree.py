"""Trees, recombined sets and search on the embedded model, against stock mlx-lm."""

from tempo_mlx import generate, search
from tests.sweeps import mostly_slow

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

PROMPT = "Once upon a time, there was a"


@pytest.fixture(scope="module")
def stock(embedded):
    model, tokenizer = embedded
    prompt = tokenizer.encode(PROMPT)

    def log_p(tokens):
        """log p [T + 1, V] of what follows the prompt and each of these T tokens, by one pass."""
        logits = model(mx.array([*prompt, *tokens])[None], cache=make_prompt_cache(model))[0]
        rows = np.array(logits[len(prompt) - 1 :], np.float64)
        return rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)

    return log_p


def score(stock, tokens):
    return sum(row[token] for row, token in zip(stock(tokens[:-1]), tokens, strict=True))


@pytest.mark.slow
def test_a_tree_is_beam_search(embedded, stock):
    model, tokenizer = embedded
    width, steps = 3, 6
    beams = [((), 0.0)]
    for _ in range(steps):
        rows = [(tokens, total, stock(tokens)[-1]) for tokens, total in beams]
        texts = [
            ((*tokens, int(id)), total + logp[id])
            for tokens, total, logp in rows
            for id in np.argsort(-logp)[:width]
        ]
        beams = sorted(texts, key=lambda text: -text[1])[:width]
    for branching in ("shared", "replicate"):
        result = generate(
            model,
            tokenizer,
            PROMPT,
            visibility="tree",
            threshold=1e-9,
            beam_width=width,
            max_parallel=width,
            max_tokens=steps,
            branching=branching,
        )
        found = {tuple(path.tokens): path.logprob for path in result.paths(width)}
        assert found.keys() == {tokens for tokens, _ in beams}
        for tokens, total in beams:
            assert found[tokens] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("visibility", mostly_slow(["tree", "recombined"], ["recombined"]))
def test_paths_are_scored_as_sequential_decodes(embedded, stock, visibility):
    model, tokenizer = embedded
    result = generate(
        model,
        tokenizer,
        PROMPT,
        visibility=visibility,
        threshold=0.05,
        beam_width=6,
        max_tokens=10,
        verify=True,
    )
    assert result.verification.max_logit_difference < 1e-3
    for path in result.paths(4):
        if not path.ended:
            assert path.logprob == pytest.approx(score(stock, path.tokens), abs=1e-3)


def test_search_weighs_what_the_model_says(embedded, stock):
    model, tokenizer = embedded
    result = search(
        model,
        tokenizer,
        PROMPT,
        max_tokens=4,
        simulations=16,
        evaluation="rollout",
        depth=3,
        leaves_per_batch=4,
    )
    for i, choice in enumerate(result.choices):
        logp = stock([c.id for c in result.choices[:i]])[-1]
        for child in choice.children:
            assert np.log(child["prior"]) == pytest.approx(logp[child["action"]], abs=1e-3)
    assert result.logprob == pytest.approx(score(stock, result.tokens), abs=1e-3)
