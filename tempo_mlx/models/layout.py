"""How the new tokens of a forward pass lie in the rows of a batch.

Rows of a step carry different numbers of tokens. The layers of a model that treat every token by
itself need not know of rows: they get all N tokens side by side, [1, N], without padding. Only
attention needs the rows, [B, T] with T the most tokens of a row.
"""

import mlx.core as mx
import numpy as np

from ..errors import TempoError


class Layout:
    """N tokens, each in one of B rows; several of one row keep their order.

    Args:
        rows: the row of each token, [N], in [0, B).
        batch_size: B.
    """

    def __init__(self, rows: np.ndarray, batch_size: int):
        self.rows = np.asarray(rows, np.int64)
        self.batch_size = batch_size
        #: tokens of each row, [B]
        self.counts = np.bincount(self.rows, minlength=batch_size)
        if len(self.counts) > batch_size:
            raise TempoError(f"rows must be in [0, {batch_size}), got {self.rows.max()}")
        self.width = int(self.counts.max())
        by_row = np.argsort(self.rows, kind="stable")
        starts = np.cumsum(self.counts) - self.counts
        #: place of each token in its row, [N]
        self.rank = np.empty(len(by_row), np.int64)
        self.rank[by_row] = np.arange(len(by_row)) - np.repeat(starts, self.counts)
        # A place that is left over repeats the last token of its row, so that what is computed
        # for it is never special; a row without tokens repeats the first token of all.
        place = np.minimum(np.arange(self.width), np.maximum(self.counts, 1)[:, None] - 1)
        order = np.append(by_row, 0)
        #: the token at each place of the rows, [B, T]
        self.tokens = np.where(
            self.counts[:, None] > 0, order[np.minimum(starts[:, None] + place, len(by_row))], 0
        )
        #: whether every row has equally many tokens and they come row by row
        self.is_rectangular = bool(
            (self.counts == self.width).all() and (by_row == np.arange(len(by_row))).all()
        )
        self._gather = mx.array(self.tokens.reshape(-1).astype(np.int32))
        self._back = mx.array((self.rows * self.width + self.rank).astype(np.int32))

    def unpack(self, x: mx.array) -> mx.array:
        """[1, H, N, D] of all tokens to [B, H, T, D] by rows."""
        _, H, _, D = x.shape
        rows = mx.take(x[0], self._gather, axis=1).reshape(H, self.batch_size, self.width, D)
        return rows.transpose(1, 0, 2, 3)

    def pack(self, x: mx.array) -> mx.array:
        """[B, H, T, D] by rows to [1, H, N, D] of all tokens."""
        _, H, _, D = x.shape
        flat = x.transpose(1, 0, 2, 3).reshape(H, self.batch_size * self.width, D)
        return mx.take(flat, self._back, axis=1)[None]

    def selected(self, x: mx.array) -> mx.array:
        """[B, H, T, D] by rows to [N, H, D] of the tokens, without the places left over."""
        B, H, T, D = x.shape
        return x.transpose(0, 2, 1, 3).reshape(B * T, H, D)[self._back]

    def placed(self, x: mx.array) -> mx.array:
        """[N, H, D] of the tokens to [B, H, T, D] by rows."""
        _, H, D = x.shape
        rows = x[self._gather].reshape(self.batch_size, self.width, H, D)
        return rows.transpose(0, 2, 1, 3)

    def in_order(self, x: mx.array) -> mx.array:
        """[B, T, ..] by rows to [1, N, ..] of all tokens."""
        return x.reshape(1, self.batch_size * self.width, -1)[:, self._back]

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Weights [..., N] of tokens to [..., B, T] by rows; 0 where a place is left over."""
        present = np.arange(self.width) < self.counts[:, None]
        return weights[..., self.tokens] * present
