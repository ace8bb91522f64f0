"""The oracle: replay a lattice in one uncached pass, by the definitions, slot by slot.

It has masks, windows and rows of its own: who sees whom is asked of the visibility's scalar
``sees``, how far a layer sees of mlx-lm's own cache, and the cache that the model's files get
stores nothing. docs/verification.md lists what it shares with the runs that it checks.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, RotatingKVCache, make_prompt_cache

from ..errors import TempoError
from ..lattice.lattice import Lattice, Slot, Token
from ..models import Capture, PlainModel, PositionedModel
from ..models.attention import AttentionRecorder, during
from ..rules.rule import called
from ..rules.visibility import Visibility
from ..settings import Settings


def oracle_of(model: PositionedModel) -> str:
    """What :func:`verify` compares a run with, in words."""
    return "mlx-lm's own decode of each text" if model.is_recurrent else "one uncached pass"


def require_known(rule: Visibility, model: PositionedModel | PlainModel) -> None:
    """Raise TempoError for a visibility of which a replay would not know who sees whom."""
    if not rule.can_be_verified:
        raise TempoError(
            f"verify and attention received need a visibility with sees(query, key), which "
            f"{rule.name} has not"
        )
    if isinstance(model, PositionedModel) and model.is_recurrent and not rule.full_context:
        raise TempoError(
            f"verify decodes each text of a recurrent model by itself, where a token sees all "
            f"before it; with visibility {rule.name} it does not, unless full_context says so"
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


class _Rows:
    """S tokens, each a row of the model, all of one sequence."""

    batch_size = 1
    is_rectangular = True

    def by_sequence(self, x: mx.array) -> mx.array:
        """[S, H, 1, D] of the tokens to [1, H, S, D]."""
        return x.transpose(2, 1, 0, 3)

    by_token = by_sequence


class _Replay:
    """The pass that attention is told of."""

    spread = False
    rows = _Rows()

    def __init__(self, positions: np.ndarray, recorder: AttentionRecorder | None):
        self.offset = mx.array(positions.astype(np.int32))
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
        TempoError: see :func:`require_known`.
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
        TempoError: see :func:`require_known`.
    """
    found = replayed_attention(model, lattice, settings)
    mean = np.array(mx.stack([weights.mean(axis=0) for weights in found.values()]).mean(axis=0))
    slots = {step.step: [token.slot for token in step.tokens] for step in lattice.steps}
    return {step: mean[rows].mean(axis=0) for step, rows in slots.items() if rows}


def replayed_attention(
    model: PositionedModel,
    lattice: Lattice,
    settings: Settings,
    layers: tuple[int, ...] | None = None,
) -> dict[int, mx.array]:
    """Attention weights [H, S, S], queries x keys, of each layer, by one uncached pass.

    Raises:
        As :func:`received_attention`.
    """
    model.require_capture()
    model.require_replay()
    recorder = AttentionRecorder(Capture(layers, full=True))
    mx.eval(replay(model, lattice, settings, recorder)[:1])
    return {layer: weights[0] for layer, weights in recorder.weights.items()}


def replay(
    model: PositionedModel,
    lattice: Lattice,
    settings: Settings,
    recorder: AttentionRecorder | None = None,
) -> mx.array:
    """Logits [S, V], fp32, of all recorded slots, by one uncached pass; see :func:`verify`."""
    rule = settings.visibility_rule
    require_known(rule, model)
    slots = _slots(lattice)
    tokens = [token for step in lattice.steps for token in step.tokens]
    ids = np.array([*lattice.prompt_tokens, *(token.id for token in tokens)])
    pruned_at = [None] * len(lattice.prompt_tokens) + [token.pruned_at for token in tokens]
    positions = np.array([len(lattice.prompt_tokens) + slot.step for slot in slots])
    weighted = settings.weighting != "none"
    mask = np.zeros((len(slots), len(slots)), np.float32 if weighted else bool)
    for query in slots:
        seen = []
        for key, pruned in zip(slots, pruned_at, strict=True):
            alive = pruned is None or not (settings.repairs or pruned < query.step)
            if _sees(rule, query, key, alive):
                seen.append(key)
        if not weighted:
            mask[query.index, [key.index for key in seen]] = True
            continue
        mask[query.index] = -np.inf
        weights = lattice.key_weights(query.step)
        siblings = sum(key.step == query.step for key in seen) > 1
        for key in seen:
            own = key is query and not siblings
            known = weights is not None and not own and (key.set_size > 1 or query.set_size > 1)
            weight = weights[key.index] if weights is not None and known else 1.0
            mask[query.index, key.index] = np.log(max(weight, 1e-30))
    shared = _Replay(positions, recorder)

    def stand_in(stock: Any) -> Any:
        if isinstance(stock, CacheList):
            return tuple(map(stand_in, stock.caches))
        # How far a layer sees, mlx-lm's own cache for it says.
        window = stock.max_size if isinstance(stock, RotatingKVCache) else None
        return _Stateless(positions, mask, window, model, shared)

    caches = list(map(stand_in, make_prompt_cache(model.model)))
    with during(shared):
        return model.model(mx.array(ids)[:, None], cache=caches)[:, 0].astype(mx.float32)


def _slots(lattice: Lattice) -> list[Slot]:
    """All recorded slots, with the slots that lead to each where tokens have parents."""
    length = len(lattice.prompt_tokens)
    slots = [Slot(i, i - length, 1) for i in range(length)]
    for step in lattice.steps:
        for token in step.tokens:
            before = frozenset() if token.parent is None else slots[token.parent].chain
            slots.append(Slot(token.slot, step.step, len(step.tokens), before | {token.slot}))
    return slots


def _sees(rule: Visibility, query: Slot, key: Slot, alive: bool) -> bool:
    """Whether a query sees a key, by the definitions."""
    if query.index == key.index:
        return True
    if key.step > query.step or not alive:
        return False
    return query.step < 0 or bool(called(rule, rule.sees, query, key))
