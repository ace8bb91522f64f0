"""Text generation with parallel token sets on MLX."""

# First of all, because it has no effect once mlx.core is imported.
from . import blas

blas.preload()

from .batching import batch_generate, stream_batch_generate  # noqa: E402
from .generation import generate, stream_generate  # noqa: E402
from .models import PositionedModel, UnsupportedModelError, load  # noqa: E402
from .prompt_cache import PromptCache  # noqa: E402
from .scoring import ContinuationScorer  # noqa: E402
from .search import search, stream_search  # noqa: E402
from .settings import Settings  # noqa: E402

__all__ = [
    "ContinuationScorer",
    "PositionedModel",
    "PromptCache",
    "Settings",
    "UnsupportedModelError",
    "batch_generate",
    "generate",
    "load",
    "search",
    "stream_batch_generate",
    "stream_generate",
    "stream_search",
]
