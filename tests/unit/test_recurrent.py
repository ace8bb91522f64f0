"""Recurrent layers: a state for each branch, in trees, batches, prompt caches and searches."""

from tempo_mlx import PositionedModel, Settings, UnsupportedModelError, batch_generate, generate
from tempo_mlx.decoder import Decoder
from tempo_mlx.generation import begin
from tempo_mlx.prompt_cache import PromptCache
from tempo_mlx.pruning import Pruning
from tempo_mlx.run import Run
from tests.architectures import branches_difference
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

#: Attention beside a gated delta rule, a short convolution, a Mamba in every layer; Mamba alone.
NAMES = ["qwen3_next", "lfm2", "falcon_h1", "mamba"]
PROMPTS = [[3, 17, 41, 5, 22, 9], [4, 8], [3, 17, 41, 5, 22, 9], [11, 2, 7, 7, 30, 1, 6, 19, 5]]
TOKENIZER = TinyTokenizer(60, end_tokens=(59,))


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return PositionedModel(tiny_model(request.param, seed=1))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=6)
@pytest.mark.usefixtures("uncompiled")
def test_branches_of_random_trees_are_separate_decodes(model, seed):
    """Nodes are dropped half-way, any other may be continued: no state leaks into a sibling."""
    assert branches_difference(model, seed) < 5e-4


@pytest.mark.parametrize("visibility", ["tree", "recombined"])
@pytest.mark.parametrize("batch_size", [4, 2])
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
    chosen = Settings(max_tokens=9, threshold=1e-6, max_leaves=4, max_parallel=4, visibility="tree")
    run = Run(begin(model, TinyTokenizer(60, ()), PROMPTS[0], chosen))
    decoder = Decoder(model)
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
    one = Settings(max_tokens=4, threshold=1e-6, max_leaves=4, max_parallel=4, visibility="tree")
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


@pytest.mark.parametrize("visibility", ["isolated", "visible", "recombined"])
def test_at_threshold_one_every_visibility_is_plain_decoding(model, visibility):
    result = generate(
        model, TOKENIZER, PROMPTS[0], threshold=1.0, max_tokens=8, visibility=visibility,
        verify=True,
    )  # fmt: skip
    assert result.verification.max_logit_difference < 1e-3
    assert all(len(step.tokens) == 1 for step in result.lattice.steps)
