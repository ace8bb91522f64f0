"""Makes mlx-lm's architectures take positions and masks."""

from .attention import Capture
from .cache import BatchedKVCache
from .loading import ModelLoadError, load
from .model import PositionedModel, UnsupportedModelError
from .plain import PlainModel

__all__ = [
    "BatchedKVCache",
    "Capture",
    "ModelLoadError",
    "PlainModel",
    "PositionedModel",
    "UnsupportedModelError",
    "load",
]
