"""The tiny models are stock models that run, agree with themselves and use what they have."""

from tests.tiny_configs import VOCAB
from tests.tiny_models import (
    KNOWN_STOCK_FAILURES,
    STEPS_DIFFER,
    UNCACHED_DIFFERS,
    architectures,
    each_architecture,
    shared_model,
    tiny_config,
    tiny_model,
    window_fields,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

PROMPT_LENGTH = 14
TOLERANCE = 1e-4
WIDE = 64  # a window that no prompt here leaves

RUNNING = [name for name in architectures() if name not in KNOWN_STOCK_FAILURES]
WINDOWED = [(name, field) for name in RUNNING for field in window_fields(name)]

# What mlx-lm gives for its own tiny models changes with mlx-lm only.
pytestmark = pytest.mark.slow


def text(length: int = PROMPT_LENGTH + 1) -> mx.array:
    return mx.random.randint(0, VOCAB, (1, length), key=mx.random.key(5))


def prompt_logits(model: nn.Module) -> np.ndarray:
    """Logits [T, V] of the prompt, by one pass with a cache."""
    return np.array(model(text()[:, :PROMPT_LENGTH], cache=make_prompt_cache(model)))[0]


def logits_in_passes(model: nn.Module, *lengths: int) -> np.ndarray:
    """Logits [T, V] of the text, read in passes of these lengths through one cache."""
    cache, tokens, start, rows = make_prompt_cache(model), text(), 0, []
    for length in lengths:
        rows.append(np.array(model(tokens[:, start : start + length], cache=cache)[0]))
        start += length
    return np.concatenate(rows)


def assert_consistent(model: nn.Module) -> None:
    """Tokens see no later ones, and a text means the same in one pass as token by token."""
    at_once = logits_in_passes(model, PROMPT_LENGTH, 1)
    one_by_one = logits_in_passes(model, *[1] * (PROMPT_LENGTH + 1))
    np.testing.assert_allclose(one_by_one, at_once, atol=TOLERANCE)


def test_architectures_are_the_modules_with_a_model():
    names = architectures()
    assert names == sorted(set(names)) and len(names) > 100
    assert {"llama", "deepseek_v3", "lfm2-vl", "lille-130m", "olmo"} <= set(names)
    assert not {"base", "cache", "mla", "rope_utils", "switch_layers"} & set(names)


@each_architecture(RUNNING)
def test_logits_are_finite_and_vary(name):
    model = shared_model(name)
    logits = logits_in_passes(model, PROMPT_LENGTH, 1)
    assert logits.shape == (PROMPT_LENGTH + 1, VOCAB)
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 3
    assert logits.std(axis=0).mean() > 0.25  # over tokens


@each_architecture(architectures())
def test_the_seed_decides_the_weights(name):
    def weights(model: nn.Module) -> list[np.ndarray]:
        return [np.array(value) for _, value in tree_flatten(model.parameters())]

    mx.random.seed(1)
    first = weights(shared_model(name))
    mx.random.seed(2)
    for a, b in zip(first, weights(tiny_model(name, seed=0)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, weights(tiny_model(name, 1)), strict=True))


@each_architecture([name for name in RUNNING if name not in STEPS_DIFFER])
def test_one_pass_equals_one_token_at_a_time(name):
    assert_consistent(shared_model(name))


@each_architecture([name for name in RUNNING if name not in UNCACHED_DIFFERS])
def test_one_pass_needs_no_cache(name):
    model = shared_model(name)
    uncached = np.array(model(text()[:, :PROMPT_LENGTH]))[0]
    np.testing.assert_allclose(uncached, prompt_logits(model), atol=TOLERANCE)


@pytest.mark.parametrize(("name", "field"), WINDOWED)
def test_a_prompt_crosses_the_window(name, field):
    window = window_fields(name)[field]
    narrow = prompt_logits(shared_model(name))
    wide = prompt_logits(tiny_model(name, **{field: WIDE}))
    difference = np.abs(narrow - wide).max(axis=1)
    assert difference[:window].max() < TOLERANCE
    assert difference[window + 1 :].min() > 100 * TOLERANCE


@pytest.mark.parametrize("name", sorted(KNOWN_STOCK_FAILURES))
def test_known_failures_still_fail(name):
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        assert_consistent(shared_model(name))


@pytest.mark.parametrize("name", sorted(STEPS_DIFFER))
def test_known_differences_between_steps_still_exist(name):
    with pytest.raises(AssertionError):
        assert_consistent(shared_model(name))


@pytest.mark.parametrize("name", sorted(UNCACHED_DIFFERS))
def test_known_differences_without_a_cache_still_exist(name):
    model = shared_model(name)
    uncached = np.array(model(text()[:, :PROMPT_LENGTH]))[0]
    assert np.abs(uncached - prompt_logits(model)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_overrides_reach_the_model(name):
    model = tiny_model(name, num_hidden_layers=2)
    assert len(model.layers) == 2
    assert tiny_config(name, vocab_size=64) != tiny_config(name)


def test_an_override_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match="llama does not read .*kv_lora_rank"):
        tiny_config("llama", kv_lora_rank=8)
