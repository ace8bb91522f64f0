"""Pruning: decisions by their properties, runs by the oracle, a case whose answer is known."""

from tempo_mlx.decode.retroactive import RetroactivePruner
from tempo_mlx.generation import generate
from tempo_mlx.lattice.lattice import Lattice, PruningDecision, Step, Token
from tempo_mlx.models import Capture, PositionedModel
from tempo_mlx.rules.pruning import (
    DECISIONS,
    IF_ALL_PRUNED,
    RULES,
    Evidence,
    Judging,
    Pruner,
    Pruning,
)
from tempo_mlx.rules.schedules import Constant
from tempo_mlx.settings import WEIGHTINGS, Settings
from tests.sweeps import mostly_slow
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..one_sequence import SETS_VISIBILITY, OneSequence

PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32]

scores_of_sets = st.lists(st.floats(0, 1), min_size=1, max_size=8).map(np.array)
thresholds = st.floats(0, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def tokenizer(model):
    return TinyTokenizer(model.args.vocab_size, end_tokens=())


def run(model, tokenizer, pruning, max_tokens=16, **settings):
    settings = {"threshold": 0.05, "max_parallel": 4} | settings
    return generate(model, tokenizer, PROMPT, max_tokens=max_tokens, pruning=pruning, **settings)


def fallen(result):
    return [
        (step.step, token.slot, token.pruned_at)
        for step in result.lattice.steps
        for token in step.tokens
        if token.pruned_at is not None
    ]


@given(scores_of_sets, thresholds, thresholds, st.sampled_from(["relative", "absolute", "sigmoid"]))
def test_a_higher_threshold_never_keeps_more(scores, one, other, decision):
    low = DECISIONS[decision].verdict(scores, Judging(min(one, other)))
    high = DECISIONS[decision].verdict(scores, Judging(max(one, other)))
    assert (low <= high).all()


@given(scores_of_sets, thresholds)
def test_sigmoid_at_one_half_is_absolute(scores, threshold):
    sigmoid = DECISIONS["sigmoid"].verdict(scores, Judging(threshold))
    np.testing.assert_array_equal(sigmoid, scores < threshold)


@given(scores_of_sets, thresholds)
def test_relative_never_prunes_the_best(scores, threshold):
    assert not DECISIONS["relative"].verdict(scores, Judging(threshold))[scores.argmax()]


@given(scores_of_sets, thresholds, st.sampled_from(sorted(IF_ALL_PRUNED)))
def test_a_set_loses_its_last_token_only_where_it_may_be_dropped(scores, threshold, exception):
    constant = Constant()
    pruning = Pruning(
        "probability", threshold, "absolute", schedule=constant, if_all_pruned=exception
    )
    zeros = np.zeros(len(scores))
    evidence = Evidence(scores, np.arange(len(scores)), zeros, zeros, 0)
    verdict = np.array(Pruner(pruning, 10).judge(2, 1, evidence).pruned)
    below = scores < threshold
    if exception == "drop_set" or not below.all():
        np.testing.assert_array_equal(verdict, below)
    elif exception == "keep_all":
        assert not verdict.any()
    else:
        assert (~verdict).sum() == 1 and not verdict[scores.argmax()]


@given(st.lists(st.integers(2, 6), min_size=1, max_size=40), st.floats(0.3, 1))
def test_quota_keeps_its_share(sizes, keep_rate):
    pruner = Pruner(Pruning(decision="quota", keep_rate=keep_rate, rule="probability"), 100)
    rng = np.random.default_rng(0)
    kept = 0
    for step, n in enumerate(sizes):
        p = rng.random(n)
        evidence = Evidence(p, np.arange(n), np.zeros(n), np.zeros(n), 0)
        pruned = np.array(pruner.judge(step, step, evidence).pruned)
        assert not pruned.all()
        assert (p[pruned] <= p[~pruned].min()).all()
        kept += (~pruned).sum()
    assert kept >= keep_rate * sum(sizes) - 1e-6
    if keep_rate >= 0.6:  # sets of two can give up half of their tokens and no more
        assert kept - keep_rate * sum(sizes) < 1 + len(
            [n for n in sizes if n * (1 - keep_rate) > n - 1]
        )


@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("repair", mostly_slow(["none", "recompute"], ["recompute"]))
def test_oracle_replays_a_pruned_run(model, tokenizer, visibility, rule, repair):
    threshold = 0.9 if rule == "attention" else 0.5
    pruning = Pruning(rule=rule, threshold=threshold, repair=repair, schedule=Constant())
    result = run(model, tokenizer, pruning, visibility=visibility, verify=True, seed=1)
    # Later rows pay no attention to sets that are hidden from them: nothing to compare.
    assert bool(fallen(result)) != (rule == "attention" and visibility == "hidden")
    assert result.verification.max_logit_difference < 1e-4
    for step in result.lattice.steps:
        assert step.live
        for token in step.tokens:
            assert token.pruned_at is None or token.pruned_at >= step.step
            assert (token.pruned_at is None) == (token.pruned_by is None)


@pytest.mark.parametrize("weighting", WEIGHTINGS[1:])
@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
@pytest.mark.parametrize("pruning", [None, Pruning(schedule=Constant())])
def test_oracle_replays_a_weighted_run(model, tokenizer, weighting, visibility, pruning):
    plain = run(model, tokenizer, pruning, visibility=visibility)
    result = run(model, tokenizer, pruning, visibility=visibility, weighting=weighting, verify=True)
    assert result.verification.max_logit_difference < 1e-4
    if visibility != "hidden":
        assert result.lattice.steps != plain.lattice.steps
    for step in result.lattice.steps[:-1]:
        weights = [result.lattice.weights[token.slot] for token in step.live]
        assert sum(weights) == pytest.approx(1)


def test_a_pruned_token_never_comes_back_and_is_judged_once(model, tokenizer):
    result = run(model, tokenizer, Pruning(schedule=Constant(), lookback=5))
    seen = set()
    for decision in result.lattice.pruning_decisions:
        assert not seen & set(decision.slots)
        seen |= {s for s, pruned in zip(decision.slots, decision.pruned, strict=True) if pruned}
    assert seen == {slot for _, slot, _ in fallen(result)}


@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
def test_compaction_changes_rounding_only(model, tokenizer, visibility):
    def logits(compact_above):
        pruning = Pruning(schedule=Constant(), compact_above=compact_above)
        result = run(model, tokenizer, pruning, 20, visibility=visibility, verify=True)
        assert result.verification.max_logit_difference < 1e-4
        return result

    always, never = logits(0.0), logits(1.0)
    assert fallen(always) == fallen(never) != []
    for one, other in zip(always.lattice.steps, never.lattice.steps, strict=True):
        assert [t.id for t in one.tokens] == [t.id for t in other.tokens]
        np.testing.assert_allclose(
            [t.probability for t in one.tokens], [t.probability for t in other.tokens], atol=1e-4
        )


def test_compaction_drops_what_nobody_can_see(model):
    lattice = Lattice(PROMPT)
    state = OneSequence(PositionedModel.of(model), lattice, "hidden")
    state.prefill(2048)
    state.append(mx.array([4, 20, 11]), lattice.reserve(3, 0))
    state.sequence.pending = lattice.reserve(1, 1)
    assert not state.compact(0.5)
    assert state.cache.n_slots == len(PROMPT) + 3
    assert state.compact(0.1)
    assert state.cache.n_slots == len(PROMPT) and state.held.tolist() == list(range(len(PROMPT)))


@pytest.mark.parametrize("visibility", ["isolated", "visible"])
def test_repair_equals_generating_without_the_token(model, visibility):
    positioned = PositionedModel.of(model)

    def state_of(sets):
        lattice = Lattice(PROMPT)
        state = OneSequence(positioned, lattice, visibility)
        logits = state.prefill(2048)
        for step, ids in enumerate(sets):
            queries = lattice.reserve(len(ids), step)
            tokens = [
                Token(id, "", 0.5, int(slot)) for id, slot in zip(ids, queries.index, strict=True)
            ]
            lattice.steps.append(Step(step, len(PROMPT) + step, 0.1, tokens))
            logits, _ = state.append(mx.array(ids), queries)
        return state, np.array(logits)

    state, before = state_of([[4, 20], [11], [5, 9]])
    slot = len(PROMPT) + 1
    verdict = PruningDecision(2, 0, 0.5, [slot - 1, slot], [1.0, 0.0], [False, True])
    state.sequence.lattice.apply(verdict, "posterior")
    state.sequence.drop([slot])
    state.recompute([(state.sequence, 0 if visibility == "visible" else 1)])
    repaired = np.array(state.sequence.passed())
    _, without = state_of([[4], [11], [5, 9]])
    np.testing.assert_allclose(repaired, without, atol=1e-4)
    assert np.abs(before - without).max() > 1e-2
    # And what comes next agrees, too.
    following, _ = state.append(mx.array([7]), state.sequence.lattice.reserve(1, 3))
    _, other = state_of([[4], [11], [5, 9], [7]])
    np.testing.assert_allclose(np.array(following), other, atol=1e-4)


def test_attention_finds_the_token_that_later_queries_look_at():
    """A model of one layer whose query looks for a direction that only one sibling's key has."""
    model = tiny_model("llama", num_hidden_layers=1, layer_types=["full_attention"])
    wanted, unwanted = 3, 4
    D = model.args.hidden_size
    embedding = np.zeros((model.args.vocab_size, D), np.float32)
    embedding[:, 0] = 1.0  # every token asks the same question
    embedding[wanted, 1] = 1.0
    embedding[unwanted, 2] = 1.0
    layer = model.model.layers[0]
    layer.input_layernorm.weight = mx.ones(D)
    attention = layer.self_attn
    heads, kv = attention.n_heads, attention.n_kv_heads
    head = attention.head_dim
    query = np.zeros((heads * head, D), np.float32)
    key = np.zeros((kv * head, D), np.float32)
    # The slowest rotary pair hardly turns over a few positions.
    for h in range(heads):
        query[h * head + head // 2 - 1, 0] = 8.0
    for h in range(kv):
        key[h * head + head // 2 - 1, 1] = 8.0
        key[h * head + head // 2 - 1, 2] = -8.0
    attention.q_proj.weight, attention.k_proj.weight = mx.array(query), mx.array(key)
    for projection in (attention.q_proj, attention.k_proj):
        if "bias" in projection:
            projection.bias = mx.zeros_like(projection.bias)
    model.model.embed_tokens.weight = mx.array(embedding)
    lattice = Lattice([0, 1, 2])
    settings = Settings(
        max_tokens=3, pruning=Pruning(rule="attention", threshold=0.5, schedule=Constant())
    )
    positioned = PositionedModel.of(model)
    pruner = RetroactivePruner(lattice, settings, positioned.n_layers)
    state = OneSequence(positioned, lattice, "isolated")
    state.prefill(2048)
    for step, ids in enumerate(([wanted, unwanted], [5])):
        probabilities = np.full(len(ids), 0.5)
        rows = 1 if step == 0 else 2
        pruner.select(probabilities, np.full((rows, len(ids)), 0.5))
        pruner.prune()
        queries = lattice.reserve(len(ids), step)
        tokens = [
            Token(id, "", 0.5, int(slot)) for id, slot in zip(ids, queries.index, strict=True)
        ]
        lattice.steps.append(Step(step, 3 + step, 0.1, tokens))
        capture = Capture(layers=(0,), row_weights=pruner.capture(probabilities))
        _, attention = state.append(mx.array(ids), queries, capture)
        pruner.attend(np.array(attention[0])[0], state.held)
    pruner.select(np.array([1.0]), np.ones((1, 1)))
    kept, pruned = lattice.steps[0].tokens
    assert pruner.prune() == [pruned.slot]
    assert kept.pruned_at is None and pruned.pruned_at == 1 and pruned.pruned_by == "attention"
    assert kept.score > 5 * pruned.score


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rule": "best"}, ["rule", "best", "posterior"]),
        ({"threshold": 1.5}, ["threshold", "1.5", "[0, 1]"]),
        ({"decision": "maybe"}, ["decision", "maybe"]),
        ({"lookback": 0}, ["lookback", "0"]),
        ({"min_age": 4}, ["min_age", "4", "[1, 3]"]),
        ({"layers": 0}, ["layers", "0"]),
        ({"layers": (-1,)}, ["layers", "-1"]),
        ({"steepness": 0}, ["steepness", "0"]),
        ({"keep_rate": 0.0}, ["keep_rate", "0"]),
        ({"compact_above": 2}, ["compact_above", "2"]),
        ({"repair": "recompute", "if_all_pruned": "drop_set"}, ["recompute", "drop_set"]),
    ],
)
def test_bad_settings_are_named(given, words):
    with pytest.raises(ValueError) as error:
        Pruning(**given)
    assert all(word in str(error.value) for word in words)


def test_layers_that_do_not_exist_are_named(model, tokenizer):
    for layers in (9, (0, 9)):
        with pytest.raises(ValueError, match="9"):
            run(model, tokenizer, Pruning(rule="attention", layers=layers))


def test_a_rule_that_needs_attention_is_refused_without_capture(tokenizer):
    with pytest.raises(ValueError, match=r"gemma2: attention cannot be captured"):
        run(tiny_model("gemma2"), tokenizer, Pruning(rule="attention"))
