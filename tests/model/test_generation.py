"""Generation on the embedded model: greedy text, the oracle in every mode, isolation."""

import itertools

from tempo_mlx import PositionedModel, generate
from tempo_mlx.lattice.lattice import Lattice
from tempo_mlx.models import Capture
from tempo_mlx.rules.combining import COMBINE
from tests.sweeps import mostly_slow

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from ..one_sequence import SETS_VISIBILITY, OneSequence

PROMPTS = [
    "Once upon a time",
    "def fibonacci(n):",
    "\n\n# Introduction\n",
    "The hero embarked on",
    "The scientist discovered",
    "According to the research",
    "The algorithm processes",
    "The system architecture",
    "She said to him",
    "He couldn't believe",
    "The ancient civilization",
    "The magnificent landscape",
    "import numpy as np",
    "2 + 2 =",
    "In 1969,",
    "Die Katze",
    "A recipe for bread:",
    "Dear Sir or Madam,",
    "The capital of France is",
    "To be, or not to be",
]
#: Each visibility and each combining rule once.
FEW_MODES = [
    ("isolated", "mixture"),
    ("visible", "product"),
]


def test_greedy_text_is_the_known_one(embedded):
    model, tokenizer = embedded
    prompt = "Once upon a time, there was a"
    result = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=12)
    assert result.text.startswith(" small town nestled in the heart of a bustling city.")


@pytest.mark.parametrize("prompt", mostly_slow(PROMPTS, PROMPTS[:2]))
def test_threshold_one_is_greedy_decoding_token_for_token(embedded, prompt):
    model, tokenizer = embedded
    result = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=12)
    ours = [step.tokens[0].id for step in result.lattice.steps if step.tokens]
    # What the stock model, reading the text at once, finds most probable after each of its tokens.
    text = [*tokenizer.encode(prompt), *ours]
    logits = model(mx.array(text)[None], cache=make_prompt_cache(model))[0, -len(ours) - 1 :]
    *theirs, after = mx.argmax(logits, axis=-1).tolist()
    assert ours == theirs
    assert len(ours) == 12 or after in tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("visibility", "combine"), mostly_slow(itertools.product(SETS_VISIBILITY, COMBINE), FEW_MODES)
)
def test_verify_in_every_mode(embedded, visibility, combine):
    model, tokenizer = embedded
    result = generate(
        model,
        tokenizer,
        "The cat",
        threshold=0.1,
        max_tokens=12,
        visibility=visibility,
        combine=combine,
        verify=True,
    )
    assert any(len(tokens) > 1 for tokens in result.lattice.sets)
    assert result.verification.max_logit_difference < 1e-3


def test_isolated_siblings_are_separate_decodes(embedded):
    model, tokenizer = embedded
    prompt = tokenizer.encode("The cat sat on the")
    siblings = tokenizer.encode(" mat floor roof bed")
    lattice = Lattice(prompt)
    state = OneSequence(PositionedModel.of(model), lattice, "isolated")
    state.prefill(2048)
    logits, _ = state.append(mx.array(siblings), lattice.reserve(len(siblings), 0))
    rows = np.array(logits)
    for row, token in zip(rows, siblings, strict=True):
        text = mx.array([*prompt, token])[None]
        alone = np.array(model(text, cache=make_prompt_cache(model))[0, -1])
        np.testing.assert_allclose(row, alone, atol=1e-3)


def captured(model, tokenizer, visibility):
    """Attention [layers, H, T, S] of a set of three and of the single token after it."""
    positioned = PositionedModel.of(model)
    prompt = tokenizer.encode("The cat sat on the")
    lattice = Lattice(prompt)
    state = OneSequence(positioned, lattice, visibility)
    state.prefill(2048)
    found = []
    for step, tokens in enumerate((tokenizer.encode(" mat floor roof"), [30])):
        queries = lattice.reserve(len(tokens), step)
        _, attention = state.append(mx.array(tokens), queries, Capture(full=True))
        found.append(np.stack([np.array(attention[layer][0]) for layer in sorted(attention)]))
    return len(prompt), found


@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
def test_attention_obeys_visibility_in_every_layer_and_head(embedded, visibility):
    model, tokenizer = embedded
    P, (of_set, of_next) = captured(model, tokenizer, visibility)
    assert of_set.shape[0] == len(model.layers) and of_set.shape[1] == 9
    between = of_set[..., P : P + 3][..., ~np.eye(3, dtype=bool)]
    to_set = of_next[..., P : P + 3]
    assert (between > 0).all() if visibility == "visible" else (between == 0).all()
    assert (to_set == 0).all() if visibility == "hidden" else (to_set > 0).all()
    for weights in (of_set, of_next):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


def test_paths_are_scored_as_stock_decoding_scores_them(embedded):
    model, tokenizer = embedded
    result = generate(model, tokenizer, "The cat", threshold=0.1, max_tokens=12)
    prompt = result.lattice.prompt_tokens
    for path in result.paths(3):
        text = mx.array([*prompt, *path.tokens])[None]
        logits = model(text, cache=make_prompt_cache(model))[0]
        rows = np.array(logits, np.float64)
        logp = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
        expected = sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(path.tokens))
        assert path.logprob == pytest.approx(expected, abs=1e-3)
