"""The sequence state of one run: its cache, and which lattice slot each cache slot holds."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .lattice import Lattice
from .models import PositionedModel
from .visibility import attention_mask


class SequenceState:
    """One sequence of a lattice inside a model's cache.

    Args:
        model: the model that reads the tokens.
        lattice: its slots are what the cache holds.
        visibility: a key of :data:`tempo_mlx.visibility.VISIBILITY`.
        keep_logits: keep every step's logits, [N, V] each, for :mod:`tempo_mlx.verification`.
    """

    def __init__(
        self, model: PositionedModel, lattice: Lattice, visibility: str, keep_logits: bool = False
    ):
        self.model = model
        self.lattice = lattice
        self.visibility = visibility
        self.cache = model.make_cache()
        self._held = np.zeros(0, np.int64)  # lattice slot of each cache slot
        self.tokens: list[mx.array] = []
        self.logits: list[tuple[np.ndarray, mx.array]] | None = [] if keep_logits else None

    def prefill(
        self, step_size: int, progress: Callable[[int, int], None] | None = None
    ) -> mx.array:
        """Read the prompt in chunks; returns the logits of its last token, [1, V]."""
        prompt = mx.array(self.lattice.prompt_tokens)
        length = prompt.size
        start = 0
        while start < length - 1:
            end = min(start + step_size, length - 1)
            self.model(prompt[None, start:end], np.arange(start, end)[None], "causal", self.cache)
            # The chunk's logits are never read, so they are never computed.
            mx.eval(self.cache.state)
            mx.clear_cache()
            start = end
            if progress is not None:
                progress(end, length)
        position = np.array([[length - 1]])
        logits = self.model(prompt[None, -1:], position, "causal", self.cache)[0]
        self._held = np.arange(length)
        if self.logits is not None:
            self.logits.append((self._held[-1:], logits))
        if progress is not None:
            mx.eval(logits, self.cache.state)
            progress(length, length)
        return logits

    def append(self, tokens: mx.array, step: int, position: int) -> mx.array:
        """Append a set's tokens [N] at one position, in one forward pass; returns logits [N, V]."""
        N = tokens.size
        queries = self.lattice.reserve(N, step)
        self._held = np.concatenate([self._held, queries.index])
        mask = attention_mask(self.visibility, queries, self.lattice.slots[self._held])
        positions = np.full((1, N), position)
        logits = self.model(tokens[None], positions, mask, self.cache)[0]
        if self.logits is not None:
            self.logits.append((queries.index, logits))
        return logits
