"""Who may attend to whom: rules from slots to masks.

A rule takes the query slots and the key slots and returns a boolean array [T, S]. Prompt tokens
are single-token sets at steps before 0, so that "an earlier step" is causality for them too.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .lattice import Slots

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


#: Name -> rule; adding a rule is adding a function here.
VISIBILITY: dict[str, Rule] = {"isolated": isolated, "visible": visible, "hidden": hidden}


def may_attend(rule: str, queries: Slots, keys: Slots) -> np.ndarray:
    """Boolean [T, S]: the rule, over keys that are alive at the query's step."""
    alive = keys.pruned_at >= queries.step[:, None]
    return VISIBILITY[rule](queries, keys) & alive


def attention_mask(rule: str, queries: Slots, keys: Slots) -> mx.array | str:
    """The mask of one forward pass, [1, 1, T, S], or "causal" where one query sees every slot.

    Args:
        rule: a key of :data:`VISIBILITY`.
        queries: the T new slots.
        keys: all slots in the cache's order, the new ones last.
    """
    allowed = may_attend(rule, queries, keys)
    if len(queries) == 1 and allowed.all():
        return "causal"
    return mx.array(allowed[None, None])
