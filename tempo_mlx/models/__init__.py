"""Makes mlx-lm's architectures take positions and masks."""

from .attention import Capture
from .model import PositionedModel, UnsupportedModelError
from .plain import PlainModel
from .store import SlotStore

__all__ = [
    "SlotStore",
    "Capture",
    "PlainModel",
    "PositionedModel",
    "UnsupportedModelError",
]
