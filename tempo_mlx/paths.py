"""The best paths through a lattice's sets, each scored as the text that it is.

The hypotheses of the beam live in one sequence as a tree: a slot sees the prompt, its ancestors
and itself, so its logits are those of a separate sequential decode of its path.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .models import PositionedModel

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
    """

    text: str
    tokens: list[int]
    logprob: float


def best_paths(
    model: PositionedModel, prompt: list[int], sets: list[list[int]], beam: int
) -> list[tuple[list[int], float]]:
    """Beam search over the sets; all hypotheses of a step in one forward pass.

    Args:
        model: scores the tokens.
        prompt: ids, at least one.
        sets: for each step the ids to choose from, each at least one.
        beam: hypotheses kept at each step, at least 1.

    Returns:
        at most ``beam`` pairs (ids, log-probability in nats), best first.
    """
    cache = model.make_cache()
    length = len(prompt)
    for start in range(0, length - 1, CHUNK):
        end = min(start + CHUNK, length - 1)
        positions = np.arange(start, end)[None]
        model(mx.array(prompt[start:end])[None], positions, "causal", cache)
        mx.eval(cache.state)
    logits = model(mx.array(prompt[-1:])[None], np.array([[length - 1]]), "causal", cache)[0]

    scores = np.zeros(1)  # [R], nats
    chains: list[list[int]] = [[]]
    sees = np.ones((1, length), bool)  # [R, S]: what each hypothesis' last slot attends to
    for step, ids in enumerate(sets):
        rows = logits.astype(mx.float32)
        rows = rows[:, mx.array(ids)] - mx.logsumexp(rows, axis=-1, keepdims=True)  # [R, N]
        mx.eval(rows, cache.state)
        joint = scores[:, None] + np.array(rows, np.float64)
        best = np.argsort(-joint, axis=None, kind="stable")[:beam]
        parents, choice = np.unravel_index(best, joint.shape)
        scores = joint[parents, choice]
        tokens = np.array(ids)[choice]
        chains = [[*chains[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
        if step + 1 == len(sets):
            break
        R, S = len(tokens), sees.shape[1]
        sees = sees[parents]
        used = sees.any(axis=0)
        if used.sum() < (1 - MAX_UNUSED) * S:
            cache.compact(np.flatnonzero(used))
            sees = sees[:, used]
        sees = np.concatenate([sees, np.eye(R, dtype=bool)], axis=1)
        positions = np.full((1, R), length + step)
        logits = model(mx.array(tokens)[None], positions, mx.array(sees)[None, None], cache)[0]
    return [(chain, float(score)) for chain, score in zip(chains, scores, strict=True)]
