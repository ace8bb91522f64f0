"""What all tests share."""

# First, so that the fast BLAS is loaded before any test imports mlx.
import tempo_mlx  # isort: skip

import pytest

from tempo_mlx.models.loading import load

assert tempo_mlx


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded model, fetched once into the checkout's models/."""
    return load("smollm2-135m")
