"""A model as mlx-lm has it."""

import mlx.nn as nn

from .model import context_length_of


class PlainModel:
    """A model that is used as mlx-lm has it, with what a run asks of a model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.n_layers = 0
        self.context_length = context_length_of(model)
        self.name: str | None = getattr(model, "loaded_as", None)
