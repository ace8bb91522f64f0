"""The loop on tiny random models, against stock mlx-lm and against its own definitions."""

import json
from dataclasses import dataclass
from typing import ClassVar

from tempo_mlx import Settings, batch_generate
from tempo_mlx.errors import TempoError
from tempo_mlx.generation import generate, stream_generate
from tempo_mlx.lattice.lattice import Lattice
from tempo_mlx.models import PositionedModel
from tempo_mlx.rules.combining import COMBINE, combine
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Bezier, Constant
from tempo_mlx.rules.selection import NonFiniteLogitsError
from tempo_mlx.rules.visibility import VISIBILITY, Visibility
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..one_sequence import SETS_VISIBILITY, OneSequence, SeesSiblings

PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    # No end tokens: runs have the length that the test asks for.
    return TinyTokenizer(model.args.vocab_size, end_tokens=())


def stock_logits(model, tokens):
    """Last row of a plain pass of the stock model, with the stock cache."""
    return np.array(model(mx.array(tokens)[None], cache=make_prompt_cache(model))[0, -1])


def tokens_of(result):
    return [[token.id for token in step.tokens] for step in result.lattice.steps]


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
def test_cached_run_equals_one_uncached_pass(model, tokenizer, visibility, combine):
    result = generate(
        model,
        tokenizer,
        PROMPT,
        threshold=0.05,
        max_tokens=15,
        max_parallel=4,
        visibility=visibility,
        combine=combine,
        verify=True,
    )
    assert any(len(tokens) > 1 for tokens in tokens_of(result))
    # The last set is never read, the prompt's last token is.
    assert result.verification.rows == result.lattice.n_tokens - len(tokens_of(result)[-1]) + 1
    assert result.verification.max_logit_difference < 1e-4


@pytest.mark.parametrize("name", ["longcat_flash", "gemma3_text", "afm7"])
def test_layers_with_several_caches_windows_or_none_are_replayed(name):
    model = PositionedModel(tiny_model(name))
    settings = {"threshold": 0.02, "max_parallel": 4, "max_tokens": 3, "visibility": "visible"}
    prompt = list(range(3, 17))
    result = generate(model, TinyTokenizer(model.vocabulary_size), prompt, verify=True, **settings)
    assert result.verification.max_logit_difference < 1e-4


def test_verification_notices_a_wrong_run(model, tokenizer, monkeypatch):
    # A run that lets siblings see each other, verified as if it had isolated them.
    monkeypatch.setitem(VISIBILITY, "isolated", SeesSiblings())
    given = {"threshold": 0.05, "max_tokens": 6, "visibility": "isolated"}
    result = generate(model, tokenizer, PROMPT, verify=True, **given)
    assert result.verification.max_logit_difference > 1e-2


@dataclass(frozen=True)
class Nearest(Visibility):
    """A token sees the prompt and the steps before it that are at most so many steps away."""

    steps: int = 2
    masks_siblings: ClassVar[bool] = False

    def allowed(self, queries, keys):
        age = queries.step[:, None] - keys.step
        near = (keys.step < 0) | (age <= self.steps)
        return near & (age >= 0) if self.masks_siblings else near & (age > 0)

    def sees(self, query, key):
        return key.step < 0 or 0 < query.step - key.step <= self.steps


class Faulty(Nearest):
    """A rule whose masks let siblings see each other, which its definition does not."""

    masks_siblings = True


@pytest.mark.parametrize("max_parallel", [1, 4])
@pytest.mark.parametrize("weighting", ["none", "posterior"])
@pytest.mark.parametrize("pruning", [None, Pruning(schedule=Constant(), repair="recompute")])
def test_a_visibility_of_the_users_own_is_verified(
    model, tokenizer, max_parallel, weighting, pruning
):
    given = {"threshold": 0.05, "max_tokens": 12, "max_parallel": max_parallel}
    given |= {"weighting": weighting, "pruning": pruning}
    result = generate(model, tokenizer, PROMPT, visibility=Nearest(), verify=True, **given)
    assert result.verification.max_logit_difference < 1e-4
    assert result.to_dict(0)["settings"]["visibility"] == "Nearest(steps=2)"
    plain = generate(model, tokenizer, PROMPT, visibility="isolated", **given)
    assert result.lattice.steps != plain.lattice.steps
    prompts = [PROMPT, PROMPT[:5]]
    batch = batch_generate(
        model, tokenizer, prompts, Settings(visibility=Nearest, **given), verify=True
    )
    for each in batch.results:
        assert each.verification.max_logit_difference < 1e-4
    assert batch.results[0].lattice.steps[5].tokens[0].id == result.lattice.steps[5].tokens[0].id


def test_a_visibility_whose_masks_are_not_its_definition_is_found_out(model, tokenizer):
    result = generate(
        model, tokenizer, PROMPT, visibility=Faulty(), verify=True, threshold=0.05, max_tokens=6
    )
    assert result.verification.max_logit_difference > 1e-2


def test_a_visibility_without_a_definition_runs_and_is_not_verified(model, tokenizer):
    def near(queries, keys):
        age = queries.step[:, None] - keys.step
        return (age > 0) & (age < 3)

    given = {"visibility": near, "threshold": 0.05, "max_tokens": 6}
    result = generate(model, tokenizer, PROMPT, **given)
    assert len(result.lattice) == 6 and any(len(tokens) > 1 for tokens in result.lattice.sets)
    assert result.to_dict(0)["settings"]["visibility"] == "near"
    with pytest.raises(ValueError, match=r"sees\(query, key\), which near has not"):
        generate(model, tokenizer, PROMPT, verify=True, **given)
    with pytest.raises(ValueError, match="attention received"):
        result.received_attention()
    batch = batch_generate(model, tokenizer, [PROMPT], Settings(**given), verify=True)
    assert "near" in batch.results[0].error


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (lambda queries, keys: keys.step < 3, ["booleans [", "got bool ["]),
        (lambda queries, keys: 1 / 0, ["raised ZeroDivisionError"]),
    ],
)
def test_a_visibility_that_returns_no_mask_is_named(model, tokenizer, allowed, words):
    with pytest.raises(TempoError) as caught:
        generate(model, tokenizer, PROMPT, visibility=allowed, threshold=0.05, max_tokens=4)
    assert all(word in str(caught.value) for word in ["<lambda>", *words])


@pytest.mark.parametrize("threshold", [1.0, 0.02])
def test_a_run_of_one_step_is_verified(model, tokenizer, threshold):
    result = generate(
        model,
        tokenizer,
        PROMPT,
        threshold=threshold,
        max_tokens=1,
        verify=True,
        visibility="visible",
    )
    assert result.verification.rows == 1
    assert result.verification.max_logit_difference < 1e-4


def test_threshold_one_is_greedy_decoding(model, tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(5):
        prompt = rng.integers(0, model.args.vocab_size, 9).tolist()
        result = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=20)
        steps = generate_step(mx.array(prompt), model, max_tokens=20)
        assert tokens_of(result) == [[int(token)] for token, _ in steps]


@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
def test_rows_after_the_first_set_are_separate_decodes_only_where_isolated(model, visibility):
    model_ = PositionedModel.of(model)
    lattice = Lattice(PROMPT)
    state = OneSequence(model_, lattice, visibility)
    state.prefill(2048)
    siblings = [4, 20, 11]
    logits, _ = state.append(mx.array(siblings), lattice.reserve(3, 0))
    rows = np.array(logits)
    separate = np.array([stock_logits(model, [*PROMPT, token]) for token in siblings])
    if visibility == "visible":
        assert np.abs(rows - separate).max() > 1e-2
    else:
        np.testing.assert_allclose(rows, separate, atol=1e-4)


def test_hidden_makes_the_next_step_blind_to_the_set(model):
    model_ = PositionedModel.of(model)

    def next_row(visibility, siblings):
        lattice = Lattice(PROMPT)
        state = OneSequence(model_, lattice, visibility)
        state.prefill(2048)
        state.append(mx.array(siblings), lattice.reserve(len(siblings), 0))
        return np.array(state.append(mx.array([7]), lattice.reserve(1, 1))[0][0])

    np.testing.assert_array_equal(next_row("hidden", [4, 20]), next_row("hidden", [11, 30]))
    assert np.abs(next_row("isolated", [4, 20]) - next_row("isolated", [11, 30])).max() > 1e-2
    # A set of one is an ordinary token and stays visible.
    assert np.abs(next_row("hidden", [4]) - next_row("hidden", [11])).max() > 1e-2


def test_order_of_a_set_changes_rounding_only(model):
    model_ = PositionedModel.of(model)
    weights = {4: 0.5, 20: 0.3, 11: 0.2}

    def next_distribution(order):
        lattice = Lattice(PROMPT)
        state = OneSequence(model_, lattice, "isolated")
        state.prefill(2048)
        logits, _ = state.append(mx.array(order), lattice.reserve(3, 0))
        return np.array(combine(logits, ["mixture"], [np.array([weights[t] for t in order])])[0])

    first = next_distribution([4, 20, 11])
    for order in ([20, 11, 4], [11, 20, 4]):
        np.testing.assert_allclose(next_distribution(order), first, atol=1e-6)


def test_prefill_in_chunks_changes_rounding_only(model, tokenizer):
    whole = generate(model, tokenizer, PROMPT, threshold=0.05, max_tokens=8)
    for size in (1, 4, 12):
        chunked = generate(
            model, tokenizer, PROMPT, threshold=0.05, max_tokens=8, prefill_step_size=size
        )
        assert tokens_of(chunked) == tokens_of(whole)


def test_same_seed_same_lattice_and_another_seed_another_one(model, tokenizer):
    def run(seed):
        return tokens_of(
            generate(
                model,
                tokenizer,
                PROMPT,
                threshold=0.3,
                max_tokens=12,
                max_parallel=3,
                sampling="gumbel",
                seed=seed,
            )
        )

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_every_allowed_seed_draws(model, tokenizer, seed):
    pruning = Pruning(rule="random", decision="sigmoid", steepness=5.0)
    given = {"sampling": "gumbel", "pruning": pruning, "threshold": 0.02, "max_tokens": 5}
    one, same = (generate(model, tokenizer, PROMPT, seed=seed, **given) for _ in range(2))
    assert tokens_of(one) == tokens_of(same) and one.settings.seed == seed
    assert json.loads(json.dumps(one.to_dict()))["settings"]["seed"] == seed


def test_seed_changes_nothing_without_sampling(model, tokenizer):
    one = generate(model, tokenizer, PROMPT, threshold=0.1, max_tokens=8, seed=1)
    two = generate(model, tokenizer, PROMPT, threshold=0.1, max_tokens=8, seed=2)
    assert tokens_of(one) == tokens_of(two)


def test_end_of_text_ends_where_it_is_most_probable_and_is_recorded(model):
    size = model.args.vocab_size
    plain = generate(
        model, TinyTokenizer(size, ()), PROMPT, threshold=0.05, max_tokens=8, combine="mixture"
    )
    sets = tokens_of(plain)
    # Make the best token of the fourth set an end token, one that came up nowhere earlier.
    at = next(i for i, ids in enumerate(sets) if i > 1 and ids[0] not in sum(sets[:i], []))
    ending = sets[at][0]
    ended = generate(model, TinyTokenizer(size, (ending,)), PROMPT, threshold=0.05, max_tokens=8)
    assert tokens_of(ended) == [*sets[:at], []]
    assert [e.id for e in ended.lattice.steps[-1].endings] == [ending]
    assert ended.finish_reason == "stop" and plain.finish_reason == "length"


def test_end_of_text_that_is_not_the_best_is_recorded_and_the_others_go_on(model):
    size = model.args.vocab_size
    sets = tokens_of(generate(model, TinyTokenizer(size, ()), PROMPT, threshold=0.05, max_tokens=8))
    at, ending = next(
        (i, ids[1])
        for i, ids in enumerate(sets)
        if len(ids) > 1 and ids[1] not in sum(sets[:i], [])
    )
    run = generate(model, TinyTokenizer(size, (ending,)), PROMPT, threshold=0.05, max_tokens=8)
    step = run.lattice.steps[at]
    assert [e.id for e in step.endings] == [ending] and step.endings[0].probability >= 0.05
    assert [t.id for t in step.tokens] == [i for i in sets[at] if i != ending]
    assert len(run.lattice.steps) > at + 1


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_stop_text_ends_the_run(model, tokenizer, threshold):
    full = generate(model, tokenizer, PROMPT, threshold=threshold, max_tokens=10)
    spelled = "".join(step.tokens[0].text for step in full.lattice.steps)
    stopped = generate(
        model, tokenizer, PROMPT, threshold=threshold, max_tokens=10, stop=(spelled[2:4],)
    )
    first = spelled.index(spelled[2:4]) + 2
    assert len(stopped.lattice) == first and stopped.finish_reason == "stop"


def test_generation_ends_with_the_context(tokenizer):
    model = tiny_model("llama", seed=1, max_position_embeddings=len(PROMPT) + 4)
    result = generate(model, tokenizer, PROMPT, max_tokens=50)
    assert result.finish_reason == "context" and len(result.lattice) == 4
    with pytest.raises(ValueError, match=r"17 tokens.*context holds 17"):
        generate(model, tokenizer, PROMPT + [1] * 4, max_tokens=5)


def test_threshold_follows_its_schedule(model, tokenizer):
    curve = Bezier(0.1, 0.9)
    result = generate(
        model,
        tokenizer,
        PROMPT,
        threshold=0.4,
        final_threshold=0.02,
        schedule=curve,
        max_tokens=6,
    )
    for i, step in enumerate(result.lattice.steps):
        assert step.threshold == pytest.approx(0.4 + (0.02 - 0.4) * curve(i / 6))
        assert all(token.probability >= step.threshold for token in step.tokens[1:])


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_damaged_weights_are_an_error(tokenizer, threshold):
    model = tiny_model("llama", seed=2)
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(NonFiniteLogitsError):
        generate(model, tokenizer, PROMPT, threshold=threshold, max_tokens=3)


@pytest.mark.parametrize("prompt", ["", [], [10**6], [-1]])
def test_bad_prompts_are_refused(model, tokenizer, prompt):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, tokenizer, prompt)


def test_one_response_a_step_and_the_last_says_why(model, tokenizer):
    responses = list(stream_generate(model, tokenizer, PROMPT, max_tokens=5))
    assert [r.step.step for r in responses] == list(range(5))
    assert [r.finish_reason for r in responses] == [None] * 4 + ["length"]


def test_one_forward_pass_a_step(model, tokenizer, monkeypatch):
    positioned = PositionedModel.of(model)
    calls = []
    forward = PositionedModel.__call__

    def counting(self, tokens, *args, **kwargs):
        calls.append(tokens.shape)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(PositionedModel, "__call__", counting)
    result = generate(positioned, tokenizer, PROMPT, threshold=0.05, max_tokens=10, draft="none")
    sizes = [len(ids) for ids in tokens_of(result)]
    assert calls == [(1, len(PROMPT) - 1), (1, 1)] + [(1, n) for n in sizes[:-1]]


@pytest.mark.parametrize("threshold", [1.0, 0.05])
def test_buffers_are_not_copied_at_every_step(model, tokenizer, threshold):
    responses = stream_generate(
        model, tokenizer, PROMPT, threshold=threshold, max_parallel=3, max_tokens=30
    )
    # Of the prompt's size before they have to grow, then of a block.
    assert len({response.cache_bytes for response in responses}) <= 2


def test_dictionary_is_json_of_schema_two(model, tokenizer):
    result = generate(model, tokenizer, PROMPT, threshold=0.05, max_tokens=6, verify=True)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["schema"] == 2
    assert data["prompt_tokens"] == PROMPT
    assert data["settings"]["threshold"] == 0.05
    slots = [token["slot"] for step in data["steps"] for token in step["tokens"]]
    assert slots == list(range(len(PROMPT), len(PROMPT) + len(slots)))
    assert [step["position"] for step in data["steps"]] == list(range(13, 19))
    assert set(data["steps"][0]["tokens"][0]) == {
        "id", "text", "bytes", "probability", "slot", "parent", "logprob",
        "pruned_at", "pruned_by", "score",
    }  # fmt: skip
    assert data["text"] == data["paths"][0]["text"]
    assert data["stats"]["peak_memory_gb"] > 0
    assert set(data["stats"]) == {
        "prompt_tps", "steps_per_second", "tokens_per_second", "peak_memory_gb",
        "drafted_tokens", "accepted_tokens",
    }  # fmt: skip


def test_wrapping_twice_and_stock_use_afterwards_change_nothing(model):
    before = stock_logits(model, PROMPT)
    PositionedModel(PositionedModel(model).model)
    np.testing.assert_array_equal(stock_logits(model, PROMPT), before)
