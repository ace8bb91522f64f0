"""Visibility rules: which slots each token may attend to.

Under every rule a token sees itself, and never a later token. The prompt is causal: each of its
tokens sees all tokens before it. The rule decides which earlier slots and which siblings a
generated token sees. A pruned slot is not among the keys any more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import TempoError
from ..lattice.lattice import NONE, Slot, Slots
from .rule import Named, called, find, name_of

#: Smaller weights are raised to this one. It hides a key as well as 0, with a finite logarithm.
LEAST_WEIGHT = 1e-30

#: What a token continues: a whole set ("none"); one parent, with one slot for each distinct token
#: ("chain"); or one parent, with separate slots under each parent ("branch").
Parents = Literal["none", "chain", "branch"]


@dataclass(frozen=True)
class Visibility(Named):
    """A visibility rule; subclass it and pass an instance to :func:`tempo_mlx.generate`.

    Attributes:
        parents: what a token continues.
        full_context: whether a token sees exactly the text that it ends: the prompt and its chain
            of parents. Without parents this means all earlier tokens, provided that every set has
            one token. Sets of one token can then skip the mask.
        monotone: whether slots that one step cannot see stay hidden from all later steps. Such
            slots can be dropped.
        hides_sets: whether sets of more than one token are hidden from all later steps.
    """

    parents: ClassVar[Parents] = "none"
    full_context: ClassVar[bool] = False
    monotone: ClassVar[bool] = False
    hides_sets: ClassVar[bool] = False

    __str__ = Named.__str__

    @property
    def name(self) -> str:
        """The rule's name in results and messages; by default the class and its fields."""
        return repr(self).removesuffix("()")

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Visibility":
        """A rule whose ``allowed`` is the function (queries, keys) -> booleans [T, S]."""
        return FunctionVisibility(function)

    @property
    def has_parents(self) -> bool:
        """Whether each token continues one other token."""
        return self.parents != "none"

    @property
    def branches(self) -> bool:
        """Whether each token of a set has its own continuations."""
        return self.parents == "branch"

    @property
    def can_be_verified(self) -> bool:
        """Whether the rule implements :meth:`sees`."""
        return type(self).sees is not Visibility.sees

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        """Which of S key slots each of T generated query slots sees, booleans [T, S]."""
        raise NotImplementedError

    def sees(self, query: Slot, key: Slot) -> bool:
        """The same for one pair of slots, for :func:`tempo_mlx.decode.verification.verify`.

        This is the rule's definition, written without arrays. It is only called for live slots
        that are earlier or siblings.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionVisibility(Visibility):
    """A rule with only ``allowed``; its runs cannot be verified."""

    function: Callable[[Slots, Slots], np.ndarray]

    @property
    def name(self) -> str:
        return name_of(self.function)

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        return self.function(queries, keys)


class Isolated(Visibility):
    """A token sees itself and every earlier step."""

    name = "isolated"
    full_context = monotone = True

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        return keys.step < queries.step[:, None]

    def sees(self, query: Slot, key: Slot) -> bool:
        return key.step < query.step


class Visible(Visibility):
    """As isolated, and siblings see each other."""

    name = "visible"
    full_context = monotone = True

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        return keys.step <= queries.step[:, None]

    def sees(self, query: Slot, key: Slot) -> bool:
        return key.step <= query.step


class Hidden(Visibility):
    """As isolated, but sets of more than one token are hidden from later steps."""

    name = "hidden"
    full_context = monotone = hides_sets = True

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        seen: np.ndarray = (keys.step < queries.step[:, None]) & (keys.set_size == 1)
        return seen

    def sees(self, query: Slot, key: Slot) -> bool:
        return key.step < query.step and key.set_size == 1


class Recombined(Visibility):
    """A token sees the prompt and the tokens that lead to it: its most probable chain."""

    name = "recombined"
    parents: ClassVar[Parents] = "chain"
    full_context = monotone = True

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        lattice = queries.lattice
        if (queries.parent[queries.step >= 0] == NONE).any():
            raise TempoError("generated slots need parents under this visibility")
        # The last column takes entries without a slot.
        leads = np.zeros((len(queries), lattice.n_slots + 1), bool)
        leads[np.arange(len(queries))[:, None], lattice.chains(queries.index)] = True
        return (keys.step < 0) | leads.take(keys.index, axis=1)

    def sees(self, query: Slot, key: Slot) -> bool:
        return key.step < 0 or key.index in query.chain


class Tree(Recombined):
    """As recombined, but the same token under two parents is two slots, each with its own chain."""

    name = "tree"
    parents: ClassVar[Parents] = "branch"


#: Name -> rule.
VISIBILITY: dict[str, Visibility] = {
    rule.name: rule for rule in (Isolated(), Visible(), Hidden(), Tree(), Recombined())
}


def visibility_of(given: Any) -> Visibility:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("visibility", given, VISIBILITY, Visibility)


def may_attend(rule: Visibility | str, queries: Slots, keys: Slots) -> np.ndarray:
    """What T queries see of S keys under a rule and the conditions of every rule: booleans [T, S].

    Raises:
        TempoError: if a user's rule raises or does not return such an array.
    """
    rule = visibility_of(rule)
    earlier = keys.step <= queries.step[:, None]
    prompt = queries.step < 0
    if prompt.all():
        allowed = earlier
    else:
        allowed = np.asarray(called(rule, rule.allowed, queries, keys))
        if allowed.shape != earlier.shape or allowed.dtype != bool:
            raise TempoError(
                f"visibility {rule.name} must return booleans {list(earlier.shape)}, "
                f"got {allowed.dtype} {list(allowed.shape)}"
            )
        allowed = allowed & earlier | (keys.index == queries.index[:, None])
        if prompt.any():
            allowed[prompt] = earlier[prompt]
    return allowed


def weighted_rows(
    allowed: np.ndarray, queries: Slots, keys: Slots, weights: np.ndarray
) -> np.ndarray:
    """The additive mask of weighted keys, [T, S], fp32.

    An entry is log w for a visible key and -inf for a hidden one, so a set draws attention like one
    token with the sum of its weights. A token's own key has weight 1 unless the token sees its
    siblings.

    Args:
        allowed: from :func:`may_attend` for these queries and keys, [T, S].
        queries: the T new slots.
        keys: all slots of the sequence in cache order, including the new ones.
        weights: of the keys, [S], each in (0, 1].
    """
    logs = np.log(np.maximum(weights, LEAST_WEIGHT))
    siblings = keys.step == queries.step[:, None]
    alone = (allowed & siblings).sum(axis=1, keepdims=True) == 1
    logs = np.where(siblings & alone, 0.0, logs)
    return np.where(allowed, logs, -np.inf).astype(np.float32)
