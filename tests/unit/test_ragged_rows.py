"""Rows of different lengths in one pass against each row alone, for every architecture."""

from tempo_mlx.models import Capture, PositionedModel
from tempo_mlx.models.architectures import EXACT
from tempo_mlx.models.rows import TokenRows

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ..tiny_models import each_architecture, shared_model


def causal(start: int, n: int) -> np.ndarray:
    return np.arange(start + n) <= np.arange(start, start + n)[:, None]


def ragged_pass(model, cache, parts, capture=None):
    """Append parts (row, tokens, positions, mask [n, own slots]) in one pass."""
    rows = np.repeat([p[0] for p in parts], [len(p[1]) for p in parts])
    after = cache.counts + np.bincount(rows, minlength=cache.batch_size)
    mask = np.zeros((len(rows), after.max()), bool)
    done = 0
    for _, tokens, _, seen in parts:
        mask[done : done + len(tokens), : seen.shape[1]] = seen
        done += len(tokens)
    tokens = mx.array(np.concatenate([p[1] for p in parts]))[None]
    positions = np.concatenate([p[2] for p in parts])[None]
    args = (tokens, positions, mx.array(mask)[None, None], cache)
    if capture is None:
        return model(*args, rows=rows)
    return model(*args, capture, rows=rows)


@each_architecture(sorted(EXACT))
def test_rows_of_different_lengths_equal_each_row_alone(name):
    model = PositionedModel(shared_model(name))
    if model.is_recurrent:
        # A set has no meaning there; tests/unit/test_architectures.py has ragged steps of trees.
        return
    rng = np.random.default_rng(5)
    lengths = [7, 3, 0, 12]
    prompts = [rng.integers(1, 60, n) for n in lengths]
    sizes = [[1, 3, 2, 0], [2, 1, 0, 4], [1, 1, 1, 1]]
    cache = model.make_cache(4)
    alone = [model.make_cache(1) for _ in lengths]
    steps = [[(b, p, np.arange(len(p)), causal(0, len(p))) for b, p in enumerate(prompts)]]
    counts = np.array(lengths)
    for step in sizes:
        parts = []
        for b, n in enumerate(step):
            tokens = rng.integers(1, 60, n)
            # A parallel set: one position, each token sees the earlier slots and itself.
            seen = np.concatenate([np.ones((n, counts[b]), bool), np.eye(n, dtype=bool)], axis=1)
            parts.append((b, tokens, np.full(n, counts[b]), seen))
        counts += step
        steps.append(parts)
    for parts in steps:
        present = [part for part in parts if len(part[1])]
        logits = np.array(ragged_pass(model, cache, present).astype(mx.float32))[0]
        done = 0
        for b, tokens, positions, seen in present:
            mask = mx.array(seen)[None, None]
            own = model(mx.array(tokens)[None], positions[None], mask, alone[b])
            got = logits[done : done + len(tokens)]
            np.testing.assert_allclose(got, np.array(own.astype(mx.float32))[0], atol=2e-4)
            done += len(tokens)
    np.testing.assert_array_equal(cache.counts, counts)


@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    extra=st.integers(0, 2),
)
@settings(max_examples=60)
def test_tokens_move_to_their_sequences_and_back(rows, extra):
    tokens = TokenRows(np.array(rows), max(rows) + 1 + extra)
    x = mx.random.normal((len(rows), 2, 1, 3))
    moved = tokens.by_sequence(x)
    assert moved.shape == (tokens.batch_size, 2, tokens.width, 3)
    np.testing.assert_array_equal(np.array(tokens.by_token(moved)), np.array(x))
    for n, (row, rank) in enumerate(zip(rows, tokens.rank, strict=True)):
        np.testing.assert_array_equal(np.array(moved[row, :, rank]), np.array(x[n, :, 0]))
    assert tokens.spread(np.ones(len(rows))).sum() == len(rows)


def test_attention_of_ragged_rows_is_reported_by_row():
    model = PositionedModel(shared_model("llama"))
    rng = np.random.default_rng(1)
    cache, alone = model.make_cache(2), [model.make_cache(1) for _ in range(2)]
    prompts = [rng.integers(1, 60, 5), rng.integers(1, 60, 2)]
    parts = [(b, p, np.arange(len(p)), causal(0, len(p))) for b, p in enumerate(prompts)]
    weights = np.concatenate([np.full(5, 0.2), [0.25, 0.75]])
    _, received = ragged_pass(model, cache, parts, Capture(row_weights=weights))
    for b, prompt in enumerate(prompts):
        n = len(prompt)
        mine = weights[:5] if b == 0 else weights[5:]
        _, own = model(
            mx.array(prompt)[None],
            np.arange(n)[None],
            mx.array(causal(0, n))[None, None],
            alone[b],
            Capture(row_weights=tuple(mine)),
        )
        for layer, got in received.items():
            np.testing.assert_allclose(np.array(got)[b, :n], np.array(own[layer])[0], atol=1e-6)
            assert not np.array(got)[b, n:].any()
