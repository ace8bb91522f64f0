"""A model as mlx-lm has it."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .model import PositionedModel, context_length_of, require_model


class PlainModel:
    """A model that is used as mlx-lm has it, with what a run asks of a model.

    Args:
        model: as ``mlx_lm.load`` returns it; or positioned already, of which the model is taken.
    """

    def __init__(self, model: nn.Module | PositionedModel):
        model = model.model if isinstance(model, PositionedModel) else require_model(model)
        self.model = model
        self.n_layers = 0
        # As lazy as the logits that it is read from.
        logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
        self.vocabulary_size: int = logits.shape[-1]
        self.context_length = context_length_of(model)
        self.name: str | None = getattr(model, "loaded_as", None)
