"""The oracle: replay a lattice in one uncached pass, by the definitions, slot by slot.

It shares neither the cache nor the vectorised visibility rules with what it checks. The model's
own files run with a cache object that stores nothing.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .lattice import Lattice
from .models import PositionedModel


@dataclass(frozen=True)
class Verification:
    """What the replay found.

    Args:
        max_logit_difference: largest |difference| of a logit between the cached run and the
            replay, over all rows and the whole vocabulary.
        rows: query rows compared.
    """

    max_logit_difference: float
    rows: int


class _Stateless:
    """What an attention module sees as its cache when a whole sequence is read at once."""

    attention_recorder = None

    def __init__(self, offset: Any, positions: np.ndarray, allowed: np.ndarray, window: int | None):
        self.offset = offset
        self._positions, self._allowed, self._window = positions, allowed, window

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        allowed = self._allowed
        for window in (self._window, window_size):
            if window is not None:
                allowed = allowed & (self._positions[:, None] - self._positions[None] < window)
        return mx.array(allowed)[None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._keys_and_values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._keys_and_values


def verify(
    model: PositionedModel,
    lattice: Lattice,
    visibility: str,
    seen: list[tuple[np.ndarray, mx.array]],
) -> Verification:
    """Compare the logits that a cached run saw with one uncached pass over all its slots.

    Args:
        model: the model that made the run.
        lattice: the run's record: tokens, positions, sets, when they were pruned.
        visibility: the run's rule.
        seen: (slots [N], logits [N, V]) of each forward pass of the run.
    """
    length = len(lattice.prompt_tokens)
    rows: list[tuple[int, int, int, int, int | None]] = [
        (id, i, i - length, 1, None) for i, id in enumerate(lattice.prompt_tokens)
    ]
    for step in lattice.steps:
        for token in step.tokens:
            rows.append((token.id, step.position, step.step, len(step.tokens), token.pruned_at))
    tokens = np.array([row[0] for row in rows])
    positions = np.array([row[1] for row in rows])
    allowed = np.zeros((len(rows), len(rows)), bool)
    for q, (_, _, q_step, _, _) in enumerate(rows):
        for k, (_, _, k_step, k_size, k_pruned) in enumerate(rows):
            if k_pruned is not None and k_pruned < q_step:
                continue
            if k == q:
                allowed[q, k] = True
            elif k_step == q_step:
                allowed[q, k] = visibility == "visible"
            elif k_step < q_step:
                allowed[q, k] = visibility != "hidden" or k_size == 1
    offset = model.as_offset(positions[None])
    caches = [
        _Stateless(offset, positions, allowed, layer.window) for layer in model.make_cache().layers
    ]
    logits = model.model(mx.array(tokens)[None], cache=caches)[0].astype(mx.float32)
    differences = []
    compared = 0
    for slots, cached in seen:
        # A pass that started before the end of the text was known has no slots in the record.
        if slots[-1] < len(rows):
            compared += len(slots)
            replayed = logits[mx.array(slots)]
            differences.append(mx.abs(cached.astype(mx.float32) - replayed).max())
    return Verification(float(mx.stack(differences).max()), compared)
