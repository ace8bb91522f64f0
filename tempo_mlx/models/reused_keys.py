"""Layers that reuse another layer's keys and take their number for the position of the queries.

With parallel tokens a sequence has more keys than positions. While a pass of a cache of ours runs,
the rotary modules of such layers rotate at the pass's positions; else they are as they were.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import running

#: Classes of attention modules, by the name of mlx-lm's file and their own.
LAYERS = {("afm7", "KVReuseAttention")}


def install(model: nn.Module) -> None:
    """Make the rotary modules of these layers follow the running pass; twice changes nothing."""
    for module in model.modules():
        file = type(module).__module__.removeprefix("mlx_lm.models.")
        if (file, type(module).__name__) in LAYERS:
            rope: Any = module.rope
            if not hasattr(rope, "follows_pass"):
                kind: Any = type(rope)
                rope.__class__ = _following(kind)


def _following(rope_class: Any) -> type:
    class FollowingRope(rope_class):  # type: ignore[misc]
        follows_pass = True
        stands_for = rope_class

        def __call__(self, x: mx.array, offset: Any = 0, **kwargs: Any) -> Any:
            now = running()
            return super().__call__(x, offset=offset if now is None else now.offset, **kwargs)

    FollowingRope.__name__ = f"Following{rope_class.__name__}"
    FollowingRope.__module__ = rope_class.__module__
    return FollowingRope
