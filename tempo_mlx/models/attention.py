"""Attention that can also report its weights, where asked.

The fused kernel returns no weights. mlx-lm's model files import ``scaled_dot_product_attention``
by name, so a replacement in the model file's namespace sees the queries, keys, mask and cache of
the real call. It recomputes softmax(q k^T) for what a :class:`Capture` asks for and leaves the
output to the original; without a capture, and for any other cache, it is the original. The tokens
of a step, which come as rows, are put side by side in their sequences for the call.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..numerics import softmax
from .rows import TokenRows

#: What the logarithm of an attention weight takes in place of 0.
LEAST = 1e-30


@dataclass(frozen=True, eq=False)
class Capture:
    """What attention to report of one forward pass.

    Args:
        layers: attention layers by order of execution, from 0; None means all.
        heads: query heads; None means all.
        rows: query rows, indices into the T new tokens; None means all.
        full: report matrices [B, H, T, S + T] instead of the attention that each slot
            received, averaged over the chosen heads and rows, [B, S + T].
        row_weights: weights of the rows in that average; None means equal. [len(rows)], or for
            every row of the batch its own, [B, T], or for every chosen layer too, [layers, B, T].
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    full: bool = False
    row_weights: np.ndarray | tuple[float, ...] | None = None

    def received(self, weights: mx.array, nth: int) -> mx.array:
        """Attention that each slot received, [B, S], of weights [B, H, T, S] of the nth layer."""
        by_row = weights.mean(axis=1)  # [B, T, S]
        if self.row_weights is None:
            return by_row.mean(axis=1)
        given = np.asarray(self.row_weights, np.float32)
        rows = mx.array(given[nth] if given.ndim == 3 else given)
        # Not a matrix product: GPUs may round its operands to TF32.
        return (mx.expand_dims(rows, -1) * by_row).sum(axis=1)

    def report(self, weights: mx.array, nth: int, tokens: TokenRows | None = None) -> Any:
        """What is reported of the nth layer, whose weights are [B, H, T, S]."""
        return weights if self.full else self.received(weights, nth)


class ByHead(NamedTuple):
    """What a :class:`HeadCapture` reports of a layer.

    Args:
        received: attention that each slot received, [B, H, S].
        entropy: of each row's attention, in nats, [B, H, T].
        weighted: what a plain :class:`Capture` with the weights of the layer reports, [B, S].
        matrix: the weights themselves, [B, H, T, S], fp16; None unless ``full``.
    """

    received: mx.array
    entropy: mx.array
    weighted: mx.array | None
    matrix: mx.array | None


@dataclass(frozen=True)
class HeadCapture(Capture):
    """Reductions of the attention of every head: a :class:`ByHead` for each layer.

    Args:
        full: report the matrices, too.
        row_weights: [1, T] or [1, B, T], weights of the rows in the attention received; or
            [layers + 1, ..], those of a plain capture for each layer before them.
    """

    def report(self, weights: mx.array, nth: int, tokens: TokenRows | None = None) -> ByHead:
        """The reductions of the nth layer."""
        *layers, means = np.asarray(self.row_weights, np.float32)
        rows = mx.array(np.atleast_2d(means))[:, None, :, None]
        entropy = on_tokens(_entropy, weights, tokens)[..., 0]
        return ByHead(
            (rows * weights).sum(axis=2),
            entropy,
            Capture(row_weights=layers[nth][None]).received(weights, 0) if layers else None,
            weights.astype(mx.float16) if self.full else None,
        )


def on_tokens(
    function: Callable[[mx.array], mx.array], rows: mx.array, tokens: TokenRows | None
) -> mx.array:
    """A function of single rows [.., S] on rows [B, H, T, S]; places left over are not computed."""
    if tokens is None or tokens.is_rectangular or tokens.batch_size == 1:
        return function(rows)
    return tokens.placed(function(tokens.selected(rows)))


def _entropy(weights: mx.array) -> mx.array:
    """Of rows of weights [.., S], in nats, [.., 1]."""
    # A slot that a row may not see has a weight of 0, and 0 log 0 is 0.
    return -(weights * mx.log(mx.maximum(weights, LEAST))).sum(axis=-1, keepdims=True)


class AttentionRecorder:
    """Collects what a :class:`Capture` asks for during one forward pass.

    ``calls`` counts attention calls; ``weights`` maps the layer to what the capture reports of it:
    an array, fp32, or a :class:`ByHead`.
    """

    def __init__(self, capture: Capture | None):
        self.capture = capture
        self.calls = 0
        self.weights: dict[int, Any] = {}

    def record(
        self,
        queries: mx.array,
        keys: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
        tokens: TokenRows | None = None,
    ) -> None:
        """Take note of one attention call; see :func:`attention_weights` for its arguments."""
        layer = self.calls
        self.calls += 1
        capture = self.capture
        if capture is None or (capture.layers is not None and layer not in capture.layers):
            return
        if capture.rows is not None:
            tokens = None
        weights = attention_weights(
            queries, keys, scale, mask, sinks, capture.heads, capture.rows, tokens
        )
        self.weights[layer] = capture.report(weights, len(self.weights), tokens)


def attention_weights(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    heads: tuple[int, ...] | None = None,
    rows: tuple[int, ...] | None = None,
    tokens: TokenRows | None = None,
) -> mx.array:
    """softmax(scale q k^T + mask) in fp32.

    Args:
        queries: [B, H, T, D]. keys: [B, H_kv, S, D] with H a multiple of H_kv.
        scale: factor on the scores.
        mask: None, "causal", boolean (True = may attend) or additive, broadcast to [B, H, T, S].
        sinks: [H], logits of a slot that takes attention and gives nothing.
        heads, rows: the query heads and query rows wanted; None means all.
        tokens: how they lie in the rows, where some places of all rows are left over.

    Returns:
        [B, len(heads), len(rows), S]; rows sum to 1 (to less than 1 with sinks).
    """
    B, H, T, D = queries.shape
    H_kv, S = keys.shape[1], keys.shape[2]
    if isinstance(mask, str):
        mask = mx.arange(S - T, S)[:, None] >= mx.arange(S)[None]
    if rows is not None:
        queries = queries[:, :, mx.array(rows)]
        if mask is not None and mask.ndim >= 2 and mask.shape[-2] == T:
            mask = mask[..., mx.array(rows), :]
    queries = queries.astype(mx.float32) * scale
    keys = keys.astype(mx.float32).swapaxes(-1, -2)
    if heads is None:
        # The query heads of a group side by side: no copy of their keys for each.
        scores = (queries.reshape(B, H_kv, -1, D) @ keys).reshape(B, H, -1, S)
    else:
        chosen_heads = mx.array(heads)
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, chosen_heads]
        if sinks is not None:
            sinks = sinks[chosen_heads]
        scores = queries[:, chosen_heads] @ keys[:, chosen_heads // (H // H_kv)]
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, -mx.inf)
        else:
            scores = scores + mask.astype(mx.float32)
    if sinks is None:
        return on_tokens(softmax, scores, tokens)
    sink = mx.broadcast_to(sinks.astype(mx.float32)[None, :, None, None], (*scores.shape[:3], 1))
    return on_tokens(softmax, mx.concatenate([scores, sink], axis=-1), tokens)[..., :-1]


#: The pass of a cache of ours that a model is called for.
_running: ContextVar[Any] = ContextVar("running", default=None)


@contextmanager
def during(forward_pass: Any) -> Iterator[None]:
    """While this is open, attention without a cache belongs to the pass."""
    token = _running.set(forward_pass)
    try:
        yield
    finally:
        _running.reset(token)


def running() -> Any:
    """The pass of a cache of ours that a model is being called for; None where there is none."""
    return _running.get()


def _recording(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def scaled_dot_product_attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
        **kwargs: Any,
    ) -> Any:
        # Layers that share the keys of another one may have no cache.
        now = running() if cache is None else getattr(cache, "forward_pass", None)
        if sinks is not None:
            kwargs["sinks"] = sinks
        attend = functools.partial(original, cache=cache, scale=scale, **kwargs)
        if now is None:
            return attend(queries, keys, values, mask=mask)
        rows = now.rows
        moved = queries if rows is None else rows.by_sequence(queries)
        moved_mask = now.mask_by_sequence(mask)
        if now.recorder is not None:
            own = keys[mx.array(rows.tokens[:, 0])] if now.spread else keys
            now.recorder.record(moved, own, scale, moved_mask, sinks, rows)
        if now.spread:
            return attend(queries, keys, values, mask=mask)
        output = attend(moved, keys, values, mask=moved_mask)
        return output if rows is None else rows.by_token(output)

    scaled_dot_product_attention.records_attention = True  # type: ignore[attr-defined]
    return scaled_dot_product_attention


def install(model: nn.Module) -> None:
    """Replace ``scaled_dot_product_attention`` in the files that the model's modules come from.

    Once for each file; installing twice changes nothing.
    """
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = sys.modules[name].__dict__
        original = namespace.get("scaled_dot_product_attention")
        if original is not None and not hasattr(original, "records_attention"):
            namespace["scaled_dot_product_attention"] = _recording(original)
