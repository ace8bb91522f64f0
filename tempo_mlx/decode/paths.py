"""The best paths through a lattice's sets, each scored as the text that it is.

The hypotheses of the beam live in one sequence as a tree: a slot sees the prompt, its ancestors
and itself, and recurrent layers go on from its parent's state, so its logits are those of a
separate sequential decode of its path.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..lattice.lattice import Lattice
from ..models import PositionedModel, SlotStore
from ..numerics import log_softmax_at
from .result import BEAM, GenerationResult
from .sequences import Batch, SequenceState

#: Fraction of unused slots above which the cache is compacted.
MAX_UNUSED = 0.5

#: Prompt tokens in one forward pass.
CHUNK = 2048


class _Beam:
    """The hypotheses of one problem: paths so far, their scores, and what they attend to."""

    def __init__(self, prompt: list[int], beam: int):
        self.prompt, self.beam = prompt, beam
        self.sets: list[list[int]] = []
        self.scores = np.zeros(1)  # [R], nats
        self.chains: list[list[int]] = [[]]
        self.sees = np.ones((1, len(prompt)), bool)  # [R, S]: slots that each path's last one sees
        self.last = np.array([len(prompt) - 1])  # [R]: slot of each path's last token
        self.step = 0

    @property
    def finished(self) -> bool:
        return self.step == len(self.sets)

    @property
    def ids(self) -> list[int]:
        """The set to choose from."""
        return self.sets[self.step]

    def extend(self, logp: np.ndarray) -> None:
        """Go on with the best of all paths, log p [R, N] of the set's tokens in each."""
        joint = self.scores[:, None] + logp
        best = np.argsort(-joint, axis=None, kind="stable")[: self.beam]
        parents, choice = np.unravel_index(best, joint.shape)
        self.scores = joint[parents, choice]
        ids = np.array(self.ids)[choice]
        self.chains = [[*self.chains[p], int(t)] for p, t in zip(parents, ids, strict=True)]
        self.sees, self.last = self.sees[parents], self.last[parents]
        self.step += 1

    def read(self) -> np.ndarray:
        """Append the paths' last tokens; the slots that they continue, [R]."""
        continued, (n, first) = self.last, self.sees.shape
        self.sees = np.concatenate([self.sees, np.eye(n, dtype=bool)], axis=1)
        self.last = np.arange(first, first + n)
        return continued

    def keep(self, slots: np.ndarray) -> None:
        """Only these slots are left, ascending."""
        self.sees = self.sees[:, slots]
        self.last = np.searchsorted(slots, self.last)


class PathSearch:
    """Beam search over sets; all hypotheses of all problems' steps in one forward pass.

    Args:
        model: scores the tokens.
        prompts: of each problem, ids of at least one token.
        beam: hypotheses kept at each step, at least 1.
        cache: a row for each problem that holds the beginning of its prompt, not the last token.
            None to read the prompts.
    """

    def __init__(
        self,
        model: PositionedModel,
        prompts: Sequence[list[int]],
        beam: int,
        cache: SlotStore | None = None,
    ):
        self._model = model
        self._beams = [_Beam(prompt, beam) for prompt in prompts]
        #: of the last tokens that were read, [N, V], and the problem of each
        self._logits: mx.array | None
        self._cache, self._logits = _read_prompts(model, prompts, cache)
        self._rows = np.arange(len(self._beams))

    def extend(
        self, sets: Sequence[list[list[int]]], last: bool = False
    ) -> list[list[tuple[list[int], float]]]:
        """Go on to the end of the sets.

        Args:
            sets: of each problem, for each step the ids to choose from; they begin with those of
                the last call.
            last: problems are not extended again, so that finished ones make room for others.

        Returns:
            for each problem at most ``beam`` pairs (ids, log-probability in nats), best first.
        """
        beams = self._beams
        for each, own in zip(beams, sets, strict=True):
            each.sets = own
        while going := [row for row, each in enumerate(beams) if not each.finished]:
            if self._logits is None:
                _drop_unused(self._cache, beams, last)
                self._rows, self._logits = _read_last(self._model, self._cache, beams, going)
            keep = np.isin(self._rows, going)
            of_row, logits = self._rows[keep], self._logits[mx.array(np.flatnonzero(keep))]
            widest = max(len(beams[row].ids) for row in going)
            ids = np.array([np.resize(beams[row].ids, widest) for row in of_row])
            logp = log_softmax_at(logits.astype(mx.float32), mx.array(ids))
            mx.eval(logp, self._cache.state)
            found = np.array(logp, np.float64)
            for row in going:
                beams[row].extend(found[of_row == row, : len(beams[row].ids)])
            self._logits = None
        return [
            [(chain, float(score)) for chain, score in zip(each.chains, each.scores, strict=True)]
            for each in beams
        ]


def best_paths(
    model: PositionedModel,
    problems: Sequence[tuple[list[int], list[list[int]]]],
    beam: int,
    cache: SlotStore | None = None,
) -> list[list[tuple[list[int], float]]]:
    """The best paths of several problems: (prompt, sets); see :class:`PathSearch`."""
    search = PathSearch(model, [prompt for prompt, _ in problems], beam, cache)
    return search.extend([sets for _, sets in problems], last=True)


def find_paths(
    results: Sequence[GenerationResult],
    beam: int = BEAM,
    prompts: Sequence[SlotStore | None] | None = None,
) -> None:
    """Find the paths of several results of one model together; see :meth:`GenerationResult.paths`.

    Args:
        results: at least one; those whose paths are known are left as they are.
        beam: hypotheses kept at each step of each.
        prompts: of each result the slots of its prompt but the last, so that it need not be read.
    """
    new = [i for i, result in enumerate(results) if not result.knows_paths(beam)]
    if not new:
        return
    problems = [
        (results[i].lattice.prompt_tokens, [[t.id for t in s] for s in results[i].lattice.sets])
        for i in new
    ]
    rows = [prompts[i] for i in new] if prompts else []
    read = [store for store in rows if store is not None]
    store = SlotStore.merge(read) if len(read) == len(new) else None
    model = results[new[0]].model
    assert isinstance(model, PositionedModel)
    for i, found in zip(new, best_paths(model, problems, beam, store), strict=True):
        results[i].take_paths(found, beam)


def _read_prompts(
    model: PositionedModel, prompts: Sequence[list[int]], cache: SlotStore | None
) -> tuple[SlotStore, mx.array]:
    """A cache with a row for each prompt, and logits of their last tokens, [B, V]."""
    sequences = [SequenceState(Lattice(prompt)) for prompt in prompts]
    # Recurrent layers read texts of several lengths one at a time.
    alone = model.is_recurrent and cache is None
    batches = [Batch(model, [s]) for s in sequences] if alone else [Batch(model, sequences, cache)]
    logits = mx.concatenate([batch.prefill(CHUNK) for batch in batches])
    if len(batches) == 1:
        return batches[0].cache, logits
    return SlotStore.merge([batch.cache for batch in batches]), logits


def _read_last(
    model: PositionedModel, cache: SlotStore, beams: list[_Beam], going: list[int]
) -> tuple[np.ndarray, mx.array]:
    """Append each path's last token; returns the row of each and their logits [N, V]."""
    sizes = [len(beams[row].chains) for row in going]
    rows = np.repeat(going, sizes)
    added = np.bincount(rows, minlength=len(beams))
    mask = np.zeros((len(rows), int((cache.counts + added).max())), bool)
    done, parents = 0, []
    for row, n in zip(going, sizes, strict=True):
        each = beams[row]
        parents.append(each.read())
        mask[done : done + n, : each.sees.shape[1]] = each.sees
        done += n
    tokens = mx.array([chain[-1] for row in going for chain in beams[row].chains])
    positions = np.repeat([len(beams[r].prompt) + beams[r].step - 1 for r in going], sizes)
    call = tokens[None], positions[None], mx.array(mask)[None, None], cache
    return rows, model(*call, rows=rows, parents=np.concatenate(parents))[0]


def _drop_unused(cache: SlotStore, beams: list[_Beam], last: bool) -> None:
    """Drop slots that no path sees, if they are many; of finished problems all if it is the last
    call."""
    used = [each.sees.any(axis=0) & (not (last and each.finished)) for each in beams]
    if sum(int(u.sum()) for u in used) < (1 - MAX_UNUSED) * cache.counts.sum():
        cache.compact([np.flatnonzero(u) for u in used])
        for each, chosen in zip(beams, used, strict=True):
            each.keep(np.flatnonzero(chosen))
