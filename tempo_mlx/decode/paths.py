"""The best paths through a lattice's sets, each scored as the text that it is.

The hypotheses of the beam live in one sequence as a tree: a slot sees the prompt, its ancestors
and itself, and recurrent layers go on from its parent's state, so its logits are those of a
separate sequential decode of its path.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..lattice.lattice import NONE, Lattice
from ..models import PositionedModel, SlotStore
from ..numerics import log_softmax_at
from .result import BEAM, GenerationResult
from .sequences import Batch, SequenceState

#: Prompt tokens in one forward pass.
CHUNK = 2048


class _Beam:
    """The hypotheses of one problem: R paths, the branches of a tree.

    Args:
        prompt: ids, at least one.
        width: R at most.
    """

    def __init__(self, prompt: list[int], width: int):
        self.lattice = Lattice(prompt)
        self.sequence = SequenceState(self.lattice, "tree")
        self.width = width
        self.sets: list[list[int]] = []
        #: log-probability of each path in nats, [R], and the slot of its last token, [R]
        self.scores = np.zeros(1)
        self.last = np.array([len(prompt) - 1])
        #: of each slot, [S]
        self.ids = np.array(prompt)
        self.step = 0

    @property
    def is_finished(self) -> bool:
        return self.step == len(self.sets)

    @property
    def next_set(self) -> list[int]:
        """Ids to choose from."""
        return self.sets[self.step]

    def extend(self, logp: np.ndarray) -> None:
        """Go on with the best of all paths, log p [R, N] of the set's tokens in each."""
        joint = self.scores[:, None] + logp
        best = np.argsort(-joint, axis=None, kind="stable")[: self.width]
        rows, choice = np.unravel_index(best, joint.shape)
        self.scores = joint[rows, choice]
        self.sequence.pending = self.lattice.reserve(len(best), self.step, self.last[rows])
        self.last = self.sequence.pending.index
        self.ids = np.append(self.ids, np.array(self.next_set)[choice])
        self.step += 1

    @property
    def paths(self) -> list[tuple[list[int], float]]:
        """Ids and score of each path, best first."""
        chains = self.lattice.chains(self.last)
        ids = [self.ids[chain[chain != NONE][::-1]].tolist() for chain in chains]
        return list(zip(ids, self.scores.tolist(), strict=True))


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
        self._beams = [_Beam(prompt, beam) for prompt in prompts]
        self._batch = _read_prompts(model, [beam.sequence for beam in self._beams], cache)

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
        for beam, own in zip(self._beams, sets, strict=True):
            beam.sets = own
        while going := [beam for beam in self._beams if not beam.is_finished]:
            if last:
                self._release_finished()
            self._read_ends(going)
            sets_of_rows = [(beam.next_set, len(beam.scores)) for beam in going]
            widest = max(len(ids) for ids, _ in sets_of_rows)
            ids = [np.resize(ids, widest) for ids, n in sets_of_rows for _ in range(n)]
            logits = mx.concatenate([beam.sequence.passed() for beam in going])
            logp = log_softmax_at(logits.astype(mx.float32), mx.array(np.array(ids)))
            mx.eval(logp, self._batch.cache.state)
            ends = np.cumsum([n for _, n in sets_of_rows])
            found = np.split(np.array(logp, np.float64), ends)
            for beam, rows in zip(going, found, strict=False):
                beam.extend(rows[:, : len(beam.next_set)])
        return [beam.paths for beam in self._beams]

    def _release_finished(self) -> None:
        for beam in self._beams:
            if beam.is_finished and beam.sequence in self._batch.sequences:
                self._batch.release(beam.sequence)

    def _read_ends(self, going: list[_Beam]) -> None:
        """Read the paths' last tokens; those of the prompts were read."""
        parts = [(b.sequence, b.sequence.pending) for b in going if b.sequence.pending is not None]
        if parts:
            self._batch.compact()
            tokens = np.concatenate([b.ids[b.last] for b in going])
            self._batch.append(mx.array(tokens), parts)


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
    model: PositionedModel, sequences: list[SequenceState], cache: SlotStore | None
) -> Batch:
    """A batch that has read its sequences' prompts."""
    if cache is not None or not model.is_recurrent:
        batch = Batch(model, sequences, cache)
        batch.prefill(CHUNK)
        return batch
    # Recurrent layers read texts of several lengths one at a time.
    batch = Batch(model, [])
    for sequence in sequences:
        alone = Batch(model, [sequence])
        alone.prefill(CHUNK)
        batch.adopt(alone, [(sequence, sequence)])
    return batch
