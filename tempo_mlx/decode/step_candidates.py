"""The candidates of a step: computed for all requests together, read by the host at once."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from ..rules.selection import Candidates
from .observation import Attending, PassAttention


class StepCandidates:
    """Candidates of several runs, computed together on the device and read by the host at once.

    Args:
        ids: token ids [G, K] of G distributions, in the order in which they would be kept.
        probabilities: of these tokens, [G, K].
        transitions: their probabilities in what the distributions were combined from, [N, K].
        sizes: for each run the rows of each of its distributions.
        attention: that the rows paid, if it was captured; and where each run is in it.
        observed: what observers want of each distribution: ids [G, K'] of the most probable
            tokens, their probabilities, and, if that is wanted, the distribution itself.
    """

    def __init__(
        self,
        ids: mx.array,
        probabilities: mx.array,
        transitions: mx.array,
        sizes: Sequence[Sequence[int]],
        attention: PassAttention | None = None,
        attending: Sequence[Attending] = (),
        observed: Sequence[mx.array] = (),
    ):
        self.ids = ids
        self.probabilities = probabilities
        self.transitions = transitions
        self.attention = attention
        self.attending = attending
        self._observed = observed
        self._groups = [0, *accumulate(len(run) for run in sizes)]
        self._rows = [0, *accumulate(sum(run) for run in sizes)]
        #: the model's own log-probabilities of the rows, [N, V], if a run wants them
        self.logprobs: mx.array | None = None
        #: most probable ids of each distribution, [G, K'], if a run drafts by them
        self.followers: mx.array | None = None
        self._host_followers: np.ndarray | None = None
        self._host_logprobs: np.ndarray | None = None
        self._seen: list[np.ndarray] | None = None
        self._read: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @classmethod
    def of_rows(
        cls, ids: mx.array, p: mx.array, rows: mx.array, sizes: Sequence[Sequence[int]], **rest: Any
    ) -> "StepCandidates":
        """The candidates ids [G, K] of distributions p [G, V] that were combined from rows [N, V].

        Args:
            rest: further arguments of the class.
        """
        probabilities = mx.take_along_axis(p, ids, axis=1)
        if rows is p:
            return cls(ids, probabilities, probabilities, sizes, **rest)
        each = [n for run in sizes for n in run]
        of_row = ids if len(each) == 1 else ids[mx.array(np.repeat(range(len(each)), each))]
        return cls(ids, probabilities, mx.take_along_axis(rows, of_row, axis=1), sizes, **rest)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        attention = [] if self.attention is None else self.attention.state
        wanted = [each for each in (self.logprobs, self.followers) if each is not None]
        return [
            self.ids,
            self.probabilities,
            self.transitions,
            *attention,
            *self._observed,
            *wanted,
        ]

    def logprobs_of(self, run: int) -> np.ndarray:
        """The model's own log-probabilities of one run's rows, [N, V]."""
        assert self.logprobs is not None
        if self._host_logprobs is None:
            self._host_logprobs = np.array(self.logprobs)
        return self._host_logprobs[self._rows[run] : self._rows[run + 1]]

    def observed(self, run: int) -> list[np.ndarray]:
        """Most probable ids of one run's distribution, their p, and if it is wanted, all p."""
        if self._seen is None:
            self._seen = [np.array(array) for array in self._observed]
        return [array[self._groups[run]] for array in self._seen]

    def followers_of(self, run: int) -> np.ndarray:
        """The most probable ids of one run's first distribution, best first, [K']."""
        assert self.followers is not None
        if self._host_followers is None:
            self._host_followers = np.array(self.followers)
        ids: np.ndarray = self._host_followers[self._groups[run]]
        return ids

    def of(self, run: int, k: int | None = None, leaves: bool = False) -> Candidates:
        """The first k candidates of one run. Reads the device: the step's one synchronisation.

        Args:
            run: its place.
            k: candidates of each distribution.
            leaves: keep the axis of the run's distributions, even if it has one.
        """
        if self._read is None:
            ids, probabilities = np.array(self.ids), np.array(self.probabilities)
            alike = self.transitions is self.probabilities
            self._read = ids, probabilities, probabilities if alike else np.array(self.transitions)
        ids, probabilities, transitions = self._read
        groups = slice(self._groups[run], self._groups[run + 1])
        rows = transitions[self._rows[run] : self._rows[run + 1], :k]
        ids, probabilities = ids[groups, :k], probabilities[groups, :k]
        if leaves:
            return Candidates(ids, probabilities, rows)
        return Candidates(ids[0], probabilities[0], rows)
