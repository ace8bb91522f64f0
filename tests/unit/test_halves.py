"""The two halves of a model against the whole."""

from tempo_mlx.models import PositionedModel
from tempo_mlx.models.architectures import EXACT
from tests.tiny_models import each_architecture, shared_model

import mlx.core as mx
import numpy as np
import pytest


@each_architecture(sorted(EXACT))
def test_layers_and_vocabulary_layer_make_the_whole(name):
    stock = shared_model(name)
    tokens = mx.array([[3, 14, 15, 9, 2, 6]])
    plain = np.array(stock(tokens).astype(mx.float32))
    model = PositionedModel(stock)
    positions = np.arange(6)[None]
    cache = model.make_cache()
    whole = model(tokens, positions, "causal", cache)
    hidden = model(tokens, positions, "causal", model.make_cache(), return_hidden=True)
    assert hidden.shape[:2] == (1, 6)
    chosen = [4, 1, 5]
    parts = model.logits(hidden[:, mx.array(chosen)])
    np.testing.assert_allclose(np.array(parts)[0], np.array(whole)[0, chosen], atol=2e-5)
    # Nobody else notices.
    np.testing.assert_array_equal(np.array(stock(tokens).astype(mx.float32)), plain)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 0, 1, 1]])
def test_layers_alone_keep_the_order_of_the_tokens(name, rows):
    model = PositionedModel(shared_model(name))
    tokens = mx.array([[5, 7, 11, 13]])
    rows = np.array(rows)
    rank = np.array([int((rows[:i] == row).sum()) for i, row in enumerate(rows)])
    width = int(rank.max()) + 1
    mask = mx.array(np.arange(width) <= rank[:, None])[None, None]
    logits, hidden = (
        model(tokens, rank[None], mask, model.make_cache(2), rows=rows, return_hidden=alone)
        for alone in (False, True)
    )
    np.testing.assert_allclose(np.array(model.logits(hidden)), np.array(logits), atol=2e-5)
