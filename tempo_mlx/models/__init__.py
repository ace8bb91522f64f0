"""Makes mlx-lm's architectures take positions and masks."""

from .attention import Capture
from .cache import BatchedKVCache
from .model import PositionedModel, UnsupportedModelError
from .plain import PlainModel

__all__ = [
    "BatchedKVCache",
    "Capture",
    "PlainModel",
    "PositionedModel",
    "UnsupportedModelError",
]
