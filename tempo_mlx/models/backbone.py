"""A language model in two halves: its layers, and what makes logits of their output.

Logits of a token are V numbers, and most tokens of a text are read only for what follows them. The
layers are a submodule of mlx-lm's models. Where that submodule is told to, it hands over what it
returns, and the logits that the model goes on to make of it, lazily, are never computed; and it
returns what it is given, so that the model makes logits of chosen tokens only.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import TempoError

#: Where the layers are, in mlx-lm's model files.
PATHS = (
    "model",
    "transformer",
    "backbone",
    "language_model.model",
    "language_model.transformer",
)


class Hook:
    """What passes between the halves of one model."""

    def __init__(self) -> None:
        self.listening = False
        #: output of the layers, while somebody listens
        self.taken: Any = None
        #: what the layers return in place of their own output
        self.given: mx.array | None = None


@functools.cache
def _hooked(layers_class: Any) -> type:
    """The class of a model's layers, whose output can be taken and replaced."""

    class HookedLayers(layers_class):
        stands_for = layers_class

        def __call__(self, *args, **kwargs):
            if self.hook.given is not None:
                return self.hook.given
            output = super().__call__(*args, **kwargs)
            if self.hook.listening:
                self.hook.taken = output
            return output

    HookedLayers.__name__ = f"Hooked{layers_class.__name__}"
    # Where mlx-lm's own file is looked for by the class's module.
    HookedLayers.__module__ = layers_class.__module__
    return HookedLayers


class Backbone:
    """The two halves of a model.

    Args:
        model: a language model as ``mlx_lm.load`` returns it; its layers get a hook, which
            changes nothing for other callers.

    Raises:
        ValueError: if the model has no submodule that holds its layers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._hook = self._install(model)

    @staticmethod
    def _install(model: nn.Module) -> Hook:
        for path in PATHS:
            layers: Any = model
            for name in path.split("."):
                layers = layers.get(name) if isinstance(layers, nn.Module) else None
            if isinstance(layers, nn.Module):
                break
        else:
            raise TempoError("it has no submodule that holds its layers alone")
        if not hasattr(layers, "hook"):
            layers.__class__ = _hooked(type(layers))
            layers.hook = Hook()
        return layers.hook

    @contextmanager
    def return_hidden(self) -> Iterator[Hook]:
        """While this is open, ``taken`` is the output of the layers of the last call."""
        self._hook.listening = True
        try:
            yield self._hook
        finally:
            self._hook.listening, self._hook.taken = False, None

    def logits(self, hidden: mx.array) -> mx.array:
        """What the model makes of its layers' output [B, T, D]: logits [B, T, V], lazy."""
        self._hook.given = hidden
        try:
            return self._model(mx.zeros(hidden.shape[:2], mx.int32))
        finally:
            self._hook.given = None

    def divide(self, logits: mx.array, hidden: Any) -> bool:
        """Whether logits [B, T, V] come from the layers' output alone, as far as shapes tell."""
        if not isinstance(hidden, mx.array) or hidden.shape[:-1] != logits.shape[:-1]:
            return False
        try:
            return self.logits(hidden[:, :1]).shape == (*logits.shape[:1], 1, logits.shape[-1])
        except Exception:
            return False
