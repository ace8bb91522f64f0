"""Modules that take positions from the running pass, where their files would take others.

While a pass of a cache of ours runs, these modules follow its positions; else they are as they
were. afm7 has layers that reuse another layer's keys and take their number for the position of the
queries, but with parallel tokens a sequence has more keys than positions. gpt_bigcode counts
positions from a single number, but the rows of a step have one each.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import running


class _FromZero:
    """A layer's cache, for files that count positions from a single number."""

    offset = 0

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _rotate(call: Callable[..., Any], x: mx.array, offset: Any = 0, **kwargs: Any) -> Any:
    return call(x, offset=running().offset, **kwargs)


def _embed(call: Callable[..., Any], ids: mx.array) -> Any:
    return call(mx.array(running().offset)[..., None] + mx.arange(ids.size))


def _read(call: Callable[..., Any], inputs: mx.array, cache: list[Any]) -> Any:
    return call(inputs, cache=[_FromZero(cache[0]), *cache[1:]])


#: File and class of a module -> which of its modules follow the pass, "" for itself, and how.
FOLLOWING: dict[tuple[str, str], dict[str, Callable[..., Any]]] = {
    ("afm7", "KVReuseAttention"): {"rope": _rotate},
    ("gpt_bigcode", "GPTBigCodeModel"): {"wpe": _embed},
    ("gpt_bigcode", "Model"): {"": _read},
}


def install(model: nn.Module) -> None:
    """Make these modules follow the running pass; twice changes nothing."""
    for module in model.modules():
        kind = type(module)
        file = kind.__module__.removeprefix("mlx_lm.models.")
        for name, how in FOLLOWING.get((file, kind.__name__), {}).items():
            follower: Any = getattr(module, name) if name else module
            if not hasattr(follower, "follows_pass"):
                follower.__class__ = _following(type(follower), how)


def _following(followed: Any, how: Callable[..., Any]) -> type:
    class Following(followed):  # type: ignore[misc]
        follows_pass = True
        stands_for = followed

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if running() is None:
                return super().__call__(*args, **kwargs)
            return how(super().__call__, *args, **kwargs)

    Following.__name__ = followed.__name__
    Following.__module__ = followed.__module__
    return Following
