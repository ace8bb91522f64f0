"""mlx-lm models whose tokens take any position and see what a mask says; the store of slots."""

from .attention import Capture
from .model import PositionedModel, UnsupportedModelError
from .plain import PlainModel
from .quantization import KVQuantization
from .store import SlotStore

__all__ = [
    "SlotStore",
    "Capture",
    "KVQuantization",
    "PlainModel",
    "PositionedModel",
    "UnsupportedModelError",
]
