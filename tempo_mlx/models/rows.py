"""The tokens of a step as rows: what the model sees, and the sequences they belong to.

A model reads the N tokens of a step as N rows of one token each, [N, 1], as it reads a batch, each
at its own offset. What a layer does to every token by itself needs to know no more. Only attention
puts the rows of a sequence side by side: [B, T] with T the most tokens of a sequence.
"""

import functools

import mlx.core as mx
import numpy as np

from ..errors import TempoError


class TokenRows:
    """N tokens, each of one of B sequences; several of one sequence keep their order.

    Args:
        sequences: the sequence of each token, [N], in [0, B).
        batch_size: B.
    """

    def __init__(self, sequences: np.ndarray, batch_size: int):
        self.sequences = np.asarray(sequences, np.int64)
        self.batch_size = batch_size
        #: tokens of each sequence, [B]
        self.counts = np.bincount(self.sequences, minlength=batch_size)
        if len(self.counts) > batch_size:
            raise TempoError(f"rows must be in [0, {batch_size}), got {self.sequences.max()}")
        self.width = int(self.counts.max())
        by_sequence = np.argsort(self.sequences, kind="stable")
        starts = np.cumsum(self.counts) - self.counts
        #: place of each token in its sequence, [N]
        self.rank = np.empty(len(by_sequence), np.int64)
        self.rank[by_sequence] = np.arange(len(by_sequence)) - np.repeat(starts, self.counts)
        # A place that is left over repeats the last token of its sequence, so that what is computed
        # for it is never special; a sequence without tokens repeats the first token of all.
        place = np.minimum(np.arange(self.width), np.maximum(self.counts, 1)[:, None] - 1)
        place = np.minimum(starts[:, None] + place, len(by_sequence) - 1)
        #: the token at each place of the sequences, [B, T]
        self.tokens = np.where(self.counts[:, None] > 0, by_sequence[place], 0)
        #: whether every sequence has equally many tokens and they come sequence by sequence
        self.is_rectangular = bool(
            (self.counts == self.width).all() and (by_sequence == np.arange(len(by_sequence))).all()
        )
        #: whether the rows are the sequences: nothing has to be moved
        self.is_aligned = self.is_rectangular and self.width == 1
        self._gather = mx.array(self.tokens.reshape(-1).astype(np.int32))
        self._back = mx.array((self.sequences * self.width + self.rank).astype(np.int32))

    @classmethod
    def of(cls, sequences: np.ndarray, batch_size: int) -> "TokenRows":
        """The same; made once for all steps of that shape that follow each other."""
        return _made(np.asarray(sequences, np.int64).tobytes(), batch_size)

    def __len__(self) -> int:
        return len(self.sequences)

    def by_sequence(self, x: mx.array) -> mx.array:
        """[N, H, 1, D] of the tokens to [B, H, T, D]."""
        if self.is_aligned:
            return x
        if self.batch_size == 1:
            return x.transpose(2, 1, 0, 3)
        return self.placed(x[:, :, 0])

    def by_token(self, x: mx.array) -> mx.array:
        """[B, H, T, D] to [N, H, 1, D] of the tokens."""
        if self.is_aligned:
            return x
        if self.batch_size == 1:
            return x.transpose(2, 1, 0, 3)
        return self.selected(x)[:, :, None]

    def selected(self, x: mx.array) -> mx.array:
        """[B, H, T, D] to [N, H, D] of the tokens, without the places left over."""
        B, H, T, D = x.shape
        return x.transpose(0, 2, 1, 3).reshape(B * T, H, D)[self._back]

    def placed(self, x: mx.array) -> mx.array:
        """[N, H, D] of the tokens to [B, H, T, D]."""
        _, H, D = x.shape
        rows = x[self._gather].reshape(self.batch_size, self.width, H, D)
        return rows.transpose(0, 2, 1, 3)

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Weights [..., N] of tokens to [..., B, T]; 0 where a place is left over."""
        present = np.arange(self.width) < self.counts[:, None]
        return weights[..., self.tokens] * present


@functools.lru_cache(maxsize=64)
def _made(sequences: bytes, batch_size: int) -> TokenRows:
    return TokenRows(np.frombuffer(sequences, np.int64), batch_size)
