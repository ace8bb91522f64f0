"""Search over texts against sequential decoding by stock mlx-lm and against brute force."""

import itertools
import json

from tempo_mlx import generate, search
from tempo_mlx.decode.decoder import CacheBudgetError
from tempo_mlx.errors import TempoError
from tempo_mlx.search import Batched, SearchError, SearchSettings, stream_search
from tempo_mlx.search.environment import TextEnvironment
from tempo_mlx.search.tree import ROOT

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from ..sweeps import mostly_slow
from ..tiny_models import tiny_model
from ..tiny_tokenizer import TinyTokenizer

ENDS = (7, 30)
PROMPT = [3, 17, 41, 5, 22, 9]


NAMES = ["llama", "gemma3_text", "qwen3_moe", "qwen3_next"]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return tiny_model(request.param, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return TinyTokenizer(60, end_tokens=ENDS)


def stock(model, text):
    """p of the next token, by a pass of its own of the plain model."""
    logits = model(mx.array([*PROMPT, *text])[None], cache=make_prompt_cache(model))[0, -1]
    logits = np.array(logits.astype(mx.float32), np.float64)
    return np.exp(logits - np.logaddexp.reduce(logits))


def assert_exact(model, tree, threshold):
    """Every node's children and their probabilities are the plain model's, on its path alone."""
    checked = 0
    for node in range(len(tree)):
        if tree.n_children[node] < 1:
            continue
        p = stock(model, tree.path(node))
        children = list(tree.children(node))
        np.testing.assert_allclose(tree.prior[children], p[tree.action[children]], atol=1e-4)
        wanted = [i for i in np.argsort(-p) if p[i] >= threshold][:5] or [int(p.argmax())]
        assert set(tree.action[children]) == set(wanted)
        checked += 1
    return checked


@pytest.mark.parametrize(
    ("model", "evaluation"),
    mostly_slow(
        itertools.product(NAMES, ["mean_logprob", "rollout"]),
        [("llama", "rollout"), ("gemma3_text", "mean_logprob"), ("qwen3_next", "mean_logprob")],
    ),
    indirect=["model"],
)
def test_every_probability_is_that_of_a_sequential_decode(model, tokenizer, evaluation):
    """With subtrees kept, other branches dropped, and windows crossed (gemma3's are short)."""
    checked, sizes = 0, []
    for result in stream_search(
        model,
        tokenizer,
        PROMPT,
        max_tokens=12,
        simulations=14,
        leaves_per_batch=4,
        threshold=0.03,
        max_parallel=5,
        evaluation=evaluation,
        depth=3,
    ):
        checked += assert_exact(model, result.tree, 0.03)
        sizes.append(len(result.tree))
    assert checked > 30 and len(result.choices) >= 3
    p = [stock(model, [c.id for c in result.choices[:i]]) for i in range(len(result.choices))]
    expected = sum(np.log(row[c.id]) for row, c in zip(p, result.choices, strict=True))
    assert result.logprob == pytest.approx(expected, abs=1e-3)


def test_greedy_rollouts_are_greedy_decoding(model, tokenizer):
    depth = 4
    given = {"max_tokens": 9, "simulations": 12, "threshold": 0.03, "max_parallel": 5}
    result = next(
        stream_search(model, tokenizer, PROMPT, evaluation="rollout", depth=depth, **given)
    )
    tree = result.tree
    evaluated = [n for n in range(1, len(tree)) if not np.isnan(tree.evaluation[n])]
    assert evaluated
    for node in evaluated:
        text, chances = [], []
        for token in tree.path(node):
            chances.append(stock(model, text)[token])
            text.append(token)
        while len(text) - len(tree.path(node)) < depth and len(text) < 9:
            if text[-1] in ENDS:
                break
            p = stock(model, text)
            chances.append(p.max())
            text.append(int(p.argmax()))
        expected = np.exp(np.mean(np.log(chances)))
        assert tree.evaluation[node] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("evaluation", ["mean_logprob", "mean_probability"])
def test_values_are_means_of_the_path(model, tokenizer, evaluation):
    given = {"max_tokens": 8, "simulations": 20, "threshold": 0.03, "evaluation": evaluation}
    result = next(stream_search(model, tokenizer, PROMPT, **given))
    tree = result.tree
    for node in range(1, len(tree)):
        if np.isnan(tree.evaluation[node]):
            continue
        path = tree.path(node)
        chances = [stock(model, path[:i])[token] for i, token in enumerate(path)]
        value = np.mean(chances)
        if evaluation == "mean_logprob":
            value = np.exp(np.mean(np.log(chances)))
        assert tree.evaluation[node] == pytest.approx(value, abs=1e-4)


def test_a_users_function_drives_the_search_to_its_optimum(tokenizer):
    """Brute force over all texts of three tokens from the four most probable ones each."""
    model = tiny_model("llama", seed=1)

    def score(ids):
        return 0.7 * (ids[-1] % 2 == 1) + 0.3 * (sum(ids) % 7) / 6 if len(ids) == 3 else 0.0

    best = 0.0
    for choice in itertools.product(range(4), repeat=3):
        text = []
        for rank in choice:
            p = stock(model, text)
            text.append(int(np.argsort(-p)[rank]))
        best = max(best, score(text))
    calls = []

    def batched(texts):
        calls.append(len(texts))
        return [score(ids) for ids, _ in texts]

    given = {
        "max_tokens": 3,
        "simulations": 300,
        "threshold": 1e-9,
        "max_parallel": 4,
        "selection": "uct",
        "exploration": 0.7,
        "backup": "max",
    }
    no_ends = TinyTokenizer(60, end_tokens=())
    one = search(model, no_ends, PROMPT, value=lambda ids, text: score(ids), **given)
    many = search(model, no_ends, PROMPT, value=Batched(batched), **given)
    assert score(one.tokens) == score(many.tokens) == pytest.approx(best)
    assert max(calls) > 1 and one.tokens == many.tokens


def test_rollouts_and_dropped_branches_leave_no_slots(tokenizer):
    model = tiny_model("llama", seed=1)
    given = {"max_tokens": 20, "simulations": 30, "threshold": 0.03}
    sizes = {}
    for evaluation in ("mean_logprob", "rollout"):
        result = search(model, tokenizer, PROMPT, evaluation=evaluation, **given)
        # A node that was expanded passed through the model once; nothing was read again.
        sizes[evaluation] = result.forward_tokens
        assert result.finish_reason in ("stop", "length")
    assert sizes["mean_logprob"] <= len(PROMPT) + result.simulations
    assert sizes["rollout"] > sizes["mean_logprob"]


def test_the_same_seed_makes_the_same_tree_and_another_one_another(tokenizer):
    model = tiny_model("llama", seed=1)
    given = {"max_tokens": 4, "simulations": 20, "threshold": 0.03, "evaluation": "rollout"}
    given |= {"rollout_temp": 1.0, "depth": 5}
    one, same, other = (
        search(model, tokenizer, PROMPT, seed=seed, **given).to_dict() for seed in (1, 1, 2)
    )
    assert one["tree"] == same["tree"] and one["choices"] == same["choices"]
    assert one["choices"] != other["choices"]
    assert json.loads(json.dumps(one)) == one


@pytest.mark.parametrize("seed", [0, 18_446_744_073_710, 2**63 - 1])
def test_every_allowed_seed_draws_rollouts(tokenizer, seed):
    model = tiny_model("llama", seed=1)
    given = {"max_tokens": 2, "simulations": 4, "evaluation": "rollout", "rollout_temp": 1.0}
    result = search(model, tokenizer, PROMPT, seed=seed, depth=2, **given)
    assert len(result.choices) == 2
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^63\)"):
        SearchSettings(seed=2**63)


def test_a_full_context_ends_a_search_as_it_ends_a_generation():
    model = tiny_model("llama", seed=1, max_position_embeddings=len(PROMPT) + 3)
    endless = TinyTokenizer(60, end_tokens=())
    for max_tokens, reason, n in ((9, "context", 3), (4, "context", 3), (3, "length", 3)):
        found = search(model, endless, PROMPT, max_tokens=max_tokens, simulations=4)
        made = generate(model, endless, PROMPT, max_tokens=max_tokens)
        assert (found.finish_reason, len(found.tokens)) == (reason, n)
        assert (made.finish_reason, len(made.lattice)) == (reason, n)


def test_a_budget_that_the_prompt_spends_is_refused(tokenizer):
    model = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match=f"above its {len(PROMPT)} tokens"):
        search(model, tokenizer, PROMPT, max_forward_tokens=len(PROMPT))
    least = search(model, tokenizer, PROMPT, max_forward_tokens=len(PROMPT) + 1, threshold=0.01)
    assert least.choices and least.finish_reason == "budget"


def test_an_evaluation_with_a_value_function_is_refused(tokenizer):
    model = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match="evaluation rollout has no effect with value"):
        search(model, tokenizer, PROMPT, value=lambda ids, text: 0.5, evaluation="rollout")


def test_after_a_budget_is_spent_known_tokens_are_committed(tokenizer):
    model = tiny_model("llama", seed=1)
    given = {"max_tokens": 30, "simulations": 10, "threshold": 0.03, "leaves_per_batch": 2}
    result = search(model, tokenizer, PROMPT, max_forward_tokens=40, **given)
    assert result.finish_reason == "budget" and 40 <= result.forward_tokens <= 42
    assert 0 < len(result.choices) < 30
    fast = search(model, tokenizer, PROMPT, max_seconds=1e-9, **given)
    assert fast.finish_reason == "budget"


def test_an_invalid_value_names_the_path_and_keeps_the_tree(tokenizer):
    model = tiny_model("llama", seed=1)

    def wrong(ids, text):
        if len(ids) == 2:
            return float("nan")
        return 0.5

    def raising(ids, text):
        raise RuntimeError("no verdict")

    given = {"max_tokens": 4, "simulations": 50, "threshold": 0.03}
    with pytest.raises(SearchError, match=r"path \[\d+, \d+\]: value must be .*nan") as caught:
        search(model, tokenizer, PROMPT, value=wrong, **given)
    assert caught.value.tree.visits[ROOT] > 0
    with pytest.raises(SearchError, match="no verdict"):
        search(model, tokenizer, PROMPT, value=raising, **given)


def test_leaves_that_do_not_fit_are_refused(tokenizer):
    model = tiny_model("llama", seed=1)
    with pytest.raises(CacheBudgetError, match="max_kv_bytes"):
        search(model, tokenizer, PROMPT, max_kv_bytes=30_000, simulations=200, threshold=0.01)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"simulations": 0}, ["simulations", "at least 1", "0"]),
        ({"simulations": 2.5}, ["simulations", "integer", "2.5"]),
        ({"max_forward_tokens": 0}, ["max_forward_tokens", "0"]),
        ({"max_seconds": 0}, ["max_seconds", "above 0"]),
        ({"evaluation": "taste"}, ["evaluation", "taste", "rollout"]),
        ({"threshold": 2.0}, ["threshold", "(0, 1]"]),
        ({"leaves_per_batch": 0}, ["leaves_per_batch", "0"]),
        ({"rollout_temp": -1.0}, ["rollout_temp", "-1"]),
        ({"selection": "luck"}, ["selection", "luck"]),
    ],
)
def test_bad_settings_are_named(given, words):
    with pytest.raises(ValueError) as caught:
        SearchSettings(**given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("fault", [RuntimeError("broken"), ValueError("broken"), TempoError("no")])
def test_an_error_in_a_built_in_evaluation_is_not_blamed_on_a_function(monkeypatch, fault):
    model, tokenizer = tiny_model("llama", seed=1), TinyTokenizer(60, end_tokens=())

    def broken(self, nodes):
        raise fault

    monkeypatch.setattr(TextEnvironment, "_rollouts", broken)
    given = {"max_tokens": 2, "simulations": 4, "depth": 2}
    with pytest.raises(type(fault)) as caught:
        search(model, tokenizer, PROMPT, evaluation="rollout", **given)
    assert caught.value is fault

    def value(ids, text):
        raise fault

    with pytest.raises(SearchError, match=r"path \[.*evaluate raised"):
        search(model, tokenizer, PROMPT, value=value, **given)
