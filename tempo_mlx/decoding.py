"""The sequence state of one run: its cache, and which lattice slot each cache slot holds."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .lattice import NEVER, Lattice, Slots
from .models import Capture, PositionedModel
from .visibility import attention_mask, may_attend


class SequenceState:
    """One sequence of a lattice inside a model's cache.

    Args:
        model: the model that reads the tokens.
        lattice: its slots are what the cache holds.
        visibility: a key of :data:`tempo_mlx.visibility.VISIBILITY`.
        weighted: whether keys are weighted by ``lattice.weights`` in the mask.
        keep_logits: keep every step's logits, [N, V] each, for :mod:`tempo_mlx.verification`.
    """

    def __init__(
        self,
        model: PositionedModel,
        lattice: Lattice,
        visibility: str,
        weighted: bool = False,
        keep_logits: bool = False,
    ):
        self.model = model
        self.lattice = lattice
        self.visibility = visibility
        self.cache = model.make_cache()
        self._weighted = weighted
        #: lattice slot of each cache slot, [S]
        self.held = np.zeros(0, np.int64)
        self._last: tuple[np.ndarray, mx.array] = (self.held, mx.zeros(0))
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
        self.held = np.arange(length)
        if self.logits is not None:
            self.logits.append((self.held[-1:], logits))
        if progress is not None:
            mx.eval(logits, self.cache.state)
            progress(length, length)
        return logits

    def append(
        self, tokens: mx.array, queries: Slots, capture: Capture | None = None
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """Append tokens in one forward pass, each at the position of its step.

        Args:
            tokens: ids [N].
            queries: their slots, reserved in the lattice.
            capture: attention to report.

        Returns:
            logits [N, V]; attention by layer over the slots of ``held``, empty without a capture.
        """
        lattice = self.lattice
        self.held = np.concatenate([self.held, queries.index])
        weights = None
        if self._weighted:
            weights = lattice.weights[self.held]
            for step in np.unique(queries.step):
                lattice.key_weights[int(step)] = lattice.weights.copy()
        mask = attention_mask(self.visibility, queries, lattice.slots[self.held], weights)
        positions = (len(lattice.prompt_tokens) + queries.step)[None]
        attention: dict[int, mx.array] = {}
        if capture is None:
            logits = self.model(tokens[None], positions, mask, self.cache)
        else:
            logits, attention = self.model(tokens[None], positions, mask, self.cache, capture)
        self._last = queries.index, logits[0]
        if self.logits is not None:
            self.logits.append(self._last)
        return logits[0], attention

    def recompute(self, first_step: int) -> mx.array:
        """Run the live slots of ``first_step`` and later again, as visibility stands now.

        Returns:
            logits of the last set's live tokens, [N, V].
        """
        slots = self.lattice.slots
        again = np.flatnonzero((slots.step >= first_step) & (slots.pruned_at == NEVER))
        if again.size:
            kept = self.held[slots.step[self.held] < first_step]
            self.cache.compact(np.arange(len(kept)))
            self.held = kept
            if self.logits is not None:
                self.logits = [
                    (index[early], rows[mx.array(early)])
                    for index, rows in self.logits
                    if (early := np.flatnonzero(slots.step[index] < first_step)).size
                ]
            ids = {t.slot: t.id for step in self.lattice.steps[first_step:] for t in step.tokens}
            self.append(mx.array([ids[slot] for slot in again.tolist()]), slots[again])
        index, logits = self._last
        live = (slots.step[index] == slots.step[index[-1]]) & (slots.pruned_at[index] == NEVER)
        return logits[mx.array(np.flatnonzero(live))]

    def compact(self, above: float, next_step: int) -> None:
        """Drop the slots that no later step can see, if they are more than a share ``above``."""
        keys = self.lattice.slots[self.held]
        one = np.array([-1])
        future = Slots(one, np.array([next_step]), np.array([1]), np.array([NEVER]))
        seen = may_attend(self.visibility, future, keys)[0]
        if (~seen).sum() > above * len(seen):
            self.cache.compact(np.flatnonzero(seen))
            self.held = self.held[seen]
