"""A language model in two halves: its layers, and what makes logits of their output.

Logits of a token are V numbers, and most tokens of a text are read only for what follows them. The
layers are a submodule of mlx-lm's models. Where that submodule is told to, it hands over what it
returns, and the logits that the model goes on to make of it, lazily, are never computed; and it
returns what it is given, so that the model makes logits of chosen tokens only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import TempoError, raised_here

#: What a model's code raises where it asks of the cache, or of shapes, what they do not have.
MODEL_ERRORS = (ValueError, TypeError, AttributeError, IndexError, NotImplementedError)

#: Where the layers are, in mlx-lm's model files.
PATHS = (
    "model",
    "transformer",
    "backbone",
    "language_model.model",
    "language_model.transformer",
)


class Hook:
    """What passes between the halves of a model during one call.

    Args:
        layers: the module whose call is meant.
        given: what it returns in place of its own output, if anything.
    """

    def __init__(self, layers: nn.Module, given: mx.array | None = None):
        self.layers = layers
        self.given = given
        #: output of the layers
        self.taken: Any = None


#: The hook of the call that is running.
_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)


@contextmanager
def _hooked(hook: Hook) -> Iterator[Hook]:
    token = _hook.set(hook)
    try:
        yield hook
    finally:
        _hook.reset(token)


def _hookable(layers_class: Any) -> type:
    """The class of a model's layers, whose output can be taken and replaced."""

    class HookedLayers(layers_class):  # type: ignore[misc]
        stands_for = layers_class

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            hook = _hook.get()
            if hook is None or hook.layers is not self:
                return super().__call__(*args, **kwargs)
            if hook.given is not None:
                return hook.given
            hook.taken = super().__call__(*args, **kwargs)
            return hook.taken

    HookedLayers.__name__ = f"Hooked{layers_class.__name__}"
    # Where mlx-lm's own file is looked for by the class's module.
    HookedLayers.__module__ = layers_class.__module__
    return HookedLayers


class Backbone:
    """The two halves of a model.

    Args:
        model: a language model as ``mlx_lm.load`` returns it; its layers get a class that lets
            their output be taken, which changes nothing for other callers.

    Raises:
        TempoError: if the model has no submodule that holds its layers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers = _layers_of(model)
        if not hasattr(self._layers, "stands_for"):
            self._layers.__class__ = _hookable(type(self._layers))

    @contextmanager
    def return_hidden(self) -> Iterator[Hook]:
        """While this is open, ``taken`` is the output of the layers of the last call."""
        with _hooked(Hook(self._layers)) as hook:
            yield hook

    def logits(self, hidden: mx.array) -> mx.array:
        """What the model makes of its layers' output [B, T, D]: logits [B, T, V], lazy."""
        with _hooked(Hook(self._layers, hidden)):
            return self._model(mx.zeros(hidden.shape[:2], mx.int32))

    def divide(self, logits: mx.array, hidden: Any) -> bool:
        """Whether logits [B, T, V] come from the layers' output alone, as far as shapes tell."""
        if not isinstance(hidden, mx.array) or hidden.shape[:-1] != logits.shape[:-1]:
            return False
        try:
            return self.logits(hidden[:, :1]).shape == (*logits.shape[:1], 1, logits.shape[-1])
        except MODEL_ERRORS as error:
            if raised_here(error):
                raise
            return False


def _layers_of(model: nn.Module) -> nn.Module:
    for path in PATHS:
        layers: Any = model
        for name in path.split("."):
            layers = layers.get(name) if isinstance(layers, nn.Module) else None
        if isinstance(layers, nn.Module):
            return layers
    raise TempoError("it has no submodule that holds its layers alone")
