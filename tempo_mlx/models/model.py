"""An mlx-lm model that takes tokens at explicit positions under an explicit mask."""

from dataclasses import replace
from typing import Any, cast, overload

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache

from ..errors import TempoError
from . import attention, positions
from .architectures import ARRAY_OFFSETS, EXACT, GROUPED_SCORES, names, refusal
from .attention import AttentionRecorder, Capture
from .cache import BatchedKVCache
from .halves import Halves
from .layout import Layout
from .pool import SlotPool
from .positions import Positions


class UnsupportedModelError(TempoError):
    """The model cannot do what was asked exactly; says what, why, and what to do instead."""


class PositionedModel:
    """Wraps an mlx-lm model so that tokens may share positions in one sequence state.

    The wrapped model still works with mlx-lm's own caches and functions.

    Args:
        model: a language model as ``mlx_lm.load`` returns it.

    Raises:
        UnsupportedModelError: if the architecture cannot hold parallel tokens exactly.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.architecture = type(model).__module__.removeprefix("mlx_lm.models.")
        if reason := refusal(model):
            raise self._unsupported(reason)
        self._windows = _layer_windows(self.architecture, model)
        if not positions.install(model):
            raise self._unsupported("has no rotary embedding that could take positions")
        attention.install(model)
        try:
            self._halves = Halves(model)
        except TempoError as error:
            raise self._unsupported(str(error)) from error
        #: dtype of the activations, which an additive mask must have
        self.dtype = _activation_dtype(model)
        #: attention layers, counted as they are executed
        self.n_layers = 0
        #: token ids that the model's embedding has, [0, vocabulary_size)
        self.vocabulary_size = 0
        #: whether attention can be captured, and whether masks may be additive
        self.captures_attention, self.takes_additive_masks = self._trace()
        #: whether rows of different lengths need no padding
        self.packs_rows = self._packs_rows()
        if not EXACT & set(names(model)):
            raise self._unsupported("has not been compared with mlx-lm's own results")
        #: positions that the model was made for, or None where its configuration does not say
        self.context_length = context_length_of(model)
        #: what the model was loaded as, if :func:`tempo_mlx.load` loaded it
        self.name: str | None = getattr(model, "loaded_as", None)

    @classmethod
    def of(cls, model: "nn.Module | PositionedModel") -> "PositionedModel":
        """The model itself if it is positioned already, else wrapped."""
        return model if isinstance(model, PositionedModel) else cls(require_model(model))

    @property
    def precision(self) -> str:
        """dtype of the activations, and the bits of quantised weights: "float16, 4-bit"."""
        bits = {m.bits for m in self.model.modules() if isinstance(m, nn.QuantizedLinear)}
        name = str(self.dtype).removeprefix("mlx.core.")
        return f"{name}, {'/'.join(str(b) for b in sorted(bits))}-bit" if bits else name

    def make_cache(self, batch_size: int = 1) -> BatchedKVCache:
        """An empty cache for ``batch_size`` rows."""
        return BatchedKVCache(
            batch_size,
            self._windows,
            as_offset=self.as_offset,
            grouped_scores=self.architecture in GROUPED_SCORES,
        )

    def make_pool(self, limit: int) -> SlotPool:
        """An empty pool of at most ``limit`` slots."""
        grouped = self.architecture in GROUPED_SCORES
        return SlotPool(self._windows, limit, self.as_offset, grouped)

    def require_capture(self) -> None:
        """Raise UnsupportedModelError unless the model's attention can be captured."""
        if not self.captures_attention:
            raise self._unsupported(
                "attention cannot be captured, the model computes its scores outside mlx-lm's "
                "attention call; use a rule that needs no attention"
            )

    def require_additive_masks(self) -> None:
        """Raise UnsupportedModelError unless masks may be additive, so that keys have weights."""
        if not self.takes_additive_masks:
            raise self._unsupported(
                "keys cannot be weighted, the model rewrites its masks and understands boolean "
                "ones only; use weighting none"
            )

    def as_offset(self, positions: np.ndarray) -> Positions | mx.array:
        """Positions [B, T] as this architecture takes them in place of its cache's offset."""
        in_array = self.architecture in ARRAY_OFFSETS
        return mx.array(positions) if in_array else Positions(positions)

    @overload
    def __call__(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: BatchedKVCache | SlotPool,
        capture: None = None,
        rows: np.ndarray | None = None,
        layers_only: bool = False,
    ) -> mx.array: ...

    @overload
    def __call__(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: BatchedKVCache | SlotPool,
        capture: Capture,
        rows: np.ndarray | None = None,
        layers_only: bool = False,
    ) -> tuple[mx.array, dict[int, mx.array]]: ...

    def __call__(self, tokens, positions, mask, cache, capture=None, rows=None, layers_only=False):
        """One forward pass over T new tokens for each row, which become slots of the cache.

        Rows may also carry different numbers of tokens. Then all N tokens come side by side, and
        ``rows`` says where each belongs.

        Args:
            tokens: ids, [B, T], or [1, N] with ``rows``.
            positions: logical positions, integers on the host, of the same shape.
            mask: "causal" (each token sees all slots and the new tokens up to itself; no array is
                built), or an array [B, 1, T, S + T] over the S slots and the T new tokens: boolean
                (True = may attend) or additive, floating point. With ``rows`` it is [1, 1, N, S']
                over the slots of each token's row, S' the most slots that a row has after the
                pass; a row's new slots follow its last one. No token may be masked everywhere.
                Sliding windows are applied on top, by logical distance.
            cache: from :meth:`make_cache`; extended by the new slots.
            capture: what attention to report, [B, ...] over rows and slots; row weights are given
                for the tokens, [N] or [layers, N], where ``rows`` is given.
            rows: the cache row of each token, [N].
            layers_only: return the output of the layers, of which :meth:`logits` makes logits.

        Returns:
            logits [B, T, V] or [1, N, V], or the layers' output [.., D]; with ``capture`` also a
            dict from layer to its attention, fp32. All are lazy: evaluate them together with
            ``cache.state``.

        Raises:
            ValueError: if shapes do not fit or the mask is neither boolean nor floating point.
            UnsupportedModelError: if the model's attention cannot report what ``capture`` asks
                for, or changes masks on their way so that additive ones would be misread.
        """
        if not isinstance(mask, str) and mask.dtype != mx.bool_:
            if not mx.issubdtype(mask.dtype, mx.floating):
                raise TempoError(f"mask must be boolean or floating point, got {mask.dtype}")
            self.require_additive_masks()
            mask = mask.astype(self.dtype)
        if capture is not None:
            self.require_capture()
        positions = np.asarray(positions)
        layout = None if rows is None else Layout(rows, cache.batch_size)
        if layout is not None and capture is not None and capture.row_weights is not None:
            spread = layout.spread(np.asarray(capture.row_weights, np.float32))
            capture = replace(capture, row_weights=spread)
        recorder = AttentionRecorder(capture) if capture is not None else None
        if layers_only:
            with self._halves.layers_only() as tap:
                self._in_rows(tokens, positions, mask, cache, recorder, layout)
                output = self._arranged(tap.taken, layout)
        else:
            output = self._arranged(
                self._in_rows(tokens, positions, mask, cache, recorder, layout), layout
            )
        return output if recorder is None else (output, recorder.weights)

    def logits(self, hidden: mx.array) -> mx.array:
        """The layers' output [B, T, D] through the vocabulary layer: logits [B, T, V], lazy."""
        return self._halves.logits(hidden)

    def _in_rows(self, tokens, positions, mask, cache, recorder, layout):
        """A pass over [1, N] tokens: by rows if they are rectangular, else packed or padded."""
        if layout is None:
            return self._forward(tokens, positions, mask, cache, recorder)
        by_row = positions[0][layout.tokens]
        if layout.is_rectangular:
            shape = (cache.batch_size, layout.width)
            if not isinstance(mask, str):
                mask = mask.reshape(*shape, -1)[:, None]
            return self._forward(tokens.reshape(shape), by_row, mask, cache, recorder)
        if (layout.counts == 0).any():
            # What stands for a row without tokens looks at that row's first slot.
            empty = layout.counts == 0
            by_row[empty] = cache.slot_positions[empty, :1] if cache.n_slots else 0
        if not isinstance(mask, str):
            mask = mask[0, 0][mx.array(layout.tokens)][:, None]  # [B, 1, T, S']
            if (layout.counts == 0).any():
                first = mx.arange(mask.shape[-1]) == 0
                if mask.dtype != mx.bool_:
                    first = mx.where(first, 0.0, -mx.inf).astype(mask.dtype)
                mask = mx.where(mx.array(layout.counts == 0)[:, None, None, None], first, mask)
        if self.packs_rows:
            return self._forward(tokens, by_row, mask, cache, recorder, layout, packed=True)
        padded = tokens[0][mx.array(layout.tokens)]
        return self._forward(padded, by_row, mask, cache, recorder, layout)

    def _arranged(self, output, layout):
        """The output of a pass in the order of its tokens: [B, T, ..], or [1, N, ..] with rows."""
        if layout is None:
            return output
        if layout.is_rectangular:
            return output.reshape(1, -1, output.shape[-1])
        return output if self.packs_rows else layout.in_order(output)

    def _forward(self, tokens, positions, mask, cache, recorder, layout=None, packed=False):
        cache.begin(positions, mask, recorder, layout, packed)
        try:
            logits = self.model(tokens, cache=cache.layers)
        except BaseException:
            cache.abandon()
            raise
        cache.end()
        return logits

    def _trace(self) -> tuple[bool, bool]:
        """Check on an unevaluated pass that positions and masks reach the model's attention.

        Returns whether attention can be captured (every layer goes through mlx-lm's call) and
        whether masks may be additive (they arrive there as they were made).
        """
        cache = self.make_cache(1)
        trace = _Trace(cache)
        mask = mx.array(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool))[None, None]
        cache.begin(np.array([[0, 1, 1]]), mask, trace)
        try:
            with self._halves.layers_only() as tap:
                logits = self.model(mx.zeros((1, 3), mx.int32), cache=cache.layers)
                hidden = tap.taken
        except Exception as error:
            raise self._unsupported(
                "computes with the cache's offset or state instead of handing them to a rotary "
                f"embedding and mlx-lm's attention, so tokens cannot share a position ({error})"
            ) from error
        appended = [layer.n_slots for layer in cache.layers]
        if not any(appended) or any(n not in (0, 3) for n in appended):
            raise self._unsupported(
                "its layers do not append keys to the cache once for each token"
            )
        if not trace.made:
            raise self._unsupported("builds its own attention mask")
        if logits.shape[:2] != (1, 3):
            raise self._unsupported(f"returns logits of shape {logits.shape}")
        if not self._halves.divide(logits, hidden):
            raise self._unsupported("does not make its logits of its layers' output alone")
        self.n_layers = trace.calls
        self.vocabulary_size = logits.shape[-1]
        #: bytes of one slot's keys and values in all layers, and of what the layers make of it
        self.slot_bytes = cache.nbytes // cache.capacity
        self.hidden_bytes = hidden.nbytes // 3
        captures = trace.calls >= sum(n > 0 for n in appended)
        return captures, captures and trace.masks_arrive_unchanged()

    def _packs_rows(self) -> bool:
        """Whether packed rows can be put side by side wherever they meet: in attention only."""
        if not self.takes_additive_masks or self.architecture in GROUPED_SCORES:
            return False
        cache, layout = self.make_cache(2), Layout(np.array([0, 1, 1]), 2)
        mask = mx.array(np.tri(2, dtype=bool))[None, None]
        try:
            cache.begin(np.array([[0, 0], [0, 1]]), mask, None, layout, packed=True)
            return self.model(mx.zeros((1, 3), mx.int32), cache=cache.layers).shape[:2] == (1, 3)
        except ValueError:
            # Layers that share another layer's keys do not go through its cache.
            return False

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture}: {reason}")


class _Trace(AttentionRecorder):
    """Watches one forward pass: the masks that the cache made and those that attention got."""

    def __init__(self, cache: BatchedKVCache):
        super().__init__(None)
        self.made: list[mx.array | str | None] = []
        self.used: list[mx.array | str | None] = []
        make = cache.mask_within

        def watched(*args):
            self.made.append(make(*args))
            return self.made[-1]

        cache.mask_within = watched  # type: ignore[method-assign]

    def record(self, *call: Any) -> None:
        super().record(*call)
        self.used.append(call[3])

    def masks_arrive_unchanged(self) -> bool:
        return all(any(used is made for made in self.made) for used in self.used)


def _activation_dtype(model: nn.Module) -> mx.Dtype:
    """dtype of the first floating-point parameter; quantised weights show theirs in scales."""
    parameters = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))
    dtypes = [parameter.dtype for parameter in parameters.values()]
    return next((dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)), mx.float32)


def require_model(model: Any) -> nn.Module:
    """The model, or TempoError for what is no model of MLX."""
    if not isinstance(model, nn.Module):
        swapped = "; model and tokenizer are swapped" if hasattr(model, "eos_token_ids") else ""
        raise TempoError(
            f"model must be a model as load returns it, got {type(model).__name__}{swapped}"
        )
    return model


def context_length_of(model: nn.Module) -> int | None:
    """Positions that a model was made for, or None where its configuration does not say."""
    for holder in (model, getattr(model, "language_model", None)):
        args = getattr(holder, "args", None)
        for source in (args, getattr(args, "text_config", None)):
            length = (
                source.get("max_position_embeddings")
                if isinstance(source, dict)
                else getattr(source, "max_position_embeddings", None)
            )
            if isinstance(length, int) and length > 0:
                return length
    return None


def _is_recurrent(stock: object) -> bool:
    inner = getattr(stock, "caches", ())
    return any(isinstance(part, mlx_cache.ArraysCache) for part in inner)


def _layer_windows(architecture: str, model: nn.Module) -> list[int | None]:
    """Sliding window of each layer, from the caches that mlx-lm itself would use."""
    windows: list[int | None] = []
    for layer, stock in enumerate(mlx_cache.make_prompt_cache(model)):
        kind = type(stock)
        if kind in (mlx_cache.KVCache, mlx_cache.ConcatenateKVCache):
            windows.append(None)
        elif kind is mlx_cache.RotatingKVCache and stock.keep == 0:
            windows.append(stock.max_size)
        elif kind is mlx_cache.ArraysCache or _is_recurrent(stock):
            raise UnsupportedModelError(
                f"{architecture}: layer {layer} has recurrent state, which cannot hold parallel "
                "tokens in one sequence; replicate the rows of a batch instead (`replicate`)"
            )
        elif kind is mlx_cache.CacheList:
            raise UnsupportedModelError(
                f"{architecture}: layer {layer} keeps a second cache beside its keys and values, "
                "which the model reads in an order of its own"
            )
        else:
            raise UnsupportedModelError(
                f"{architecture}: layer {layer} keeps a {kind.__name__}, "
                "which cannot hold parallel tokens"
            )
    return windows
