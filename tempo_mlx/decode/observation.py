"""What an observer sees of a run: the attention of its passes and the distributions of its steps.

Everything here is computed on the device within the pass, and read by the host when the step's
candidates are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..lattice.lattice import Slots
from ..models.attention import ByHead, HeadCapture


@dataclass(frozen=True, eq=False)
class Attending:
    """Where one run is in the attention of a pass over a batch.

    Args:
        row: of the cache.
        first: place of its first new token among the row's new tokens.
        queries: the new tokens' slots.
        held: lattice slots in the cache, the new ones included, [S].
        at: their places in the row, [S].
        seen: which of them any of the new tokens may see, [S]; None without an observer.
    """

    row: int
    first: int
    queries: Slots
    held: np.ndarray
    at: np.ndarray
    seen: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class StepAttention:
    """Attention that a step's N tokens paid to the E slots which any of them may see.

    Args:
        step: of the tokens.
        queries: N.
        slots: numbers of the slots, [E].
        received: attention that each got, mean over the tokens, [L, H, E].
        entropy: of a token's attention in nats, mean over the tokens, [L, H].
        matrix: the attention itself, [L, H, N, E], fp16; None unless it was wanted.
    """

    step: int
    queries: int
    slots: np.ndarray
    received: np.ndarray
    entropy: np.ndarray
    matrix: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Observation:
    """What one step of a run looked like.

    Args:
        step: its number; it has been recorded.
        ids: the most probable tokens of the distribution that its set was selected from, [K].
        probabilities: of these tokens, [K].
        distribution: over the whole vocabulary, [V], fp32; None unless it was wanted.
        attention: of the pass over the step before; None at step 0.
    """

    step: int
    ids: np.ndarray
    probabilities: np.ndarray
    distribution: np.ndarray | None
    attention: StepAttention | None


class Observer(Protocol):
    """Sees every step of a run as it is recorded."""

    #: most probable tokens of each distribution that it wants
    candidates: int
    #: whether it wants whole distributions
    distributions: bool
    #: whether it wants attention matrices beside their reductions
    matrices: bool

    def observe(self, seen: Observation) -> None:
        """A step was recorded."""
        ...


class PassAttention:
    """Attention of one pass over a batch of runs.

    Args:
        captured: what the layers reported, by layer.
    """

    def __init__(self, captured: Mapping[int, Any]):
        layers = list(captured.values())
        self._by_head: list[mx.array] = []
        self._host: list[np.ndarray] | None = None
        #: attention received from the rows as each layer weighs them, summed over layers, [B, S]
        self.weighted: mx.array | None = None
        if isinstance(layers[0], ByHead):
            names = ["received", "entropy"] + ["matrix"] * (layers[0].matrix is not None)
            self._by_head = [mx.stack([getattr(each, name) for each in layers]) for name in names]
            if layers[0].weighted is not None:
                self.weighted = mx.stack([each.weighted for each in layers]).sum(axis=0)
        else:
            self.weighted = mx.stack(layers).sum(axis=0)
        self._weighted: np.ndarray | None = None

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return self._by_head + ([] if self.weighted is None else [self.weighted])

    def received(self, run: Attending) -> np.ndarray | None:
        """:attr:`weighted` attention of the slots that a run holds, [S]."""
        if self.weighted is None:
            return None
        if self._weighted is None:
            self._weighted = np.array(self.weighted)
        return self._weighted[run.row, run.at]

    def of(self, run: Attending) -> StepAttention | None:
        """What a run's tokens looked at; None if the pass was not observed."""
        if not self._by_head or run.seen is None:
            return None
        if self._host is None:
            self._host = [np.array(array) for array in self._by_head]
        received, entropy, *matrices = self._host
        places, n = run.at[run.seen], len(run.queries)
        tokens = slice(run.first, run.first + n)
        return StepAttention(
            int(run.queries.step[0]),
            n,
            run.held[run.seen],
            received[:, run.row][:, :, places],
            entropy[:, run.row, :, tokens].mean(axis=-1),
            matrices[0][:, run.row][:, :, tokens][..., places] if matrices else None,
        )


def head_capture(
    n_layers: int,
    plain: Sequence[np.ndarray | None],
    sizes: Sequence[int],
    observers: Sequence[Observer | None],
) -> HeadCapture:
    """What to capture of a pass that observers want to see.

    Args:
        n_layers: of the model.
        plain: weights [layers, N] of each run's rows in the attention that it wants for itself.
        sizes: N of each run.
        observers: of each run.
    """
    means = [
        np.full((1, n), 0.0 if observer is None else 1 / n)
        for n, observer in zip(sizes, observers, strict=True)
    ]
    rows = [np.concatenate(means, axis=1)]
    if any(each is not None for each in plain):
        weights = [
            np.zeros((n_layers, n)) if each is None else each
            for n, each in zip(sizes, plain, strict=True)
        ]
        rows.insert(0, np.concatenate(weights, axis=1))
    return HeadCapture(
        full=any(observer is not None and observer.matrices for observer in observers),
        row_weights=np.concatenate(rows).astype(np.float32),
    )
