"""What changes a distribution before the threshold: mlx-lm's processors and filters, per branch."""

from dataclasses import replace

from tempo_mlx import Settings, batch_generate, generate
from tempo_mlx.doctor.random_models import random_model
from tempo_mlx.errors import TempoError
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler

pytestmark = pytest.mark.usefixtures("uncompiled")

PROMPT = [3, 9, 4, 9, 17, 4]
N = 12

PENALTIES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 1.4, "repetition_context_size": 3},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 0.9, "frequency_context_size": 7},
    {"logit_bias": {5: 9.0, 7: -2.0}},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {11: 2.0}},
]


@pytest.fixture(scope="module")
def model():
    return random_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return TinyTokenizer(60, ())


def stock(model, prompt, n, **arguments):
    steps = generate_step(mx.array(prompt), model, max_tokens=n, **arguments)
    return [int(token) for token, _ in steps]


def ids(result):
    return [step.tokens[0].id for step in result.lattice.steps]


def stock_logits(model, tokens):
    return np.array(model(mx.array(tokens)[None])[0, -1].astype(mx.float32), np.float64)


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("visibility", ["recombined", "isolated", "tree"])
def test_threshold_one_is_mlx_lm_with_the_same_processors(model, tokenizer, penalties, visibility):
    settings = {"threshold": 1.0, "max_tokens": N, "visibility": visibility}
    result = generate(model, tokenizer, PROMPT, **settings, **penalties)
    theirs = stock(model, PROMPT, N, logits_processors=make_logits_processors(**penalties))
    assert ids(result) == theirs
    assert theirs != stock(model, PROMPT, N)  # The penalties change this text.


def test_processors_of_python_see_the_tokens_that_mlx_lm_shows_them(model, tokenizer):
    def recorded(into):
        def processor(tokens, logits):
            into.append(tokens.tolist())
            return logits + mx.arange(logits.shape[-1]) % (len(tokens) % 3 + 1)

        return processor

    ours, theirs = [], []
    result = generate(
        model, tokenizer, PROMPT, threshold=1.0, max_tokens=N, logits_processors=(recorded(ours),)
    )
    found = stock(model, PROMPT, N, logits_processors=[recorded(theirs)])
    assert ids(result) == found
    assert ours == theirs[: len(ours)] and len(ours) == N


@pytest.mark.parametrize(
    "sampling",
    [{"temp": 0.8}, {"temp": 1.3, "top_p": 0.7}, {"temp": 1.0, "min_p": 0.2, "top_k": 5}],
    ids=str,
)
def test_a_sampler_draws_what_it_draws_for_mlx_lm(model, tokenizer, sampling):
    mx.random.seed(7)
    theirs = stock(model, PROMPT, N, sampler=make_sampler(**sampling))
    mx.random.seed(7)
    result = generate(
        model, tokenizer, PROMPT, threshold=1.0, max_tokens=N, sampler=make_sampler(**sampling)
    )
    assert ids(result) == theirs


def filtered(logits, top_p=0.0, min_p=0.0, min_tokens_to_keep=1, top_k=0):
    """Probabilities that the filters leave, renormalised; NumPy, float64."""
    logp = log_softmax(logits)
    p = np.exp(logp)
    order = np.argsort(-p, kind="stable")
    if 0 < top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
        logp[order[before >= top_p]] = -np.inf
    if min_p > 0:
        gone = logp < logp.max() + np.log(min_p)
        gone[order[:min_tokens_to_keep]] = False
        logp[gone] = -np.inf
    if top_k:
        logp[order[top_k:]] = -np.inf
    left = np.exp(logp)
    return left / left.sum()


FILTERS = [
    {"top_p": 0.6},
    {"top_k": 3},
    {"min_p": 0.3},
    {"min_p": 0.9, "min_tokens_to_keep": 2},
    {"top_p": 0.9, "min_p": 0.1, "top_k": 4},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_each_leaf_of_a_tree_goes_by_what_the_filters_leave_of_its_own(model, tokenizer, filters):
    result = generate(
        model, tokenizer, PROMPT, threshold=0.02, max_tokens=4, visibility="tree", beam_width=6,
        **filters,
    )  # fmt: skip
    several = 0
    for step in result.lattice.steps:
        for token in step.tokens:
            text = PROMPT + [each.id for each in result.lattice.tokens_to(token.parent)]
            logits = stock_logits(model, text)
            left = filtered(logits, **filters)
            assert token.probability == pytest.approx(left[token.id], abs=1e-4)
            assert token.probability >= 0.02
            several += left[token.id] < left.max()
            # Scored as the text that it is, by the model's own probabilities.
            own = log_softmax(logits)[token.id]
            before = result.lattice.tokens_to(token.parent)
            assert token.logprob - (before[-1].logprob if before else 0.0) == pytest.approx(
                own, abs=1e-4
            )
    assert several > 3


@pytest.mark.parametrize("filters", FILTERS[:3], ids=str)
def test_recombined_tokens_continue_only_texts_that_leave_them(model, tokenizer, filters):
    result = generate(model, tokenizer, PROMPT, threshold=0.02, max_tokens=6, **filters)
    assert max(len(step.tokens) for step in result.lattice.steps) > 1
    for step in result.lattice.steps:
        for token in step.tokens:
            text = PROMPT + [each.id for each in result.lattice.tokens_to(token.parent)]
            assert filtered(stock_logits(model, text), **filters)[token.id] > 0


def test_rows_of_a_batch_are_processed_by_their_own_settings(model, tokenizer):
    prompts = [PROMPT, PROMPT[:3], PROMPT, [8, 8, 1]]
    base = Settings(threshold=0.05, max_tokens=6)
    each = [
        base,
        replace(base, top_k=2, repetition_penalty=1.5),
        replace(base, logit_bias={4: 5.0}, threshold=1.0),
        replace(base, top_p=0.5, sampling="gumbel", seed=3, visibility="isolated"),
    ]
    batch = batch_generate(model, tokenizer, prompts, each)
    for prompt, settings, result in zip(prompts, each, batch.results, strict=True):
        alone = batch_generate(model, tokenizer, [prompt], settings).results[0]
        found = [[(t.id, round(t.probability, 4)) for t in s.tokens] for s in result.lattice.steps]
        assert found == [
            [(t.id, round(t.probability, 4)) for t in s.tokens] for s in alone.lattice.steps
        ]


def test_xtc_excludes_top_choices_as_often_as_it_should(model, tokenizer):
    settings = {"threshold": 1.0, "max_tokens": 1, "xtc_threshold": 0.05, "sampling": "gumbel"}
    logits = stock_logits(model, PROMPT)
    p = np.exp(log_softmax(logits))
    top = np.flatnonzero(p > 0.05)
    assert len(top) > 1
    removed = p > p[top].min()
    certain = [
        generate(model, tokenizer, PROMPT, **settings, xtc_probability=1.0, seed=seed)
        for seed in range(20)
    ]
    assert not any(removed[ids(result)[0]] for result in certain)
    half = [
        generate(model, tokenizer, PROMPT, **settings, xtc_probability=0.5, seed=seed)
        for seed in range(60)
    ]
    again = generate(model, tokenizer, PROMPT, **settings, xtc_probability=0.5, seed=4)
    assert ids(again) == ids(half[4])
    # Without XTC a removed token has probability p[removed].sum(); with it, half of that.
    drawn = np.mean([removed[ids(result)[0]] for result in half])
    expected = p[removed].sum() / 2
    assert abs(drawn - expected) < 4 * np.sqrt(expected * (1 - expected) / 60)


def test_what_was_removed_is_no_candidate_even_at_the_smallest_threshold(model, tokenizer):
    result = generate(model, tokenizer, PROMPT, threshold=1e-30, max_tokens=2, top_k=2)
    assert [len(step.tokens) for step in result.lattice.steps][0] == 2


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.6}, {"repetition_penalty": 1.7, "top_k": 3}], ids=str
)
def test_branches_in_rows_are_processed_as_those_of_one_sequence(model, tokenizer, filters):
    settings = {"threshold": 0.02, "max_tokens": 5, "visibility": "tree", "beam_width": 4}
    rows, shared = (
        generate(model, tokenizer, PROMPT, branching=branching, **settings, **filters).paths(4)
        for branching in ("replicate", "shared")
    )
    assert [path.tokens for path in rows] == [path.tokens for path in shared]
    assert [path.logprob for path in rows] == pytest.approx([p.logprob for p in shared], abs=1e-4)


def test_token_ids_that_the_model_lacks_are_refused(model, tokenizer):
    batch = batch_generate(
        model,
        tokenizer,
        [PROMPT, PROMPT],
        [Settings(max_tokens=2, logit_bias={500: 1.0}), Settings(max_tokens=2)],
    )
    assert "below 128" in str(batch.results[0].error) and "500" in str(batch.results[0].error)
    assert len(batch.results[1].lattice) == 2


def test_a_sampler_needs_one_token_a_step():
    sampler = make_sampler(temp=1.0)
    for wrong in ({"threshold": 0.5}, {"sampling": "gumbel"}, {"branching": "replicate"}):
        with pytest.raises(TempoError, match="sampler draws the one token"):
            Settings(**{"threshold": 1.0, "sampler": sampler, **wrong})


def test_more_tokens_to_keep_than_there_are_keeps_all(model, tokenizer):
    keep_all = {"min_p": 0.9, "min_tokens_to_keep": 10_000}
    free, kept = (
        generate(model, tokenizer, PROMPT, threshold=0.05, max_tokens=3, **given)
        for given in ({}, keep_all)
    )
    assert [[t.id for t in s.tokens] for s in free.lattice.steps] == [
        [t.id for t in s.tokens] for s in kept.lattice.steps
    ]


def test_the_seed_decides_what_xtc_does():
    assert Settings(xtc_probability=0.5, threshold=1.0).uses_rng
    assert not Settings(xtc_probability=0.5, seed=1).notes()
