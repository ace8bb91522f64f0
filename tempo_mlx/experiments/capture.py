"""Captures of a run: reductions of its attention, and divergences from other runs.

A :class:`Recorder` observes one run. The runs of a group differ in visibility only; one
:class:`Divergence` compares their distributions at each step.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..decode.observation import Observation, StepAttention

#: How many of the most probable tokens of each distribution are kept.
TOP = 20

#: Smallest probability whose logarithm is taken; fp32 rounds smaller ones to 0.
LEAST = float(np.finfo(np.float32).tiny)

#: Axes of the arrays of a run, outermost first.
AXES = {
    "received": ("entry", "layer", "head"),
    "query_step": ("entry",),
    "slot": ("entry",),
    "queries": ("entry",),
    "entropy": ("query_step", "layer", "head"),
    "entropy_step": ("query_step",),
    "next_ids": ("step", "rank"),
    "next_probabilities": ("step", "rank"),
}

#: Axes of an attention matrix; each query step has one.
MATRIX_AXES = ("layer", "head", "query", "key")


@dataclass(frozen=True)
class Pair:
    """Divergences between two runs of a group, at the same steps.

    Args:
        a, b: positions of the runs in their group.
        steps: at which both have a distribution.
        ab, ba: KL(a||b) and KL(b||a), nats, one for each step.
    """

    a: int
    b: int
    steps: list[int]
    ab: list[float]
    ba: list[float]


class Divergence:
    """KL divergences between the runs of one group, step by step.

    A distribution is dropped once all runs of the group have added theirs of the same step.

    Args:
        members: number of runs in the group.
    """

    def __init__(self, members: int):
        self.members = members
        self._found: dict[tuple[int, int], dict[int, tuple[float, float]]] = {
            pair: {} for pair in combinations(range(members), 2)
        }
        #: step -> run -> its distribution and the logarithm of it
        self._waiting: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._complete: set[int] = set()

    def add(self, member: int, step: int, p: np.ndarray) -> None:
        """Add the distribution [V] that a run's step was selected from."""
        if step in self._complete:
            return  # the run started again
        logs = np.log(np.maximum(p, np.float32(LEAST)))
        waiting = self._waiting.setdefault(step, {})
        for other, (q, other_logs) in waiting.items():
            if other == member:
                continue
            difference = logs - other_logs
            # Not by BLAS, whose threads would compete with the model's.
            ours = 0.0 + float((p * difference).sum(dtype=np.float64))
            theirs = 0.0 - float((q * difference).sum(dtype=np.float64))
            pair = (member, other) if member < other else (other, member)
            self._found[pair][step] = (ours, theirs) if member < other else (theirs, ours)
        waiting[member] = p.copy(), logs
        if len(waiting) == self.members:
            del self._waiting[step]
            self._complete.add(step)

    def pairs(self) -> list[Pair]:
        """The divergences of each pair of runs."""
        pairs = []
        for (a, b), found in self._found.items():
            steps = sorted(found)
            values = [found[step] for step in steps]
            pairs.append(Pair(a, b, steps, [ab for ab, _ in values], [ba for _, ba in values]))
        return pairs


class Recorder:
    """Collects the captures of one run; an :class:`~tempo_mlx.decode.observation.Observer`.

    Args:
        matrices: keep the attention matrices too.
        divergence: of the run's group; None for the only run of a group.
        member: position of the run in the group.
    """

    def __init__(self, matrices: bool, divergence: Divergence | None, member: int):
        self.candidates = TOP
        self.matrices = matrices
        self.distributions = divergence is not None
        self._divergence, self._member = divergence, member
        self._attention: list[StepAttention] = []
        self._next: list[tuple[np.ndarray, np.ndarray]] = []

    def observe(self, seen: Observation) -> None:
        self._next.append((seen.ids[:TOP], seen.probabilities[:TOP]))
        if seen.attention is not None:
            self._attention.append(seen.attention)
        if self._divergence is not None and seen.distribution is not None:
            self._divergence.add(self._member, seen.step, seen.distribution)

    def arrays(self) -> dict[str, np.ndarray]:
        """The reductions, named as in :data:`AXES`; a run of one step has none of attention."""
        steps = self._attention
        arrays = {
            "next_ids": np.stack([ids for ids, _ in self._next]).astype(np.int32),
            "next_probabilities": np.stack([p for _, p in self._next]).astype(np.float32),
        }
        if steps:
            sizes = [len(each.slots) for each in steps]
            arrays |= {
                # [L, H, E] to [E, L, H]
                "received": np.ascontiguousarray(
                    np.concatenate([each.received for each in steps], axis=2).transpose(2, 0, 1)
                ),
                "query_step": np.repeat([each.step for each in steps], sizes).astype(np.int32),
                "slot": np.concatenate([each.slots for each in steps]).astype(np.int32),
                "queries": np.repeat([each.queries for each in steps], sizes).astype(np.int32),
                "entropy": np.stack([each.entropy for each in steps]),
                "entropy_step": np.array([each.step for each in steps], np.int32),
            }
        return arrays

    def full(self) -> dict[str, np.ndarray]:
        """Attention matrices [L, H, N, E], fp16, and the slots [E] of their keys, by step."""
        arrays = {}
        for each in self._attention:
            if each.matrix is not None:
                arrays[f"attention.{each.step}"] = np.ascontiguousarray(each.matrix)
                arrays[f"slots.{each.step}"] = each.slots.astype(np.int32)
        return arrays
