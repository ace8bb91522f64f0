"""Text generation with parallel token sets on MLX."""

# First of all, because it has no effect once mlx.core is imported.
from . import blas

blas.preload()

from .generation import generate, stream_generate  # noqa: E402
from .models import PositionedModel, UnsupportedModelError, load  # noqa: E402

__all__ = ["PositionedModel", "UnsupportedModelError", "generate", "load", "stream_generate"]
