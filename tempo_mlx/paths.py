"""The best paths through a lattice's sets, each scored as the text that it is.

The hypotheses of the beam live in one sequence as a tree: a slot sees the prompt, its ancestors
and itself, so its logits are those of a separate sequential decode of its path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .combining import log_softmax_at
from .lattice import Lattice
from .models import BatchedKVCache, PositionedModel
from .sequences import Batch, SequenceState

#: Fraction of unused slots above which the cache is compacted.
MAX_UNUSED = 0.5

#: Prompt tokens in one forward pass.
CHUNK = 2048


@dataclass(frozen=True)
class Path:
    """One text through the lattice.

    Args:
        text: the path's text, without the prompt.
        tokens: its ids.
        logprob: log-probability of the tokens given the prompt, in nats, at temperature 1.
        ended: whether an end token followed, whose log-probability is included then.
    """

    text: str
    tokens: list[int]
    logprob: float
    ended: bool = False


class _Beam:
    """The hypotheses of one problem: paths so far, their scores, and what they attend to."""

    def __init__(self, prompt: list[int], sets: list[list[int]], beam: int):
        self.prompt, self.sets, self.beam = prompt, sets, beam
        self.scores = np.zeros(1)  # [R], nats
        self.chains: list[list[int]] = [[]]
        self.sees = np.ones((1, len(prompt)), bool)  # [R, S]: slots that each path's last one sees
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
        self.sees = self.sees[parents]
        self.step += 1


def best_paths(
    model: PositionedModel,
    problems: Sequence[tuple[list[int], list[list[int]]]],
    beam: int,
    cache: BatchedKVCache | None = None,
) -> list[list[tuple[list[int], float]]]:
    """Beam search over sets; all hypotheses of all problems' steps in one forward pass.

    Args:
        model: scores the tokens.
        problems: prompts, ids of at least one token, and for each step the ids to choose from.
        beam: hypotheses kept at each step, at least 1.
        cache: a row for each problem that holds the beginning of its prompt, not the last token.

    Returns:
        for each problem at most ``beam`` pairs (ids, log-probability in nats), best first.
    """
    beams = [_Beam(prompt, sets, beam) for prompt, sets in problems]
    reading = Batch(model, [SequenceState(Lattice(prompt)) for prompt, _ in problems], cache)
    logits, cache = reading.prefill(CHUNK), reading.cache
    rows = np.arange(len(beams))  # of the logits
    while going := [row for row, each in enumerate(beams) if not each.finished]:
        keep = np.isin(rows, going)
        of_row, logits = rows[keep], logits[mx.array(np.flatnonzero(keep))]
        widest = max(len(beams[row].ids) for row in going)
        ids = np.array([np.resize(beams[row].ids, widest) for row in of_row])
        logp = log_softmax_at(logits.astype(mx.float32), mx.array(ids))
        mx.eval(logp, cache.state)
        found = np.array(logp, np.float64)
        for row in going:
            beams[row].extend(found[of_row == row, : len(beams[row].ids)])
        going = [row for row in going if not beams[row].finished]
        if going:
            _drop_unused(cache, beams)
            rows, logits = _read_last(model, cache, beams, going)
    return [
        [(chain, float(score)) for chain, score in zip(each.chains, each.scores, strict=True)]
        for each in beams
    ]


def _read_last(
    model: PositionedModel, cache: BatchedKVCache, beams: list[_Beam], going: list[int]
) -> tuple[np.ndarray, mx.array]:
    """Append each path's last token; returns the row of each and their logits [N, V]."""
    sizes = [len(beams[row].chains) for row in going]
    rows = np.repeat(going, sizes)
    added = np.bincount(rows, minlength=len(beams))
    mask = np.zeros((len(rows), int((cache.counts + added).max())), bool)
    done = 0
    for row, n in zip(going, sizes, strict=True):
        each = beams[row]
        each.sees = np.concatenate([each.sees, np.eye(n, dtype=bool)], axis=1)
        mask[done : done + n, : each.sees.shape[1]] = each.sees
        done += n
    tokens = mx.array([chain[-1] for row in going for chain in beams[row].chains])
    positions = np.repeat([len(beams[r].prompt) + beams[r].step - 1 for r in going], sizes)
    mask_ = mx.array(mask)[None, None]
    return rows, model(tokens[None], positions[None], mask_, cache, rows=rows)[0]


def _drop_unused(cache: BatchedKVCache, beams: list[_Beam]) -> None:
    """Drop slots that no path sees, if they are many."""
    used = [each.sees.any(axis=0) & (not each.finished) for each in beams]
    if sum(int(u.sum()) for u in used) < (1 - MAX_UNUSED) * cache.counts.sum():
        cache.compact([np.flatnonzero(u) for u in used])
        for each, chosen in zip(beams, used, strict=True):
            each.sees = each.sees[:, chosen]
