"""An mlx-lm model that takes tokens at explicit positions under an explicit mask."""

import copy
from dataclasses import replace
from typing import Any, cast, overload

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache

from ..errors import TempoError, raised_here
from . import attention, following
from .architectures import EXACT, GROUPED_SCORES, ids_kept, names, refusal
from .attention import AttentionRecorder, Capture
from .backbone import MODEL_ERRORS, Backbone
from .forward_pass import Spread, is_consecutive
from .quantization import KVQuantization
from .rows import TokenRows
from .states import States
from .store import Kind, SlotStore


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
        self._kinds = [
            _kind(self.architecture, layer, stock, 0 if layer else ids_kept(model))
            for layer, stock in enumerate(mlx_cache.make_prompt_cache(model))
        ]
        #: whether layers have recurrent state
        self.is_recurrent = any(map(_has_states, self._kinds))
        #: whether masks need an axis for the query heads of a group
        self.grouped_scores = self.architecture in GROUPED_SCORES and any(
            getattr(module, "repeats", 1) > 1 for module in model.modules()
        )
        #: whether attention must be given each token's own copy of the keys of its sequence
        self.spreads_rows: Spread = False
        #: how its caches quantise keys and values; None for not
        self.quantization: KVQuantization | None = None
        attention.install(model)
        following.install(model)
        try:
            self._backbone = Backbone(model)
        except TempoError as error:
            raise self._unsupported(str(error)) from error
        #: dtype of the activations, which an additive mask must have
        self.dtype = _activation_dtype(model)
        #: attention layers, counted as they are executed
        self.n_layers = 0
        #: token ids that the model's embedding has, [0, vocabulary_size)
        self.vocabulary_size = 0
        #: whether attention can be captured, and whether masks may be additive
        try:
            self.captures_attention, self.takes_additive_masks = self._trace()
        except UnsupportedModelError:
            # The kernel may be called without mlx-lm's function, where no row can be moved.
            self.spreads_rows = "always"
            self.captures_attention, self.takes_additive_masks = self._trace()
        self.spreads_rows = self._spreads_rows()
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

    def make_cache(self, batch_size: int = 1) -> SlotStore:
        """An empty cache for ``batch_size`` rows."""
        return SlotStore(
            batch_size,
            self._kinds,
            spread_rows=self.spreads_rows,
            grouped_scores=self.grouped_scores,
            quantization=self.quantization,
        )

    def quantizing(self, how: KVQuantization | None) -> "PositionedModel":
        """The model with caches that quantise keys and values so; the same weights.

        Raises:
            UnsupportedModelError: if its attention cannot read quantised keys.
            TempoError: if its heads cannot be divided into such groups.
        """
        if how == self.quantization:
            return self
        other = copy.copy(self)
        other.quantization = how
        other.slot_bytes = other._quantized_slot_bytes()
        return other

    def _quantized_slot_bytes(self) -> int:
        """Bytes of a slot as the caches keep it, from an unevaluated step of three tokens."""
        how, cache = self.quantization, self.make_cache(1)
        if how is None:
            return self._full_slot_bytes
        if not self._full_slot_bytes:
            raise self._unsupported("kv_bits has no keys to quantise, all layers are recurrent")
        if self.is_recurrent or self.grouped_scores or any(layer.window for layer in cache.kv):
            raise self._unsupported(
                "kv_bits needs layers of plain attention over all keys; mlx-lm itself quantises no "
                "recurrent states, sliding windows or grouped scores; leave kv_bits out"
            )
        cache.quantize()
        mask = mx.array(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool))[:, None, None]
        cache.begin(np.array([[0], [1], [1]]), mask, None, TokenRows(np.zeros(3, int), 1))
        try:
            with attention.during(cache.running):
                self.model(mx.zeros((3, 1), mx.int32), cache=cache.layers)
        except MODEL_ERRORS as error:
            if "[quantize]" in str(error):
                raise TempoError(
                    f"kv_group_size must divide the size of the model's heads, got "
                    f"{how.group_size}: {error}"
                ) from error
            raise self._unsupported(
                "kv_bits cannot quantise keys that the model computes with itself or shares "
                f"between layers ({error}); leave kv_bits out"
            ) from error
        slots = sum(array.nbytes for layer in cache.kv for array in layer.state)
        return slots // max(1, cache.capacity)

    def require_capture(self) -> None:
        """Raise UnsupportedModelError unless the model's attention can be captured."""
        if self.quantization is not None:
            raise self._unsupported(
                "attention to quantised keys cannot be captured; leave kv_bits out"
            )
        if not self.slot_bytes:
            raise self._unsupported("there is no attention to capture, all layers are recurrent")
        if not self.captures_attention:
            raise self._unsupported(
                "attention cannot be captured, the model computes its scores outside mlx-lm's "
                "attention call; use a rule that needs no attention"
            )

    def require_replay(self) -> None:
        """Raise UnsupportedModelError unless one pass can read all slots of a run."""
        if self.is_recurrent:
            raise self._unsupported(
                "the attention that tokens receive is found in one pass over all tokens of a run, "
                "and a recurrent layer reads one text in a pass; leave it out"
            )

    def require_merging(self, visibility: str) -> None:
        """Raise UnsupportedModelError unless a token may see sets of several tokens whole."""
        if self.is_recurrent:
            raise self._unsupported(
                f"visibility {visibility} has no exact meaning here: a recurrent state sums up one "
                "text, not sets; use visibility recombined or tree, without pruning, weighting or "
                "a temperature"
            )

    def require_additive_masks(self) -> None:
        """Raise UnsupportedModelError unless masks may be additive, so that keys have weights."""
        if not self.slot_bytes:
            raise self._unsupported(
                "there are no keys to weigh, all layers are recurrent; use weighting none"
            )
        if not self.takes_additive_masks:
            raise self._unsupported(
                "keys cannot be weighted, the model rewrites its masks and understands boolean "
                "ones only; use weighting none"
            )

    @overload
    def __call__(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: SlotStore,
        capture: None = None,
        rows: np.ndarray | None = None,
        return_hidden: bool = False,
        parents: np.ndarray | None = None,
        reads: np.ndarray | None = None,
    ) -> mx.array: ...

    @overload
    def __call__(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: SlotStore,
        capture: Capture,
        rows: np.ndarray | None = None,
        return_hidden: bool = False,
        parents: np.ndarray | None = None,
        reads: np.ndarray | None = None,
    ) -> tuple[mx.array, dict[int, mx.array]]: ...

    def __call__(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: SlotStore,
        capture: Capture | None = None,
        rows: np.ndarray | None = None,
        return_hidden: bool = False,
        parents: np.ndarray | None = None,
        reads: np.ndarray | None = None,
    ) -> Any:
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
            return_hidden: return the output of the layers, of which :meth:`logits` makes logits.
            parents: where layers are recurrent, the slot that each token continues, of the slots of
                its own row with the new ones, of the shape of ``tokens``; -1 at the beginning of a
                text. None where each token of a row continues the one before.
            reads: of a cache of one row, the slots that B sequences read of it, [B, S']; ``rows``
                says to which of them each token belongs, and the mask is over these slots. The new
                tokens' slots follow the last one, in their order, and are among those read. Where
                a sequence reads fewer, any slot may fill it up, masked.

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
        sequences = cache.batch_size if reads is None else len(reads)
        step = None if rows is None else TokenRows.of(rows, sequences)
        if step is None and positions.shape[1] > 1 and not is_consecutive(positions):
            B, T = positions.shape
            step = TokenRows.of(np.repeat(np.arange(B), T), B)
        if step is not None and capture is not None and capture.row_weights is not None:
            weights = np.asarray(capture.row_weights, np.float32)
            if rows is not None:
                capture = replace(capture, row_weights=step.spread(weights))
        recorder = AttentionRecorder(capture) if capture is not None else None
        shape = tokens.shape
        if step is not None:
            first = None
            if self.is_recurrent:
                first = cache.preceding(step, reads)
                parents = first if parents is None else np.asarray(parents).reshape(-1)
            tokens, positions, mask, step, parents = _arranged(
                tokens, positions, mask, step, parents, first
            )
        call = tokens, positions, mask, cache, recorder, step, parents, reads
        if return_hidden:
            with self._backbone.return_hidden() as hook:
                self._forward(*call)
                output = hook.taken
        else:
            output = self._forward(*call)
        output = output.reshape(*shape, output.shape[-1])
        return output if recorder is None else (output, recorder.weights)

    def logits(self, hidden: mx.array) -> mx.array:
        """The layers' output [B, T, D] through the vocabulary layer: logits [B, T, V], lazy."""
        return self._backbone.logits(hidden)

    def _forward(
        self,
        tokens: mx.array,
        positions: np.ndarray,
        mask: mx.array | str,
        cache: SlotStore,
        recorder: AttentionRecorder | None,
        rows: TokenRows | None,
        parents: np.ndarray | None,
        reads: np.ndarray | None,
    ) -> mx.array:
        cache.begin(positions, mask, recorder, rows, parents, reads)
        try:
            with attention.during(cache.running):
                logits = self.model(tokens, cache=cache.layers)
        except BaseException:
            cache.abandon()
            raise
        cache.end()
        return logits

    def _trace(self) -> tuple[bool, bool]:
        """Check on an unevaluated step that masks reach the model's attention.

        Returns whether attention can be captured (every layer goes through mlx-lm's call) and
        whether masks may be additive (they arrive there as they were made).
        """
        cache = self.make_cache(1)
        trace = _Trace(cache)
        mask = mx.array(np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool))[:, None, None]
        cache.begin(np.array([[0], [1], [1]]), mask, trace, TokenRows(np.zeros(3, int), 1))
        try:
            with attention.during(cache.running), self._backbone.return_hidden() as hook:
                logits = self.model(mx.zeros((3, 1), mx.int32), cache=cache.layers)
                hidden = hook.taken
        except MODEL_ERRORS as error:
            if raised_here(error):
                raise
            raise self._unsupported(
                "computes with the cache's offset or state instead of handing them to a rotary "
                f"embedding and mlx-lm's attention, so tokens cannot share a position ({error})"
            ) from error
        appended = [layer.n_slots for layer in cache.kv]
        if any(n not in (0, 3) for n in appended) or not (any(appended) or self.is_recurrent):
            raise self._unsupported(
                "its layers do not append keys to the cache once for each token"
            )
        if not trace.made and appended:
            raise self._unsupported("builds its own attention mask")
        if logits.shape[:2] != (3, 1):
            raise self._unsupported(f"returns logits of shape {logits.shape}")
        if not self._backbone.divide(logits, hidden):
            raise self._unsupported("does not make its logits of its layers' output alone")
        self.n_layers = trace.calls
        self.vocabulary_size = logits.shape[-1]
        cache.end()
        #: bytes of one slot's keys and values in all layers, of one branch's states, and of what
        #: the layers make of one token
        slots = sum(array.nbytes for layer in cache.kv for array in layer.state)
        self.slot_bytes = self._full_slot_bytes = slots // max(1, cache.capacity)
        self.state_bytes = cache.states.nbytes // 3
        self.hidden_bytes = hidden.nbytes // 3
        captures = trace.calls >= sum(n > 0 for n in appended) > 0
        return captures, captures and trace.masks_arrive_unchanged()

    def _spreads_rows(self) -> Spread:
        """Whether attention does more with queries and keys than to hand them to mlx-lm's call.

        Tokens of a sequence can be put side by side in that call only. An unevaluated step of three
        tokens in two sequences fails, for want of shapes that fit, where the rows meet elsewhere.
        """
        if self.architecture in GROUPED_SCORES or self.spreads_rows:
            return self.spreads_rows or True
        cache, rows = self.make_cache(2), TokenRows(np.array([0, 1, 1]), 2)
        mask = mx.array(np.tri(3, 2, dtype=bool))[:, None, None]
        cache.begin(np.array([[0], [0], [1]]), mask, None, rows)
        try:
            with attention.during(cache.running):
                logits = self.model(mx.zeros((3, 1), mx.int32), cache=cache.layers)
            return logits.shape[:2] != (3, 1)
        except ValueError as error:
            if raised_here(error):
                raise
            return True

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture}: {reason}")


def _arranged(
    tokens: mx.array,
    positions: np.ndarray,
    mask: mx.array | str,
    step: TokenRows,
    parents: np.ndarray | None,
    before: np.ndarray | None,
) -> tuple[mx.array, np.ndarray, mx.array | str, TokenRows | None, np.ndarray | None]:
    """Tokens and positions [B, T] or [1, N], their mask and parents, as a step of rows; or as a
    chunk, if they are consecutive and (where layers are recurrent) continue what is ``before``
    them."""
    flat = positions.reshape(-1)
    by_sequence = flat[step.tokens]
    chunk = step.is_rectangular and (step.width == 1 or is_consecutive(by_sequence))
    if parents is not None and before is not None:
        chunk = chunk and bool((parents == before)[step.rank > 0].all())
    if chunk:
        if parents is not None:
            parents = parents[step.rank == 0]
        if not isinstance(mask, str):
            mask = mask.reshape(step.batch_size, step.width, -1)[:, None]
        return tokens.reshape(step.batch_size, step.width), by_sequence, mask, None, parents
    if isinstance(mask, str):
        if step.width > 1:
            raise TempoError('mask "causal" needs consecutive positions; give an array')
    else:
        if len(mask) != len(tokens):
            mask = mx.broadcast_to(mask, (len(tokens), 1, *mask.shape[2:]))
        mask = mask.reshape(-1, 1, 1, mask.shape[-1])
    return tokens.reshape(-1, 1), flat[:, None], mask, step, parents


class _Trace(AttentionRecorder):
    """Watches one forward pass: the masks that the cache made and those that attention got."""

    def __init__(self, cache: SlotStore):
        super().__init__(None)
        self.made: list[mx.array | str | None] = []
        self.used: list[mx.array | str | None] = []
        make = cache.mask_within

        def watched(window: int | None, return_array: bool) -> mx.array | str | None:
            mask = make(window, return_array)
            assert cache.running is not None
            # As attention gets it, moved from tokens to their sequence.
            self.made.append(cache.running.mask_by_sequence(mask))
            return mask

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
    """The model, or TempoError if it is not an MLX model."""
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


def _has_states(kind: Kind) -> bool:
    return any(map(_has_states, kind)) if isinstance(kind, tuple) else isinstance(kind, States)


def _kind(architecture: str, layer: int, stock: Any, n_ids: int) -> Kind:
    """What a layer keeps, from the cache that mlx-lm itself would use."""
    kind = type(stock)
    if kind in (mlx_cache.KVCache, mlx_cache.ConcatenateKVCache):
        return None
    if kind is mlx_cache.RotatingKVCache and stock.keep == 0:
        return int(stock.max_size)
    if kind is mlx_cache.ArraysCache:
        return States(len(stock.cache), n_ids)
    if kind is mlx_cache.CacheList:
        return tuple(_kind(architecture, layer, part, n_ids) for part in stock.caches)
    raise UnsupportedModelError(
        f"{architecture}: layer {layer} keeps a {kind.__name__}, which cannot hold parallel tokens"
    )
