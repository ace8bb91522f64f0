"""The oracle: replay a lattice in one uncached pass, by the definitions, slot by slot.

It shares neither the cache nor the vectorised visibility rules with what it checks. The model's
own files run with a cache object that stores nothing. What it shares is that tokens are rows of the
model, which attention sees side by side.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..errors import TempoError
from ..lattice.lattice import Lattice, Token
from ..models import Capture, PositionedModel
from ..models.attention import AttentionRecorder, during
from ..models.rows import TokenRows
from ..settings import Settings

#: Visibilities that are defined here, too, slot by slot; see :func:`_sees` and :func:`_lines`.
KNOWN = ("isolated", "visible", "hidden", "tree", "recombined")


def oracle_of(model: PositionedModel) -> str:
    """What :func:`verify` compares a run with, in words."""
    return "mlx-lm's own decode of each text" if model.is_recurrent else "one uncached pass"


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


class _Replay:
    """The pass that attention is told of: S tokens of one sequence, all of them rows."""

    spread = False

    def __init__(self, positions: np.ndarray, recorder: AttentionRecorder | None):
        n = len(positions)
        self.offset = mx.array(positions.astype(np.int32))
        self.rows = TokenRows(np.zeros(n, np.int64), 1)
        self.recorder = recorder

    def mask_by_sequence(self, mask: mx.array) -> mx.array:
        return mask.transpose(2, 1, 0, 3)


class _Stateless:
    """What an attention module sees as its cache when a whole sequence is read at once."""

    def __init__(
        self,
        positions: np.ndarray,
        mask: np.ndarray,
        window: int | None,
        model: PositionedModel,
        replay: _Replay,
    ):
        self.offset = replay.offset
        self.forward_pass = replay
        self._positions, self._mask, self._window = positions, mask, window
        self._dtype, self._grouped = model.dtype, model.grouped_scores

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        mask = self._mask
        for window in (self._window, window_size):
            if window is not None:
                far = self._positions[:, None] - self._positions[None] >= window
                mask = np.where(far, False if mask.dtype == bool else -np.inf, mask)
        made = mx.array(mask)[:, None, None]  # [S, 1, 1, S]
        made = made[:, :, None] if self._grouped else made
        return made if mask.dtype == bool else made.astype(self._dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        # [S, H_kv, 1, D] of the tokens, to the keys and values of one sequence.
        self._keys_and_values = keys.transpose(2, 1, 0, 3), values.transpose(2, 1, 0, 3)
        return self._keys_and_values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._keys_and_values


def verify(
    model: PositionedModel,
    lattice: Lattice,
    settings: Settings,
    seen: list[tuple[np.ndarray, mx.array]],
) -> Verification:
    """Compare the logits that a cached run saw with one uncached pass over all its slots.

    Where layers are recurrent: with mlx-lm's own decode of each text of the run by itself.

    Args:
        model: the model that made the run.
        lattice: the run's record: tokens, positions, sets, when they were pruned, key weights.
        settings: the run's visibility, weighting and repair.
        seen: (slots [N], logits [N, V]) of each forward pass of the run.

    Raises:
        TempoError: for a visibility that is not among :data:`KNOWN`.
    """
    if model.is_recurrent:
        return _by_texts(model, lattice, seen)
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


def _by_texts(
    model: PositionedModel, lattice: Lattice, seen: list[tuple[np.ndarray, mx.array]]
) -> Verification:
    tokens = {token.slot: token for step in lattice.steps for token in step.tokens}
    last = len(lattice.prompt_tokens) - 1
    cached = {
        int(slot): rows[i] for slots, rows in seen for i, slot in enumerate(slots) if slot >= last
    }
    largest, compared = 0.0, set[int]()
    # Without parents each set is one token, behind the one before.
    before = {t.slot: t.slot - 1 if t.parent is None else t.parent for t in tokens.values()}
    for end in [slot for slot in tokens if slot not in before.values()] or [last]:
        line: list[Token] = []
        while end in tokens:
            line.insert(0, tokens[end])
            end = before[end]
        text = [*lattice.prompt_tokens, *(token.id for token in line)]
        plain = model.model(mx.array(text)[None], cache=make_prompt_cache(model.model))[0, last:]
        slots = [last, *(token.slot for token in line)]
        known = [i for i, slot in enumerate(slots) if slot in cached and slot not in compared]
        if known:
            found = mx.stack([cached[slots[i]] for i in known]).astype(mx.float32)
            expected = plain[mx.array(known)].astype(mx.float32)
            largest = max(largest, float(mx.abs(found - expected).max()))
            compared.update(slots[i] for i in known)
    return Verification(largest, len(compared))


def received_attention(
    model: PositionedModel, lattice: Lattice, settings: Settings
) -> dict[int, np.ndarray]:
    """Attention that the rows of each step pay to each slot, by one uncached pass.

    Returns:
        step -> [S], the mean over the step's rows, all heads and all layers.

    Raises:
        UnsupportedModelError: if the model's attention cannot be captured, or layers are recurrent.
        TempoError: for a visibility that is not among :data:`KNOWN`.
    """
    model.require_capture()
    model.require_replay()
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
    shared = _Replay(positions, recorder)
    caches = [
        _Stateless(positions, mask, layer.window, model, shared) for layer in model.make_cache().kv
    ]
    with during(shared):
        return model.model(mx.array(tokens)[:, None], cache=caches)[:, 0].astype(mx.float32)


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
