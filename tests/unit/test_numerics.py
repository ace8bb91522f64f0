"""log p over a large vocabulary, against float64, on the CPU's path and the device's."""

from tempo_mlx import numerics

import mlx.core as mx
import numpy as np
import pytest

R, V = 19, 49_152


@pytest.fixture(params=["NumPy", "mlx"])
def path(request, monkeypatch):
    if request.param == "mlx":
        monkeypatch.setattr(numerics.mx, "default_device", lambda: mx.Device(mx.gpu))
    return request.param


def test_log_p_of_tokens_and_sets_is_that_of_float64(path):
    rng = np.random.default_rng(0)
    logits = rng.normal(-60, 4, (R, V)).astype(np.float32)
    logits[:, 7] += 30
    rows, ids = rng.integers(0, R, 40), rng.integers(0, V, 40)
    sets = np.zeros((V, 3), np.float32)
    sets[::2, 0] = sets[[5, 7], 1] = 1
    found, masses = numerics.log_p_at(mx.array(logits), rows, ids, sets)
    exact = logits.astype(np.float64)
    exact -= np.logaddexp.reduce(exact, axis=1, keepdims=True)
    tolerance = 1e-6 if path == "NumPy" else 2e-5
    np.testing.assert_allclose(found, exact[rows, ids], atol=tolerance)
    even = np.logaddexp.reduce(exact[:, ::2], axis=1)
    np.testing.assert_allclose(masses[:, 0], even, atol=2e-5)
    np.testing.assert_allclose(masses[:, 1], np.logaddexp(exact[:, 5], exact[:, 7]), atol=2e-5)
    assert (masses[:, 2] == -np.inf).all()
    assert numerics.log_p_at(mx.array(logits), rows, ids)[1] is None
