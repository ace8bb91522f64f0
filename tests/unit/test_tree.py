"""Trees and recombined sets against beam search and sequential decoding by stock mlx-lm."""

from tempo_mlx import Settings, batch_generate, generate
from tempo_mlx.rules.branching import branch
from tempo_mlx.rules.selection import Candidates

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from ..sweeps import mostly_slow
from ..tiny_models import tiny_model
from ..tiny_tokenizer import TinyTokenizer

ENDS = (7, 30)
PROMPT = [3, 17, 41, 5, 22, 9]
#: The windows of gemma3's and gpt_oss's tiny models are shorter than prompt and text together.
NAMES = [
    "llama",
    "gemma3_text",
    "gpt_oss",
    "qwen3_moe",
    "qwen3_next",
    "lfm2",
    "mamba2",
    "falcon_h1",
]
#: Attention, its windows, a state beside it and a state alone.
FEW = ["llama", "gemma3_text", "qwen3_next", "mamba2"]


@pytest.fixture(scope="module", params=mostly_slow(NAMES, FEW))
def model(request):
    return tiny_model(request.param, seed=1)


class Stock:
    """log p of the next token after texts, each by a pass of its own of the plain model."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, text):
        key = tuple(text)
        if key not in self.known:
            logits = self.model(mx.array(key)[None], cache=make_prompt_cache(self.model))[0, -1]
            logits = np.array(logits.astype(mx.float32), np.float64)
            self.known[key] = logits - np.logaddexp.reduce(logits)
        return self.known[key]

    def score(self, tokens):
        text, total = list(PROMPT), 0.0
        for token in tokens:
            total += self(text)[token]
            text.append(token)
        return total


def beam_search(stock, width, steps):
    """(texts that go on, texts that ended), each (tokens, log-probability), best first."""
    beams, ended = [((), 0.0)], []
    for _ in range(steps):
        texts = [
            ((*tokens, int(id)), score + stock([*PROMPT, *tokens])[id])
            for tokens, score in beams
            for id in np.argsort(-stock([*PROMPT, *tokens]))[:width]
        ]
        texts = sorted(texts, key=lambda text: -text[1])[:width]
        ended += [text for text in texts if text[0][-1] in ENDS]
        beams = [text for text in texts if text[0][-1] not in ENDS]
    return beams, ended


def run(model, visibility, prompt=PROMPT, **given_):
    tokenizer = TinyTokenizer(60, end_tokens=ENDS)
    return generate(model, tokenizer, prompt, visibility=visibility, verify=True, **given_)


@pytest.mark.parametrize("width", [2, 5])
def test_a_tree_of_fixed_width_is_beam_search(model, width):
    steps = 7
    beams, ended = beam_search(Stock(model), width, steps)
    result = run(
        model, "tree", threshold=1e-9, beam_width=width, max_parallel=width, max_tokens=steps
    )
    assert result.finish_reason == "length"
    paths = result.paths(1000)
    for wanted, found in (
        (beams, [p for p in paths if not p.ended]),
        (ended, [p for p in paths if p.ended]),
    ):
        found = {tuple(p.tokens): p.logprob for p in found}
        wanted = {tuple(t for t in tokens if t not in ENDS): score for tokens, score in wanted}
        assert found.keys() == wanted.keys()
        for tokens, score in wanted.items():
            assert found[tokens] == pytest.approx(score, abs=1e-3)
    assert result.verification.max_logit_difference < 1e-3


@pytest.mark.parametrize("visibility", ["tree", "recombined"])
def test_every_path_is_scored_as_a_sequential_decode_scores_it(model, visibility):
    stock = Stock(model)
    result = run(
        model, visibility, threshold=0.04, beam_width=6, max_parallel=6, max_tokens=25, stop=()
    )
    assert max(len(step.tokens) for step in result.lattice.steps) > 2
    for path in result.paths(20):
        last = result.lattice.steps[len(path.tokens)].endings if path.ended else []
        scores = [stock.score([*path.tokens, end.id]) for end in last] or [stock.score(path.tokens)]
        assert min(abs(score - path.logprob) for score in scores) < 1e-3
    ranks = [p.logprob / (len(p.tokens) + p.ended) for p in result.paths(20)]
    assert ranks == sorted(ranks, reverse=True)
    assert result.text == result.paths(1)[0].text
    assert result.verification.max_logit_difference < 1e-3


def test_recombined_sets_are_those_of_their_definition(model):
    """Forward probabilities, parents and scores, recomputed by stock passes over every chain."""
    stock, threshold, steps = Stock(model), 0.05, 12
    result = run(model, "recombined", threshold=threshold, max_parallel=6, max_tokens=steps)
    chains, scores, alphas = [[]], np.zeros(1), np.ones(1)
    for step in result.lattice.steps:
        logp = np.array([stock([*PROMPT, *chain]) for chain in chains])
        p = alphas / alphas.sum() @ np.exp(logp)
        for token in step.tokens:
            assert token.probability == pytest.approx(p[token.id], abs=1e-5)
        ids = [token.id for token in step.tokens]
        assert len(set(ids)) == len(ids)
        kept = [i for i in np.argsort(-p) if p[i] >= threshold and i not in ENDS][:6]
        assert set(ids) == set(kept or [int(p.argmax())]) or not ids
        joint = scores[:, None] + logp[:, ids]
        parents = joint.argmax(axis=0)
        for token, row in zip(step.tokens, parents, strict=True):
            assert token.logprob == pytest.approx(joint[row, ids.index(token.id)], abs=1e-3)
        chains = [[*chains[row], id] for row, id in zip(parents, ids, strict=True)]
        scores, alphas = joint.max(axis=0), np.array([t.probability for t in step.tokens])
        found = [[t.id for t in result.lattice.tokens_to(token.slot)] for token in step.tokens]
        assert found == chains
        for ending in step.endings:
            assert ending.parent is not None and ending.logprob < 0


def test_branches_that_died_leave_the_cache(model):
    given_ = {"threshold": 1e-9, "beam_width": 3, "max_parallel": 3, "max_tokens": 40}
    result = run(model, "tree", **given_)
    made = sum(len(step.tokens) for step in result.lattice.steps)
    sizes = []
    tokenizer = TinyTokenizer(60, end_tokens=())
    batch_generate(
        model,
        tokenizer,
        [PROMPT],
        Settings(visibility="tree", **given_),
        progress=lambda status: sizes.append(status.waste),
    )
    assert made > 60 and max(sizes) <= 0.25
    assert result.verification.max_logit_difference < 1e-3


@pytest.mark.parametrize("visibility", ["tree", "recombined"])
def test_a_run_of_one_leaf_is_greedy_decoding(model, visibility):
    expected = run(model, "isolated", threshold=1.0, max_tokens=9)
    for given_ in ({"threshold": 1.0}, {"threshold": 0.01, "beam_width": 1, "max_parallel": 1}):
        result = run(model, visibility, max_tokens=9, **given_)
        assert result.text == expected.text and result.finish_reason == expected.finish_reason


def test_rows_of_a_batch_with_different_trees_do_not_mix():
    model = tiny_model("llama", seed=1)
    tokenizer = TinyTokenizer(model.args.vocab_size, end_tokens=ENDS)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 80, n).tolist() for n in (4, 9, 2, 7, 4)]
    each = [
        Settings(visibility=v, threshold=t, beam_width=n, max_parallel=5, max_tokens=m)
        for v, t, n, m in [
            ("tree", 1e-6, 3, 9),
            ("recombined", 0.03, 8, 14),
            ("tree", 0.05, 6, 5),
            ("isolated", 0.05, 8, 12),
            ("tree", 1e-6, 5, 7),
        ]
    ]
    batch = batch_generate(model, tokenizer, prompts, each, batch_size=3, verify=True, paths=9)
    for result, prompt, setting in zip(batch.results, prompts, each, strict=True):
        given_ = {name: getattr(setting, name) for name in setting.__dataclass_fields__}
        alone = generate(model, tokenizer, prompt, paths=9, **given_)
        assert [p.tokens for p in result.paths(9)] == [p.tokens for p in alone.paths(9)]
        np.testing.assert_allclose(
            [p.logprob for p in result.paths(9)], [p.logprob for p in alone.paths(9)], atol=1e-4
        )
        assert result.verification.max_logit_difference < 1e-4


@pytest.mark.parametrize("name", mostly_slow([*NAMES, "rwkv7"], ["gpt_oss", "lfm2", "rwkv7"]))
def test_branches_in_rows_of_their_own_make_the_same_tree(name):
    model = tiny_model(name, seed=1)
    tokenizer = TinyTokenizer(60, end_tokens=ENDS)
    given_ = {"threshold": 1e-6, "beam_width": 4, "max_parallel": 4, "max_tokens": 9}
    rows = generate(model, tokenizer, PROMPT, visibility="tree", branching="replicate", **given_)
    shared = generate(model, tokenizer, PROMPT, visibility="tree", **given_)
    assert [p.tokens for p in rows.paths(9)] == [p.tokens for p in shared.paths(9)]
    np.testing.assert_allclose(
        [p.logprob for p in rows.paths(9)], [p.logprob for p in shared.paths(9)], atol=1e-3
    )
    beams, ended = beam_search(Stock(model), 4, 9)
    found = {tuple(p.tokens): p.logprob for p in rows.paths(99) if not p.ended}
    assert found.keys() == {tokens for tokens, _ in beams}
    for tokens, score in beams:
        assert found[tokens] == pytest.approx(score, abs=1e-3)


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.floats(0.001, 0.5),
    st.integers(1, 6),
    st.one_of(st.none(), st.floats(0, 3)),
    st.integers(0, 10**6),
)
@settings(max_examples=100)
def test_branches_are_the_best_of_all_that_qualify(M, K, threshold, leaves, margin, seed):
    rng = np.random.default_rng(seed)
    p = -np.sort(-rng.dirichlet(np.ones(K + 2), M)[:, :K], axis=1)
    ids = np.array([rng.permutation(20)[:K] for _ in range(M)])
    scores = -rng.exponential(1, M)
    slots = list(range(10, 10 + M))
    kept = branch(
        Candidates(ids, p, p), scores, slots, threshold, 4, leaves, margin, frozenset({3, 4})
    )
    every = [
        (scores[i] + np.log(p[i, j]), i, int(ids[i, j]))
        for i in range(M)
        for j in range(K)
        if j == 0 or (j < 4 and p[i, j] >= threshold)
    ]
    every = sorted(every, reverse=True)[:leaves]
    if margin is not None:
        every = [text for text in every if text[0] >= every[0][0] - margin]
    going = [text for text in every if text[2] not in (3, 4)]
    assert [(int(r), int(id)) for r, id in zip(kept.parents, kept.ids, strict=True)] == [
        (i, id) for _, i, id in going
    ]
    np.testing.assert_allclose(kept.logprobs, [score for score, *_ in going])
    assert [(e.parent, e.id) for e in kept.endings] == [
        (10 + i, id) for _, i, id in every if id in (3, 4)
    ]


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"visibility": "tree", "beam_width": 0}, ["beam_width", "at least 1", "0"]),
        ({"visibility": "tree", "beam_margin": -1.0}, ["beam_margin", "-1"]),
        ({"visibility": "tree", "temp": 0.5}, ["temp", "0.5", "tree"]),
        ({"visibility": "recombined", "weighting": "prior"}, ["weighting", "recombined"]),
        (
            {"branching": "replicate", "visibility": "recombined"},
            ["branching", "tree", "recombined"],
        ),
        ({"visibility": "tree", "sampling": "gumbel"}, ["sampling", "tree", "gumbel"]),
    ],
)
def test_settings_without_a_meaning_are_refused(given_, words):
    with pytest.raises(ValueError) as caught:
        Settings(**given_)
    for word in words:
        assert word in str(caught.value)
