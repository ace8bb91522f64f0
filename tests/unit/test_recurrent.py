"""Recurrent layers: a state for each branch, in trees, batches, prompt caches and searches."""

import itertools

from tempo_mlx import (
    PositionedModel,
    Settings,
    UnsupportedModelError,
    batch_generate,
    generate,
    search,
    stream_generate,
)
from tempo_mlx.decode.decoder import BatchDecoder, CacheBudgetError
from tempo_mlx.decode.prompt_cache import PromptCache
from tempo_mlx.decode.request import Request
from tempo_mlx.decode.sequences import Batch
from tempo_mlx.generation import Failure, begin
from tempo_mlx.rules.pruning import Pruning
from tests.architectures import branches_difference
from tests.sweeps import mostly_slow
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

#: Attention beside a gated delta rule, a short convolution, a Mamba in every layer; Mamba alone;
#: ids of the last tokens, of which the first tokens of a text have fewer in mlx-lm.
NAMES = ["qwen3_next", "lfm2", "falcon_h1", "mamba", "longcat_flash_ngram"]
#: Those whose states are like another one's are left out.
FEW = ["qwen3_next", "lfm2", "longcat_flash_ngram"]
PROMPTS = [[3, 17, 41, 5, 22, 9], [4], [3, 17, 41, 5, 22, 9], [11, 2, 7, 7, 30, 1, 6, 19, 5]]
TOKENIZER = TinyTokenizer(60, end_tokens=(59,))


@pytest.fixture(scope="module", params=mostly_slow(NAMES, FEW))
def model(request):
    return PositionedModel(tiny_model(request.param, seed=1))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=6)
def test_branches_of_random_trees_are_separate_decodes(model, seed):
    """Nodes are dropped half-way, any other may be continued: no state leaks into a sibling."""
    assert branches_difference(model, seed) < 5e-4


@pytest.mark.parametrize("visibility", ["tree", "recombined"])
@pytest.mark.parametrize("batch_size", [2])
def test_every_row_of_a_batch_is_what_its_prompt_gives_alone(model, visibility, batch_size):
    each = [
        Settings(max_tokens=n, threshold=0.02, max_parallel=3, visibility=visibility)
        for n in (7, 9, 3, 5)
    ]
    batch = batch_generate(model, TOKENIZER, PROMPTS, each, batch_size=batch_size, verify=True)
    for prompt, chosen, found in zip(PROMPTS, each, batch.results, strict=True):
        alone = generate(model, TOKENIZER, prompt, **vars(chosen))
        assert [p.tokens for p in found.paths(9)] == [p.tokens for p in alone.paths(9)]
        np.testing.assert_allclose(
            [p.logprob for p in found.paths(9)], [p.logprob for p in alone.paths(9)], atol=1e-3
        )
        assert found.verification.max_logit_difference < 1e-3


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("more", [[], [12, 30], [12, 30, 8, 8, 2]])
def test_a_resumed_prompt_is_one_that_is_read_whole(model, tmp_path, saved, more):
    prompt = PROMPTS[3]
    cache = PromptCache.read(model, TOKENIZER, prompt, prefill_step_size=4)
    if saved:
        cache.save(tmp_path / "cache.safetensors")
        cache = PromptCache.load(tmp_path / "cache.safetensors", model)
    given_ = {"threshold": 0.02, "max_parallel": 3, "max_tokens": 6}
    whole = generate(model, TOKENIZER, [*prompt, *more], **given_)
    resumed = generate(model, TOKENIZER, [*prompt, *more], prompt_cache=cache, **given_)
    assert cache.covers([*prompt, *more]) == len(prompt) - 1
    assert [p.tokens for p in resumed.paths(9)] == [p.tokens for p in whole.paths(9)]
    np.testing.assert_allclose(
        [p.logprob for p in resumed.paths(9)], [p.logprob for p in whole.paths(9)], atol=1e-4
    )


def test_a_state_of_another_beginning_is_not_used(model):
    cache = PromptCache.read(model, TOKENIZER, PROMPTS[3])
    assert cache.covers(PROMPTS[3][:4]) == cache.covers([*PROMPTS[3][:-2], 1, 1, 1]) == 0


def test_states_live_as_long_as_they_can_be_continued(model):
    """Of a run, those of its last set: its memory does not grow with its length."""
    chosen = Settings(max_tokens=9, threshold=1e-6, beam_width=4, max_parallel=4, visibility="tree")
    run = Request(begin(model, TinyTokenizer(60, ()), PROMPTS[0], chosen))
    decoder = BatchDecoder(model)
    decoder.start([run])
    while decoder.reading:
        decoder.read()
    held = []
    while not run.finished:
        decoder.step()
        held.append(decoder.batch.cache.states.nbytes)
    assert model.state_bytes > 0
    assert set(held[:-1]) == {4 * model.state_bytes}


def test_a_budget_counts_states(model):
    one = Settings(max_tokens=4, threshold=1e-6, beam_width=4, max_parallel=4, visibility="tree")
    for n_states, fits in ((4, False), (9, True)):
        budget = 64 * model.slot_bytes + n_states * model.state_bytes
        if not fits:
            budget = (len(PROMPTS[0]) + 4) * model.slot_bytes + n_states * model.state_bytes
        batch = batch_generate(model, TinyTokenizer(60, ()), PROMPTS[:1], one, max_kv_bytes=budget)
        found = batch.results[0]
        assert len(found.lattice) == 4 if fits else "max_kv_bytes" in found.error


@pytest.mark.parametrize(
    "given_",
    [
        {"visibility": "isolated"},
        {"visibility": "visible"},
        {"visibility": "hidden"},
        {"pruning": Pruning()},
        {"temp": 0.5},
        {"weighting": "prior"},
    ],
)
def test_sets_that_are_seen_whole_are_refused(model, given_):
    with pytest.raises(UnsupportedModelError, match="recombined or tree"):
        generate(model, TOKENIZER, PROMPTS[0], threshold=0.1, **given_)


PLAIN = [
    {"visibility": "isolated", "threshold": 1.0, "stop": ("}",)},
    {"visibility": "visible", "threshold": 1.0, "temp": 0.5},
    {"visibility": "hidden", "max_parallel": 1, "pruning": Pruning()},
    {"visibility": "recombined", "threshold": 1.0},
]


@pytest.mark.parametrize(
    ("given_", "paths"),
    mostly_slow(itertools.product(PLAIN, [0, 2]), list(zip(PLAIN, [0, 2, 0, 2], strict=True))),
)
def test_with_one_token_a_step_every_visibility_is_plain_decoding(model, given_, paths):
    results = []
    for response in stream_generate(
        model, TOKENIZER, PROMPTS[0], max_tokens=8, verify=True, paths=paths, **given_
    ):
        results.append(response.result)
    result = results[-1]
    assert result.verification.max_logit_difference < 1e-3
    assert all(len(tokens) == 1 for tokens in result.lattice.sets)
    [path] = result.find_paths(2)
    assert path.tokens == [tokens[0].id for tokens in result.lattice.sets]
    if not path.ended:
        assert path.logprob == pytest.approx(logprob(model, PROMPTS[0], path.tokens), abs=1e-3)
    [alone] = batch_generate(
        model, TOKENIZER, PROMPTS[:1], max_tokens=8, verify=True, paths=paths, **given_
    ).results
    assert alone.find_paths(2)[0].tokens == path.tokens


def test_models_without_attention_say_that_they_have_none():
    mamba = PositionedModel(tiny_model("mamba"))
    with pytest.raises(UnsupportedModelError, match="no attention to capture"):
        mamba.require_capture()
    with pytest.raises(UnsupportedModelError, match="no keys to weigh"):
        mamba.require_additive_masks()


def test_attention_received_is_refused(model):
    result = generate(model, TOKENIZER, PROMPTS[0], threshold=0.1, max_tokens=2)
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        result.received_attention()


def logprob(model, prompt, tokens):
    """Of the tokens behind the prompt, by one pass of mlx-lm's own model."""
    logits = model.model(mx.array([*prompt, *tokens])[None], cache=make_prompt_cache(model.model))
    rows = np.array(logits[0, len(prompt) - 1 : -1].astype(mx.float32), np.float64)
    rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
    return rows[np.arange(len(tokens)), tokens].sum()


@pytest.fixture
def held(monkeypatch):
    """Bytes of the caches of all passes that branch."""
    append, found = Batch.append, []

    def watched(self, tokens, parts, *args, **options):
        outcome = append(self, tokens, parts, *args, **options)
        if any((queries.step >= 0).any() for _, queries in parts):
            found.append(self.cache.nbytes)
        return outcome

    monkeypatch.setattr(Batch, "append", watched)
    return found


def test_a_search_stays_within_its_budget(model, held):
    chosen = {"max_tokens": 3, "simulations": 12, "threshold": 0.01, "max_parallel": 4}
    free = search(model, TOKENIZER, PROMPTS[0], **chosen)
    unbounded = max(held)
    refused = passed = 0
    for share in np.linspace(0.05, 1, 12):
        held.clear()
        budget = int(share * unbounded)
        try:
            bounded = search(model, TOKENIZER, PROMPTS[0], max_kv_bytes=budget, **chosen)
        except CacheBudgetError:
            refused += 1
        else:
            passed += 1
            assert bounded.tokens == free.tokens
        assert max(held, default=0) <= budget
    # Some of what an unbounded search holds is room for more.
    assert refused and passed > 1


def test_a_batch_stays_within_its_budget(model, held):
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    one = Settings(max_tokens=5, threshold=1e-6, beam_width=3, max_parallel=3, visibility="tree")
    free = batch_generate(model, TOKENIZER, prompts, one)
    unbounded, outcomes = max(held), set()
    for share in np.geomspace(0.01, 1, 6):
        held.clear()
        budget = int(share * unbounded)
        bounded = batch_generate(model, TOKENIZER, prompts, one, max_kv_bytes=budget)
        assert max(held, default=0) <= budget
        for found, expected in zip(bounded.results, free.results, strict=True):
            outcomes.add(type(found))
            if not isinstance(found, Failure):
                assert found.paths(3)[0].tokens == expected.paths(3)[0].tokens
    assert len(outcomes) == 2
