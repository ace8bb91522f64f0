"""SlotStore against a NumPy array of slots, through random sequences of operations."""

from tempo_mlx.models import SlotStore
from tempo_mlx.models.store import BLOCK

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

H, D, LAYERS = 2, 4, 3


class Reference:
    """The same slots as plain arrays: keys [L, B, H, S, D] and positions [B, S]."""

    def __init__(self, batch_size):
        self.keys = np.zeros((LAYERS, batch_size, H, 0, D), np.float32)
        self.positions = np.zeros((batch_size, 0), int)


def append(cache, reference, n, rng):
    B = cache.batch_size
    positions = rng.integers(0, 100, (B, n))
    keys = rng.normal(size=(LAYERS, B, H, n, D)).astype(np.float32)
    mask = mx.ones((1, 1, n, cache.n_slots + n), mx.bool_)
    cache.begin(positions, mask, None)
    for layer, new in zip(cache.layers, keys, strict=True):
        layer.update_and_fetch(mx.array(new), mx.array(2 * new))
    cache.end()
    reference.keys = np.concatenate([reference.keys, keys], axis=3)
    reference.positions = np.concatenate([reference.positions, positions], axis=1)


def check(cache, reference):
    np.testing.assert_array_equal(cache.slot_positions, reference.positions)
    assert cache.n_slots == reference.positions.shape[1]
    for layer, expected in zip(cache.layers, reference.keys, strict=True):
        keys, values = layer.keys_and_values()
        np.testing.assert_array_equal(np.array(keys), expected)
        np.testing.assert_array_equal(np.array(values), 2 * expected)


@given(st.data())
def test_any_sequence_of_operations_equals_plain_arrays(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    batch_size = data.draw(st.integers(1, 3))
    cache, reference = SlotStore(batch_size, [None] * LAYERS), Reference(batch_size)
    append(cache, reference, data.draw(st.sampled_from([1, 5, BLOCK, BLOCK + 1])), rng)
    for _ in range(data.draw(st.integers(1, 6))):
        operation = data.draw(st.sampled_from(["append", "select", "replicate", "compact", "rows"]))
        B, S = cache.batch_size, cache.n_slots
        if operation == "append":
            append(cache, reference, data.draw(st.sampled_from([1, 2, 7, BLOCK])), rng)
        elif operation == "replicate" and B <= 4:
            cache.replicate(2)
            reference.keys = np.repeat(reference.keys, 2, axis=1)
            reference.positions = np.repeat(reference.positions, 2, axis=0)
        elif operation == "select":
            rows = rng.integers(0, B, rng.integers(1, B + 1))
            cache.select(rows)
            reference.keys = reference.keys[:, rows]
            reference.positions = reference.positions[rows]
        elif operation == "compact":
            keep = np.flatnonzero(rng.random(S) < 0.7) if S > 1 else np.array([0])
            keep = keep if keep.size else np.array([0])
            cache.compact(keep)
            reference.keys = reference.keys[:, :, :, keep]
            reference.positions = reference.positions[:, keep]
        elif operation == "rows":
            kept = max(1, S // 2)
            keep = np.stack([np.sort(rng.choice(S, kept, replace=False)) for _ in range(B)])
            cache.compact(keep)
            index = keep[None, :, None, :, None]
            reference.keys = np.take_along_axis(reference.keys, index, axis=3)
            reference.positions = np.take_along_axis(reference.positions, keep, axis=1)
        check(cache, reference)


def test_a_copy_that_is_written_does_not_change_its_twin():
    rng = np.random.default_rng(0)
    cache, reference = SlotStore(1, [None] * LAYERS), Reference(1)
    append(cache, reference, 3, rng)
    cache.replicate(2)
    reference.keys = np.repeat(reference.keys, 2, axis=1)
    reference.positions = np.repeat(reference.positions, 2, axis=0)
    append(cache, reference, 1, rng)
    keys, _ = cache.layers[0].keys_and_values()
    assert not np.array_equal(np.array(keys[0, :, -1]), np.array(keys[1, :, -1]))
    check(cache, reference)


def test_buffers_grow_by_blocks():
    cache, reference = SlotStore(1, [None] * LAYERS), Reference(1)
    rng = np.random.default_rng(0)
    append(cache, reference, 1, rng)
    bytes_of_a_block = 2 * LAYERS * H * BLOCK * D * 4
    assert cache.nbytes == bytes_of_a_block
    append(cache, reference, BLOCK - 1, rng)
    assert cache.nbytes == bytes_of_a_block
    append(cache, reference, 1, rng)
    assert cache.nbytes == 2 * bytes_of_a_block
    check(cache, reference)


def test_an_empty_cache_is_not_falsy():
    # mlx-lm would take a falsy cache for no cache and fall back to plain causality.
    assert SlotStore(1, [None]).layers[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.replicate(0),
        lambda c: c.select([]),
        lambda c: c.select([2]),
        lambda c: c.compact([99]),
        lambda c: c.begin(np.zeros((1, 1), int), mx.ones((1, 1, 1, 7), mx.bool_), None),
        lambda c: c.begin(np.zeros((3, 1), int), "causal", None),
        lambda c: c.begin(np.zeros((1, 1), int), "full", None),
        lambda c: SlotStore(0, [None]),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(ValueError):
        call(SlotStore(1, [None]))
