"""Captured attention against NumPy, from the weights of the model and the inputs of its layers."""

from tempo_mlx.lattice.lattice import Lattice
from tempo_mlx.models import Capture, PositionedModel, UnsupportedModelError
from tempo_mlx.rules.visibility import may_attend
from tests.tiny_models import tiny_model

import mlx.core as mx
import numpy as np
import pytest

from ..one_sequence import SETS_VISIBILITY, OneSequence

PROMPT = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32]
SETS = [[4, 20, 11], [7], [30, 5]]


def linear(module, x):
    y = x @ np.array(module.weight, np.float64).T
    return y + np.array(module.bias, np.float64) if "bias" in module else y


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotated(x, positions, base):
    """Rotary embedding of x [H, S, D]: pairs (i, i + D / 2), angle position * base^(-2i / D)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def weights_of(name, layer, x, positions, allowed, window):
    """softmax(q k^T) [H, S, S] of one layer for inputs x [S, D]."""
    attention = layer.self_attn
    D = attention.rope.dims
    q = linear(attention.q_proj, x).reshape(len(x), -1, D).transpose(1, 0, 2)
    k = linear(attention.k_proj, x).reshape(len(x), -1, D).transpose(1, 0, 2)
    if name in ("qwen3", "gemma3_text"):
        shift = 1.0 if name == "gemma3_text" else 0.0
        for norm in ("q_norm", "k_norm"):
            module = getattr(attention, norm)
            gain = np.array(module.weight, np.float64) + shift
            if norm == "q_norm":
                q = rms_norm(q, gain, module.eps)
            else:
                k = rms_norm(k, gain, module.eps)
    base = attention.rope.base
    q, k = rotated(q, positions, base), rotated(k, positions, base)
    k = np.repeat(k, len(q) // len(k), axis=0)
    scores = attention_scale(attention, D) * q @ k.transpose(0, 2, 1)
    near = positions[:, None] - positions[None] < (window or 10**9)
    scores = np.where(allowed & near, scores, -np.inf)
    sinks = getattr(attention, "sinks", None)
    if sinks is not None:
        sink = np.broadcast_to(np.array(sinks, np.float64)[:, None, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores = scores / scores.sum(axis=-1, keepdims=True)
    return scores[..., :-1] if sinks is not None else scores


def attention_scale(attention, D):
    return getattr(attention, "scale", None) or getattr(attention, "sm_scale", D**-0.5)


def inputs_of_attention(layers, monkeypatch):
    """Lists that collect what goes into each layer's attention, [T, D] a pass."""
    collected = {id(layer.self_attn): [] for layer in layers}
    kind = type(layers[0].self_attn)
    original = kind.__call__

    def recording(self, x, *args, **kwargs):
        collected[id(self)].append(x.reshape(-1, x.shape[-1]))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", recording)
    return [collected[id(layer.self_attn)] for layer in layers]


@pytest.mark.parametrize("visibility", SETS_VISIBILITY)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mixtral"])
def test_captured_attention_is_what_numpy_computes(name, visibility, monkeypatch):
    overrides = {"rope_scaling": None} if name == "gpt_oss" else {}
    model = tiny_model(name, **overrides)
    positioned = PositionedModel.of(model)
    lattice = Lattice(PROMPT)
    state = OneSequence(positioned, lattice, visibility)
    collected = inputs_of_attention(model.layers, monkeypatch)
    state.prefill(6)
    captured = []
    for step, tokens in enumerate(SETS):
        _, attention = state.append(
            mx.array(tokens), lattice.reserve(len(tokens), step), Capture(full=True)
        )
        captured.append(attention)
    slots = lattice.slots
    positions = (slots.step + len(PROMPT)).astype(float)
    allowed = may_attend(visibility, slots, slots)
    for number, layer in enumerate(model.layers):
        x = np.concatenate([np.array(part, np.float64) for part in collected[number]])
        window = state.cache.kv[number].window
        expected = weights_of(name, layer, x, positions, allowed, window)
        for step, tokens in enumerate(SETS):
            rows = np.flatnonzero(slots.step == step)
            found = np.array(captured[step][number][0])
            assert found.shape == (len(expected), len(tokens), rows[-1] + 1)
            np.testing.assert_allclose(found, expected[:, rows, : rows[-1] + 1], atol=1e-5)


def test_reductions_are_means_of_the_full_matrices():
    positioned = PositionedModel.of(tiny_model("llama"))

    def captured(capture):
        lattice = Lattice(PROMPT)
        state = OneSequence(positioned, lattice, "isolated")
        state.prefill(100)
        _, attention = state.append(mx.array(SETS[0]), lattice.reserve(3, 0), capture)
        return {layer: np.array(weights[0]) for layer, weights in attention.items()}

    full = captured(Capture(full=True))
    assert list(full) == list(range(positioned.n_layers))
    for layer, received in captured(Capture()).items():
        np.testing.assert_allclose(received, full[layer].mean(axis=(0, 1)), atol=1e-6)
    some = captured(Capture(layers=(1,), heads=(0, 3), rows=(2, 0), full=True))
    assert list(some) == [1]
    np.testing.assert_array_equal(some[1], full[1][[0, 3]][:, [2, 0]])
    weighted = captured(Capture(layers=(0,), row_weights=(0.5, 0.3, 0.2)))
    expected = np.array([0.5, 0.3, 0.2]) @ full[0].mean(axis=0)
    np.testing.assert_allclose(weighted[0], expected, atol=1e-6)


def test_a_pass_without_a_capture_is_the_same_to_the_bit():
    positioned = PositionedModel.of(tiny_model("llama"))

    def logits(capture):
        lattice = Lattice(PROMPT)
        state = OneSequence(positioned, lattice, "isolated")
        state.prefill(100)
        return np.array(state.append(mx.array(SETS[0]), lattice.reserve(3, 0), capture)[0])

    np.testing.assert_array_equal(logits(None), logits(Capture()))


def test_scores_of_a_step_sum_with_the_rest_of_the_row_to_one():
    positioned = PositionedModel.of(tiny_model("llama"))
    lattice = Lattice(PROMPT)
    state = OneSequence(positioned, lattice, "isolated")
    state.prefill(100)
    for step, tokens in enumerate(SETS):
        queries = lattice.reserve(len(tokens), step)
        _, attention = state.append(mx.array(tokens), queries, Capture())
        for received in attention.values():
            assert float(received.sum()) == pytest.approx(1, abs=1e-5)


def test_soft_caps_are_refused():
    model = PositionedModel.of(tiny_model("gemma2"))
    with pytest.raises(UnsupportedModelError, match="attention cannot be captured"):
        model.require_capture()
