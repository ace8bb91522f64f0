"""One forward pass: where its tokens go in the cache, and what they see."""

from typing import Literal

import mlx.core as mx
import numpy as np

from .attention import AttentionRecorder
from .rows import TokenRows

#: Whether rows get keys of their own: never, where there are several sequences, or always.
Spread = bool | Literal["always"]


class ForwardPass:
    """What the layers' caches need to know of the running forward pass.

    A chunk is T consecutive tokens of each of R sequences, [R, T]. A step is R tokens of any
    sequences, [R, 1].

    Args:
        positions: logical positions of the new tokens, [R, T].
        keys: logical positions of the slots that each row sees, the new ones included, [R or 1, S].
        mask: "causal" or an array broadcast to [R, 1, T, S].
        start: the slot at which all sequences append; None where it differs.
        end: slots of the longest row after the pass.
        rows: of a step, the sequences of its tokens; None for a chunk.
        sequences, slots: of each of the R x T tokens its sequence and its slot, where ``start`` is
            None.
        spread: hand every row the keys of its own sequence, [R, ..], for models whose attention
            cannot be given the tokens of a sequence side by side; keys of one sequence may be
            [1, ..] unless it is "always".
        recorder: takes note of attention.
        grouped_scores: give masks an axis for the query heads of a group.
        reads: slots of the store's one row that B sequences read, [B, S]; None where each reads a
            row of the store whole.
    """

    def __init__(
        self,
        positions: np.ndarray,
        keys: np.ndarray,
        mask: mx.array | str,
        start: int | None,
        end: int,
        rows: TokenRows | None = None,
        sequences: np.ndarray | None = None,
        slots: np.ndarray | None = None,
        spread: Spread = False,
        recorder: AttentionRecorder | None = None,
        grouped_scores: bool = False,
        reads: np.ndarray | None = None,
    ):
        #: what the model hands to its rotary modules: an integer, or one for each row, [R]
        self.offset = _offset(positions)
        self.recorder = recorder
        self.start = start
        self.end = end
        self.rows = rows
        #: whether keys come [R, ..], each row's own
        several = rows is not None and (rows.batch_size > 1 or spread == "always")
        self.spread = bool(spread) and several
        self._positions, self._keys, self._mask = positions, keys, mask
        self._grouped_scores = grouped_scores
        #: by window, or 0 for none: the mask as made for rows, and moved to sequences once needed
        self._masks: dict[int, mx.array] = {}
        self._by_sequence: dict[int, mx.array] = {}
        if sequences is not None and slots is not None:
            self._sequences = mx.array(sequences.astype(np.int32))
            self._slots = mx.array(slots.astype(np.int32))
        self._reads = None if reads is None else mx.array(reads.astype(np.int32))

    def write(self, buffer: mx.array, new: mx.array) -> None:
        """Put the new tokens' keys or values [R, H, T, D] into a buffer [B, H, capacity, D]."""
        if self._reads is not None:
            buffer[:, :, self.start : self.end] = token_by_token(new).swapaxes(0, 1)[None]
        elif self.start is not None:
            new = new if self.rows is None else self.rows.by_sequence(new)
            buffer[..., self.start : self.end, :] = new
        else:
            buffer[self._sequences, :, self._slots] = token_by_token(new)

    def fetched(self, stored: mx.array) -> mx.array:
        """Keys or values of the store's rows, [.., H, S, D], as the model is to see them."""
        if self._reads is not None:
            # An index [0] would copy all that is held.
            stored = mx.take(stored, self._reads, axis=2).squeeze(0).swapaxes(0, 1)
        if not self.spread:
            return stored
        assert self.rows is not None
        return stored[mx.array(self.rows.sequences.astype(np.int32))]

    def mask_within(self, window: int | None, return_array: bool) -> mx.array | str | None:
        """The mask, narrowed to keys less than ``window`` logical positions behind."""
        new, keys = self._positions, self._keys
        if window is None or int(new.max()) - int(keys.min()) < window:
            window = 0
        if isinstance(self._mask, str) and window == 0 and not return_array:
            # The kernels do plain causality without an array; one query sees everything.
            return None if new.shape[1] == 1 else self._mask
        if window not in self._masks:
            narrowed = self._narrowed(window)
            self._masks[window] = narrowed[:, :, None] if self._grouped_scores else narrowed
        return self._masks[window]

    def mask_by_sequence(self, mask: mx.array | str | None) -> mx.array | str | None:
        """A mask [R or 1, H, 1, S] of a step as [B, H, T, S]; moved once for all layers."""
        if mask is None or isinstance(mask, str) or self.rows is None or self.rows.is_aligned:
            return mask
        if mask.shape[0] == 1 or self._grouped_scores:
            return mask
        window = next((key for key, made in self._masks.items() if mask is made), None)
        if window is None:
            return self.rows.by_sequence(mask)
        if window not in self._by_sequence:
            self._by_sequence[window] = self.rows.by_sequence(mask)
        return self._by_sequence[window]

    def _narrowed(self, window: int) -> mx.array:
        mask = self._mask
        T, S = self._positions.shape[1], self._keys.shape[1]
        if isinstance(mask, str):
            mask = (mx.arange(S - T, S)[:, None] >= mx.arange(S)[None])[None, None]
        if window == 0:
            return mask
        queries, keys = mx.array(self._positions), mx.array(self._keys)
        near = (queries[:, None, :, None] - keys[:, None, None, :]) < window
        if mask.dtype == mx.bool_:
            return mask & near
        return mx.where(near, mask, mx.array(mx.finfo(mask.dtype).min, mask.dtype))


def _offset(positions: np.ndarray) -> int | mx.array:
    starts = positions[:, 0]
    if (starts == starts[0]).all():
        return int(starts[0])
    return mx.array(starts.astype(np.int32))


def token_by_token(new: mx.array) -> mx.array:
    """[R, H, T, D] of rows to [R T, H, D] of their tokens."""
    R, H, T, D = new.shape
    return new[:, :, 0] if T == 1 else new.transpose(0, 2, 1, 3).reshape(R * T, H, D)


def is_consecutive(positions: np.ndarray) -> bool:
    """Whether the positions [B, T] of each row follow each other."""
    return bool((positions[:, 1:] == positions[:, :-1] + 1).all())
