"""The oracle: replay a lattice in one uncached pass, by the definitions, slot by slot.

It shares neither the cache nor the vectorised visibility rules with what it checks. The model's
own files run with a cache object that stores nothing.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import TempoError
from .lattice import Lattice
from .models import Capture, PositionedModel
from .models.attention import AttentionRecorder
from .settings import Settings

#: Visibilities that are defined here, too, slot by slot; see :func:`_sees` and :func:`_lines`.
KNOWN = ("isolated", "visible", "hidden", "tree", "recombined")


def require_known(settings: Settings) -> None:
    """Raise TempoError for a visibility of which a replay would not know who sees whom."""
    if settings.visibility not in KNOWN:
        raise TempoError(
            f"verify and attention received know the visibilities {', '.join(KNOWN)}, "
            f"not {settings.visibility!r}"
        )


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

    def __init__(
        self,
        offset: Any,
        positions: np.ndarray,
        mask: np.ndarray,
        window: int | None,
        dtype: mx.Dtype,
        recorder: AttentionRecorder | None,
    ):
        self.offset = offset
        self.attention_recorder = recorder
        self._positions, self._mask, self._window, self._dtype = positions, mask, window, dtype

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        mask = self._mask
        for window in (self._window, window_size):
            if window is not None:
                far = self._positions[:, None] - self._positions[None] >= window
                mask = np.where(far, False if mask.dtype == bool else -np.inf, mask)
        made = mx.array(mask)[None, None]
        return made if mask.dtype == bool else made.astype(self._dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._keys_and_values = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._keys_and_values


def verify(
    model: PositionedModel,
    lattice: Lattice,
    settings: Settings,
    seen: list[tuple[np.ndarray, mx.array]],
) -> Verification:
    """Compare the logits that a cached run saw with one uncached pass over all its slots.

    Args:
        model: the model that made the run.
        lattice: the run's record: tokens, positions, sets, when they were pruned, key weights.
        settings: the run's visibility, weighting and repair.
        seen: (slots [N], logits [N, V]) of each forward pass of the run.

    Raises:
        TempoError: for a visibility that is not among :data:`KNOWN`.
    """
    logits = replay(model, lattice, settings)
    differences = []
    compared = 0
    for slots, cached in seen:
        # A pass that started before the end of the text was known has no slots in the record.
        if slots[-1] < len(logits):
            compared += len(slots)
            replayed = logits[mx.array(slots)]
            differences.append(mx.abs(cached.astype(mx.float32) - replayed).max())
    return Verification(float(mx.stack(differences).max()), compared)


def received_attention(
    model: PositionedModel, lattice: Lattice, settings: Settings
) -> dict[int, np.ndarray]:
    """Attention that the rows of each step pay to each slot, by one uncached pass.

    Returns:
        step -> [S], the mean over the step's rows, all heads and all layers.

    Raises:
        UnsupportedModelError: if the model's attention cannot be captured.
        TempoError: for a visibility that is not among :data:`KNOWN`.
    """
    model.require_capture()
    recorder = AttentionRecorder(Capture(full=True))
    mx.eval(replay(model, lattice, settings, recorder)[:1])
    layers = [weights[0].mean(axis=0) for weights in recorder.weights.values()]  # [S, S] each
    mean = np.array(mx.stack(layers).mean(axis=0))
    slots = {step.step: [token.slot for token in step.tokens] for step in lattice.steps}
    return {step: mean[rows].mean(axis=0) for step, rows in slots.items() if rows}


def replay(
    model: PositionedModel,
    lattice: Lattice,
    settings: Settings,
    recorder: AttentionRecorder | None = None,
) -> mx.array:
    """Logits [S, V], fp32, of all recorded slots, by one uncached pass; see :func:`verify`."""
    require_known(settings)
    length = len(lattice.prompt_tokens)
    rows: list[tuple[int, int, int, int, int | None]] = [
        (id, i, i - length, 1, None) for i, id in enumerate(lattice.prompt_tokens)
    ]
    for step in lattice.steps:
        for token in step.tokens:
            rows.append((token.id, step.position, step.step, len(step.tokens), token.pruned_at))
    lines = _lines(lattice) if settings.has_parents else None
    tokens = np.array([row[0] for row in rows])
    positions = np.array([row[1] for row in rows])
    weighted = settings.weighting != "none"
    mask = np.zeros((len(rows), len(rows)), np.float32 if weighted else bool)
    for q, (_, _, q_step, q_size, _) in enumerate(rows):
        weights = lattice.key_weights.get(q_step)
        for k, (_, _, k_step, k_size, k_pruned) in enumerate(rows):
            if lines is None:
                sees = _sees(settings, q_step, k_step, k_size, k_pruned, q == k)
            else:
                sees = k in lines[q] if k >= length else k <= q
            if not weighted:
                mask[q, k] = sees
            elif not sees:
                mask[q, k] = -np.inf
            elif weights is not None and (k_step < q_step or settings.visibility == "visible"):
                mask[q, k] = np.log(max(weights[k], 1e-30)) if k_size > 1 or q_size > 1 else 0.0
    offset = model.as_offset(positions[None])
    caches = [
        _Stateless(offset, positions, mask, layer.window, model.dtype, recorder)
        for layer in model.make_cache().layers
    ]
    return model.model(mx.array(tokens)[None], cache=caches)[0].astype(mx.float32)


def _lines(lattice: Lattice) -> list[set[int]]:
    """For each slot, itself and the slots that lead to it from the prompt."""
    lines: list[set[int]] = [set() for _ in lattice.prompt_tokens]
    for step in lattice.steps:
        for token in step.tokens:
            assert token.parent is not None
            lines.append(lines[token.parent] | {token.slot})
    return lines


def _sees(
    settings: Settings, q_step: int, k_step: int, k_size: int, k_pruned: int | None, own: bool
) -> bool:
    """Whether a query of one step sees a key of another, by the definitions."""
    if own:
        return True
    if k_pruned is not None and (settings.repairs or k_pruned < q_step):
        return False
    if k_step == q_step:
        return settings.visibility == "visible"
    return k_step < q_step and (settings.visibility != "hidden" or k_size == 1)
