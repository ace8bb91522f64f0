"""Drafted runs against plain ones; the parts of a draft against brute force."""

import itertools
import random

from tempo_mlx import PositionedModel, batch_generate, generate, stream_generate
from tempo_mlx.decode import decoder
from tempo_mlx.decode.decoder import BatchDecoder
from tempo_mlx.drafts import (
    TEXT,
    Candidate,
    Drafter,
    FollowerTable,
    PassCosts,
    SuffixLookup,
    TokenRecycling,
    costs,
    plan,
)
from tempo_mlx.drafts.draft import LEAST_GAIN
from tempo_mlx.settings import Settings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..sweeps import mostly_slow
from ..tiny_models import tiny_model
from ..tiny_tokenizer import TinyTokenizer
from .test_batching import rows

#: Dense, sliding windows that are crossed, latent attention, layers that share keys.
ARCHITECTURES = ["llama", "gemma3_text", "deepseek_v2", "gpt2", "gpt_oss", "gemma3n", "qwen3_5"]

MODEL = PositionedModel(tiny_model("llama", seed=1))
TOKENIZER = TinyTokenizer(MODEL.vocabulary_size, end_tokens=(7, 30))
PROMPT = [5, 9, 2, 40, 11, 5, 9, 2, 41]
V = MODEL.vocabulary_size
CHEAP = PassCosts((1, 64), (1.0, 1.5))

#: What runs: one token a step or sets, plain and drawn, with and without parents.
RUNS = {
    "greedy": {"threshold": 1.0},
    "drawn": {"max_parallel": 1, "sampling": "gumbel", "temp": 0.7},
    "processed": {"threshold": 1.0, "repetition_penalty": 1.3, "top_k": 20},
    "excluded": {"threshold": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.2},
    "recombined": {"threshold": 0.1},
    "tree": {"threshold": 0.1, "visibility": "tree", "beam_width": 3},
    "isolated": {"threshold": 0.1, "visibility": "isolated"},
    "visible": {"threshold": 0.1, "visibility": "visible"},
    "hidden": {"threshold": 0.1, "visibility": "hidden"},
}


@pytest.fixture
def cheap(monkeypatch):
    """Passes over many tokens cost little, so that whatever may be drafted is."""
    monkeypatch.setattr(decoder, "pass_costs", lambda model: CHEAP)


class Guesses:
    """A source that knows what comes, and says so now and then, beside tokens that do not come.

    Args:
        text: prompt and what follows it in a plain run.
        right: probability that a guess is right; 0 is always wrong.
    """

    def __init__(self, text, n, right, seed):
        self.text, self.n, self.right = list(text), n, right
        self.rng = random.Random(seed)

    def append(self, token, alone=True):
        self.n += 1

    def begin(self):
        return self.n, True

    def candidates(self, place):
        n, on_path = place
        coming = self.text[n] if on_path and n < len(self.text) else None
        tokens = {self.rng.randrange(V) for _ in range(self.rng.randint(0, 2))} - {coming}
        if coming is not None and self.rng.random() < self.right:
            tokens.add(coming)
        tokens = self.rng.sample(sorted(tokens), len(tokens))
        return [Candidate(t, 0.9 / len(tokens), (n + 1, t == coming)) for t in tokens]


def first_tokens(result):
    return [step.tokens[0].id for step in result.lattice.steps if step.tokens]


def guess(monkeypatch, plain, right, seed):
    """Let every run be drafted by what a plain run made of it."""
    prompt = plain.lattice.prompt_tokens
    text = [*prompt, *first_tokens(plain)]
    monkeypatch.setattr(
        BatchDecoder,
        "_drafter",
        lambda self, request: (
            Drafter([Guesses(text, len(prompt), right, seed)], 16) if request.can_draft else None
        ),
    )


def counted(monkeypatch):
    """Tokens of every pass from now on."""
    passes, forward = [], PositionedModel.__call__

    def call(self, tokens, *args, **kwargs):
        passes.append(tokens.size)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(PositionedModel, "__call__", call)
    return passes


def assert_same(found, expected):
    """The same lattice, probabilities but for the rounding of another number of rows."""
    assert found.finish_reason == expected.finish_reason
    assert [[t.id for t in s.tokens] for s in found.lattice.steps] == [
        [t.id for t in s.tokens] for s in expected.lattice.steps
    ]
    for step, other in zip(found.lattice.steps, expected.lattice.steps, strict=True):
        assert (step.step, step.position, step.threshold) == (
            other.step,
            other.position,
            other.threshold,
        )
        for token, same in zip(step.tokens, other.tokens, strict=True):
            assert token.probability == pytest.approx(same.probability, abs=1e-4)
            assert (token.slot, token.parent) == (same.slot, same.parent)
            assert token.logprob == (same.logprob and pytest.approx(same.logprob, abs=1e-3))
        assert [each.id for each in step.endings] == [each.id for each in other.endings]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("right", [0.0, 0.8, 1.0])
def test_a_drafted_run_is_the_plain_one(cheap, monkeypatch, name, right):
    given_ = RUNS[name] | {"max_tokens": 24, "seed": 3}
    plain = generate(MODEL, TOKENIZER, PROMPT, draft="none", **given_)
    guess(monkeypatch, plain, right, seed=1)
    passes = counted(monkeypatch)
    drafted = generate(MODEL, TOKENIZER, PROMPT, verify=name != "drawn", paths=0, **given_)
    assert_same(drafted, plain)
    assert max(passes[2:]) > 1 and (right < 1 or len(passes) < len(plain.lattice.steps))
    if drafted.verification is not None:
        assert drafted.verification.max_logit_difference < 1e-3


@pytest.mark.parametrize("name", mostly_slow(ARCHITECTURES, ["gemma3_text", "deepseek_v2"]))
@pytest.mark.parametrize("run", ["greedy", "recombined", "isolated"])
def test_every_kind_of_layer_drafts_exactly(cheap, monkeypatch, uncompiled, name, run):
    model = PositionedModel(tiny_model(name, seed=1))
    tokenizer = TinyTokenizer(model.vocabulary_size, end_tokens=(0,))
    if model.is_recurrent and run == "isolated":
        pytest.skip("merged sets have no exact meaning for recurrent layers")
    prompt = [id % model.vocabulary_size for id in PROMPT]
    given_ = RUNS[run] | {"max_tokens": 20}
    plain = generate(model, tokenizer, prompt, draft="none", paths=0, **given_)
    guess(monkeypatch, plain, 0.8, seed=2)
    passes = counted(monkeypatch)
    assert_same(generate(model, tokenizer, prompt, paths=0, **given_), plain)
    # A recurrent layer would need a state for every drafted token, one after another.
    assert (max(passes[2:]) > 1) is not (model.is_recurrent and run == "greedy")


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from(sorted(RUNS)), st.floats(0, 1))
def test_any_tree_of_guesses_changes_nothing(seed, name, right):
    given_ = RUNS[name] | {"max_tokens": 12, "seed": seed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "pass_costs", lambda model: CHEAP)
        plain = generate(MODEL, TOKENIZER, PROMPT, draft="none", **given_)
        guess(patch, plain, right, seed)
        assert_same(generate(MODEL, TOKENIZER, PROMPT, paths=0, **given_), plain)


@settings(max_examples=6)
@given(st.lists(rows, min_size=1, max_size=7), st.integers(1, 4), st.integers(40, 4000))
def test_rows_of_a_batch_draft_beside_each_other(prompts, batch_size, slots):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "pass_costs", lambda model: CHEAP)
        texts, each = [prompt for prompt, _ in prompts], [one for _, one in prompts]
        batch = batch_generate(
            MODEL,
            TOKENIZER,
            texts,
            each,
            batch_size=batch_size,
            max_kv_bytes=slots * MODEL.slot_bytes,
            paths=0,
        )
        for result, prompt, one in zip(batch.results, texts, each, strict=True):
            if hasattr(result, "lattice"):
                plain = {**vars(one), "draft": "none"}
                assert_same(result, generate(MODEL, TOKENIZER, prompt, paths=0, **plain))


@pytest.mark.parametrize("draft", ["lookup", "recycle", "auto"])
def test_what_is_copied_takes_few_passes(cheap, monkeypatch, draft):
    # Biases leave three tokens, so that the text soon repeats itself.
    bias = dict.fromkeys(range(50, 53), 60.0)
    common = {"threshold": 1.0, "max_tokens": 60, "logit_bias": bias}
    plain = generate(MODEL, TOKENIZER, PROMPT, draft="none", **common)
    passes = counted(monkeypatch)
    drafted = generate(MODEL, TOKENIZER, PROMPT, draft=draft, **common)
    assert_same(drafted, plain)
    assert len(passes) < 50
    stats, sets = drafted.stats, len(plain.lattice.steps)
    # Every token but the first and the last was read in a pass for it, or drafted.
    assert stats.accepted_tokens == sets - 1 - (len(passes) - 2)
    assert stats.drafted_tokens >= stats.accepted_tokens


def test_responses_say_what_is_held(cheap, monkeypatch):
    plain = generate(MODEL, TOKENIZER, PROMPT, threshold=1.0, max_tokens=12, draft="none")
    guess(monkeypatch, plain, 1.0, seed=1)
    held = [
        response.slots_held
        for response in stream_generate(MODEL, TOKENIZER, PROMPT, threshold=1.0, max_tokens=12)
    ]
    assert held == [len(PROMPT) + n for n in range(1, len(held))] + [len(PROMPT) + len(held) - 1]


def brute_matches(text):
    """For each earlier place: the tokens that agree before it and the end, at least two."""
    found = {}
    for end in range(2, len(text)):
        n = 0
        while n < end and text[end - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        if n >= 2:
            found[end] = n
    return found


@given(st.lists(st.integers(0, 2), min_size=2, max_size=40))
def test_the_longest_suffixes_are_looked_up(text):
    lookup = SuffixLookup(text)
    expected = brute_matches(text)
    matches, after = lookup.begin()
    assert after == ()
    assert all(expected[match.next] == match.length for match in matches)
    assert len(matches) == min(len(expected), 8)
    if expected:
        assert matches[0].length == max(expected.values())
        tokens = [candidate.token for candidate in lookup.candidates(lookup.begin())]
        assert tokens[0] == text[matches[0].next]
        assert set(tokens) == {text[match.next] for match in matches}


def test_a_lookup_learns_how_far_to_trust_it():
    copies, surprises = SuffixLookup([1, 2, 3, 4] * 12), SuffixLookup([1, 2, 9, 1, 2, 8])
    assert copies.candidates(copies.begin())[0].chance > 0.8
    for token in (1, 2, 7, 1, 2, 6, 1, 2, 5, 1, 2):
        surprises.append(token)
    assert sum(c.chance for c in surprises.candidates(surprises.begin())) < 0.7


@pytest.mark.parametrize("alone", [True, False])
def test_guesses_of_one_of_several_tokens_are_wrong(alone):
    lookup, table = SuffixLookup([1, 2, 3, 1, 2, 3]), FollowerTable(10)
    recycling = TokenRecycling(table, [3])
    for token in [1, 2, 3] * 20:
        lookup.append(token, alone)
        recycling.append(token, alone)
        table.note(token, np.array([token % 3 + 1, 0]))
    for source in (lookup, recycling):
        best = source.candidates(source.begin())[0]
        assert best.token == 1 and (best.chance > 0.9 if alone else best.chance < 0.2)


def test_a_lookup_runs_on_into_its_own_draft():
    lookup = SuffixLookup([3, 1, 2, 1, 2])
    place, found = lookup.begin(), []
    for _ in range(6):
        candidate = lookup.candidates(place)[0]
        found.append(candidate.token)
        place = candidate.place
    assert found == [1, 2, 1, 2, 1, 2]


def test_recycled_followers_are_the_last_seen():
    table = FollowerTable(10)
    source = TokenRecycling(table, [4])
    assert source.candidates(source.begin()) == []
    table.note(4, np.array([1, 2]))
    table.note(5, np.array([3, 0]))
    table.note(4, np.array([6, 2]))
    assert [c.token for c in source.candidates(source.begin())] == [6, 2]
    source.append(5)
    assert [c.token for c in source.candidates(source.begin())] == [3, 0]


def test_recycling_learns_from_guesses_not_from_what_was_computed_since():
    table = FollowerTable(10)
    source = TokenRecycling(table, [4])
    for follower in (1, 2, 1, 2, 1, 2):
        # The row of token 4 says what comes, and what comes differs every time.
        table.note(4, np.array([follower, 0]))
        source.append(follower)
        table.note(follower, np.array([4, 0]))
        source.append(4)
    after_4, after_1 = (table.candidates(token)[0].chance for token in (4, 1))
    assert after_4 == after_1 and 0.3 < after_4 < 0.8


class Fixed:
    """A source whose candidates are written down: path -> {token: chance}."""

    def __init__(self, tree):
        self.tree = tree

    def append(self, token, alone=True):
        raise AssertionError

    def begin(self):
        return ()

    def candidates(self, place):
        return [Candidate(t, p, (*place, t)) for t, p in self.tree.get(place, {}).items()]


trees = st.dictionaries(
    st.sampled_from([(), (0,), (1,), (0, 0), (0, 1), (1, 0)]),
    st.sampled_from([{0: 0.9}, {0: 0.5, 1: 0.4}, {0: 0.3, 1: 0.3}, {1: 0.35}]),
)


def paths_of(tree):
    """Every path of a tree and its probability."""
    found = {}
    frontier = [((), 1.0)]
    while frontier:
        path, chance = frontier.pop()
        for token, p in tree.get(path, {}).items():
            found[(*path, token)] = chance * p
            frontier.append(((*path, token), chance * p))
    return found


@given(trees, st.sampled_from([1.05, 1.2, 1.5, 2.0]), st.integers(1, 3))
def test_the_planned_draft_yields_most_tokens_for_its_cost(tree, slope, rows):
    cost = PassCosts((1, 11), (1.0, slope))
    draft = plan([Drafter([Fixed(tree)])], rows, cost, [9])[0]
    chances = paths_of(tree)
    best = LEAST_GAIN / cost(rows)
    for n in range(1, len(chances) + 1):
        for chosen in itertools.combinations(chances, n):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                best = max(best, (1 + sum(chances[path] for path in chosen)) / cost(rows + n))
    found = (1 + sum(draft.chances)) / cost(rows + len(draft)) if draft else LEAST_GAIN / cost(rows)
    assert found == pytest.approx(best)
    if draft:
        paths = {tuple(draft.path(i)): float(draft.chances[i]) for i in range(len(draft))}
        assert paths == pytest.approx({path: chances[path] for path in paths})
        assert draft.depths.tolist() == [len(draft.path(i)) for i in range(len(draft))]
        assert all(draft.child(TEXT, path[0]) is not None for path in paths)
        assert draft.is_chain == (draft.depths.max() == len(draft))


def test_a_draft_is_no_deeper_than_the_steps_that_are_left():
    source = SuffixLookup([1, 2, 3] * 9)
    cost = PassCosts((1, 64), (1.0, 1.1))
    assert plan([Drafter([source])], 1, cost, [2])[0].depths.max() == 2
    assert plan([Drafter([source])], 1, cost, [0])[0] is None
    assert plan([None, Drafter([source], 3)], 2, cost, [9, 9])[1].depths.max() == 3


def test_costs_are_interpolated_and_never_fall():
    cost = PassCosts((1, 2, 4, 8), (0.01, 0.012, 0.011, 0.02))
    assert [cost(n) for n in (1, 2, 3, 4)] == pytest.approx([1, 1.2, 1.2, 1.2])
    assert (cost(6), cost(8), cost(16)) == pytest.approx((1.6, 2.0, 3.6))


def test_costs_are_measured_once_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "_known", {})
    monkeypatch.setattr(costs, "cache_folder", lambda: tmp_path)
    measured = []
    monkeypatch.setattr(
        costs, "measure", lambda model: measured.append(1) or PassCosts((1, 2), (1.0, 1.5))
    )
    monkeypatch.setattr(MODEL, "name", "tiny")
    assert costs.pass_costs(MODEL)(2) == 1.5
    costs._known.clear()
    assert costs.pass_costs(MODEL)(2) == 1.5 and len(measured) == 1
    (file,) = (tmp_path / "pass-costs").iterdir()
    file.write_text("{")
    costs._known.clear()
    assert costs.pass_costs(MODEL)(2) == 1.5 and len(measured) == 2


def test_passes_are_timed():
    found = costs.measure(MODEL, (1, 4))
    assert found.sizes == (1, 4) and min(found.seconds) > 0


@pytest.mark.parametrize("wrong", [{"draft": "always"}, {"num_draft_tokens": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)
