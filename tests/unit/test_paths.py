"""The best paths through a lattice against every path scored by stock mlx-lm."""

import itertools

from tempo_mlx.decode.paths import best_paths
from tempo_mlx.generation import generate
from tempo_mlx.models import PositionedModel
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32]


def stock_logprob(model, prompt, path):
    """log p(path | prompt), one plain pass of the stock model over the whole text."""
    logits = model(mx.array([*prompt, *path])[None], cache=make_prompt_cache(model))[0]
    logp = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
    return sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(path))


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_moe", "qwen3_next", "mamba"])
def model(request):
    return tiny_model(request.param, seed=3)


def test_exhaustive_beam_finds_all_paths_in_order(model):
    sets = [[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11]]
    every = list(itertools.product(*sets))
    expected = sorted(((stock_logprob(model, PROMPT, p), list(p)) for p in every), reverse=True)
    found = best_paths(PositionedModel.of(model), [(PROMPT, sets)], beam=len(every))[0]
    assert [ids for ids, _ in found] == [ids for _, ids in expected]
    np.testing.assert_allclose([s for _, s in found], [s for s, _ in expected], atol=1e-3)


def test_narrow_beam_scores_are_exact_and_ordered(model):
    rng = np.random.default_rng(0)
    # Long enough that unused slots are compacted away, several times.
    sets = [rng.choice(60, rng.integers(1, 5), replace=False).tolist() for _ in range(24)]
    found = best_paths(PositionedModel.of(model), [(PROMPT, sets)], beam=4)[0]
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True) and len(found) == 4
    for ids, score in found:
        assert all(token in ids_of_step for token, ids_of_step in zip(ids, sets, strict=True))
        assert score == pytest.approx(stock_logprob(model, PROMPT, ids), abs=1e-3)


def test_problems_side_by_side_are_as_each_alone(model):
    sets = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    problems = [(PROMPT, sets), (PROMPT[:1], sets[2:]), (PROMPT[4:], sets[:3])]
    found = best_paths(PositionedModel.of(model), problems, beam=18)
    for (prompt, own), paths in zip(problems, found, strict=True):
        every = [(stock_logprob(model, prompt, p), list(p)) for p in itertools.product(*own)]
        assert [ids for ids, _ in paths] == [ids for _, ids in sorted(every, reverse=True)]
        np.testing.assert_allclose([s for _, s in paths], sorted(s for s, _ in every)[::-1], 1e-3)


def test_text_is_the_best_path_and_paths_are_kept(model):
    tokenizer = TinyTokenizer(200, end_tokens=())
    result = generate(model, tokenizer, PROMPT, threshold=0.05, max_tokens=6, max_parallel=3)
    paths = result.paths(3)
    assert result.text == paths[0].text == tokenizer.decode(paths[0].tokens)
    assert result.paths(2) == paths[:2]
    assert len({tuple(path.tokens) for path in paths}) == len(paths)
    for path in paths:
        assert path.logprob == pytest.approx(stock_logprob(model, PROMPT, path.tokens), abs=1e-3)


def test_greedy_text_needs_no_rescoring(model, monkeypatch):
    tokenizer = TinyTokenizer(200, end_tokens=())
    result = generate(model, tokenizer, PROMPT, threshold=1.0, max_tokens=6)
    monkeypatch.setattr("tempo_mlx.decode.paths.best_paths", None)
    ids = [step.tokens[0].id for step in result.lattice.steps]
    assert result.text == tokenizer.decode(ids)


def test_chain_follows_the_transitions_of_the_run(model):
    tokenizer = TinyTokenizer(200, end_tokens=())
    greedy = generate(model, tokenizer, PROMPT, threshold=1.0, max_tokens=6)
    assert greedy.chain().tokens == greedy.paths(1)[0].tokens
    assert greedy.chain().logprob == pytest.approx(greedy.paths(1)[0].logprob, abs=1e-4)
    result = generate(model, tokenizer, PROMPT, threshold=0.05, max_tokens=5, max_parallel=3)
    steps = result.lattice.steps
    best = max(
        itertools.product(*(range(len(step.tokens)) for step in steps)),
        key=lambda path: (
            steps[0].tokens[path[0]].probability
            * np.prod([result.lattice.transitions[s][path[s - 1], path[s]] for s in range(1, 5)])
        ),
    )
    chain = result.chain()
    assert chain.tokens == [step.tokens[i].id for step, i in zip(steps, best, strict=True)]
    assert chain.text == tokenizer.decode(chain.tokens)


@pytest.mark.parametrize("paths", [0, 2])
def test_reading_a_result_never_runs_the_model(monkeypatch, paths):
    model = tiny_model("llama")
    tokenizer = TinyTokenizer(200, end_tokens=())
    one = {"threshold": 0.05, "max_tokens": 4, "max_parallel": 3, "visibility": "isolated"}
    result = generate(model, tokenizer, PROMPT, paths=paths, **one)
    assert len(result.lattice.sets[0]) > 1
    expected = best_paths(
        PositionedModel.of(model), [(PROMPT, [[t.id for t in s] for s in result.lattice.sets])], 8
    )[0]
    with monkeypatch.context() as patch:
        patch.setattr(PositionedModel, "__call__", None)
        if paths:
            assert result.text == result.to_dict()["text"] == tokenizer.decode(expected[0][0])
        else:
            for read in (lambda: result.text, result.to_dict, result.paths):
                with pytest.raises(ValueError, match=r"find_paths\(.\) runs the model"):
                    read()
        with pytest.raises(ValueError, match=r"find_paths\(9\) runs the model"):
            result.paths(9)
    assert [path.tokens for path in result.find_paths(9)[:2]] == [ids for ids, _ in expected[:2]]
    assert result.paths(9) == result.find_paths(9) and result.text == result.paths(9)[0].text


@pytest.mark.parametrize("arguments", [{"k": 0}, {"beam": 0}])
def test_bad_arguments_are_refused(arguments):
    model = tiny_model("llama")
    result = generate(model, TinyTokenizer(200, ()), PROMPT, max_tokens=1)
    with pytest.raises(ValueError, match="at least 1"):
        result.find_paths(**arguments)
