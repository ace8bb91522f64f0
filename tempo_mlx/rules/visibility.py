"""Who may attend to whom: rules from slots to masks.

A rule takes the query slots and the key slots and returns a boolean array [T, S]. Prompt tokens
are single-token sets at steps before 0, so that "an earlier step" is causality for them too.
"""

from collections.abc import Callable

import numpy as np

from ..errors import TempoError
from ..lattice.lattice import Slots

#: Weights below this one hide a key as well as 0 would, and their logarithm is finite.
LEAST_WEIGHT = 1e-30

Rule = Callable[[Slots, Slots], np.ndarray]


def isolated(queries: Slots, keys: Slots) -> np.ndarray:
    """A token sees itself and every earlier step."""
    return (keys.step < queries.step[:, None]) | (keys.index == queries.index[:, None])


def visible(queries: Slots, keys: Slots) -> np.ndarray:
    """As isolated, and also the siblings of the same step, in both directions."""
    return keys.step <= queries.step[:, None]


def hidden(queries: Slots, keys: Slots) -> np.ndarray:
    """As isolated, but sets of more than one token are invisible to later steps."""
    earlier = (keys.step < queries.step[:, None]) & (keys.set_size == 1)
    return earlier | (keys.index == queries.index[:, None])


def ancestors(queries: Slots, keys: Slots) -> np.ndarray:
    """A token sees the prompt, the tokens that lead to it, and itself."""
    prompt = keys.step <= np.minimum(queries.step, -1)[:, None]
    if queries.chains is None:
        if (queries.step >= 0).any():
            raise TempoError("slots behind the prompt need their parents, to know what they see")
        return prompt
    slots = 1 + max(int(keys.index.max()), int(queries.index.max()))
    led = np.zeros((len(queries), slots), bool)
    for row, chain in zip(led, queries.chains, strict=True):
        row[chain] = True
    return prompt | led.take(keys.index, axis=1)


#: Name -> rule; adding a rule is adding a function here. In a tree the same token under two parents
#: is two slots; recombined, it is one, under the parent that makes the most probable text.
VISIBILITY: dict[str, Rule] = {
    "isolated": isolated,
    "visible": visible,
    "hidden": hidden,
    "tree": ancestors,
    "recombined": ancestors,
}

#: Where each token continues one other token.
WITH_PARENTS = frozenset({"tree", "recombined"})


def may_attend(rule: str, queries: Slots, keys: Slots) -> np.ndarray:
    """Boolean [T, S]: the rule, over keys that are alive at the query's step."""
    alive = keys.pruned_at >= queries.step[:, None]
    return VISIBILITY[rule](queries, keys) & alive


def weighted_rows(
    allowed: np.ndarray, queries: Slots, keys: Slots, weights: np.ndarray
) -> np.ndarray:
    """What each query may attend to as an additive mask, [T, S], fp32.

    An entry is log w of a key that may be seen and -inf of another one, so that a set draws
    attention like one token of its weights' sum. A token's own key weighs 1 to it unless it sees
    its siblings.

    Args:
        allowed: what :func:`may_attend` says of these queries and keys, [T, S].
        queries: the T new slots.
        keys: all slots of the sequence in the cache's order, the new ones included.
        weights: of the keys, [S], each in (0, 1].
    """
    logs = np.log(np.maximum(weights, LEAST_WEIGHT))
    siblings = keys.step == queries.step[:, None]
    alone = (allowed & siblings).sum(axis=1, keepdims=True) == 1
    logs = np.where(siblings & alone, 0.0, logs)
    return np.where(allowed, logs, -np.inf).astype(np.float32)
