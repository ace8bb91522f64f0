"""Who may attend to whom: rules from slots to masks.

Whatever the rule, a token sees itself, nothing sees what comes after it or was pruned before it,
and the prompt is read causally: each of its tokens sees all before it. The rule says which of the
earlier slots the tokens behind the prompt see, and which of their siblings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import TempoError
from ..lattice.lattice import Slot, Slots
from .rule import Named, called, find, name_of, stored

#: Weights below this one hide a key as well as 0 would, and their logarithm is finite.
LEAST_WEIGHT = 1e-30

#: What a token continues: a whole set; one token, one slot for each distinct token ("chain"); or
#: one token, each with continuations of its own ("branch").
Parents = Literal["none", "chain", "branch"]


@dataclass(frozen=True)
class Visibility(Named):
    """A rule of who sees whom; subclass it and pass an object to :func:`tempo_mlx.generate`.

    Attributes:
        parents: what a token continues.
        full_context: whether a token sees all of the text that it ends, and nothing else: the
            prompt and its chain of parents; without parents, all earlier tokens where every set has
            one token. Lets sets of one skip the mask.
        monotone: whether what one step cannot see, no later step can. Lets such slots be dropped.
        hides_sets: whether no later step sees a set of more than one token.
    """

    parents: ClassVar[Parents] = "none"
    full_context: ClassVar[bool] = False
    monotone: ClassVar[bool] = False
    hides_sets: ClassVar[bool] = False

    __str__ = Named.__str__

    @property
    def name(self) -> str:
        """What results and messages call the rule: the class and its fields, unless it says."""
        return repr(self).removesuffix("()")

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Visibility":
        """The rule whose ``allowed`` is a function (queries, keys) -> [T, S]."""
        return FunctionVisibility(function)

    @property
    def has_parents(self) -> bool:
        """Whether each token continues one other token."""
        return self.parents != "none"

    @property
    def branches(self) -> bool:
        """Whether each token of a set has continuations of its own."""
        return self.parents == "branch"

    @property
    def can_be_verified(self) -> bool:
        """Whether the rule has a :meth:`sees`."""
        return type(self).sees is not Visibility.sees

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        """Which of S key slots each of T query slots behind the prompt sees, booleans [T, S]."""
        raise NotImplementedError

    def sees(self, query: Slot, key: Slot) -> bool:
        """The same of one pair of slots, for :func:`tempo_mlx.decode.verification.verify`.

        It is what the rule means, written without arrays; asked only about earlier slots and
        siblings that are alive.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionVisibility(Visibility):
    """A rule that is only its ``allowed``; runs by it cannot be verified."""

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
    """As isolated, and also the siblings of the same step, in both directions."""

    name = "visible"
    full_context = monotone = True

    def allowed(self, queries: Slots, keys: Slots) -> np.ndarray:
        return keys.step <= queries.step[:, None]

    def sees(self, query: Slot, key: Slot) -> bool:
        return key.step <= query.step


class Hidden(Visibility):
    """As isolated, but sets of more than one token are invisible to later steps."""

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
        prompt = np.broadcast_to(keys.step < 0, (len(queries), len(keys)))
        if queries.chains is None:
            raise TempoError("slots behind the prompt need their parents, to know what they see")
        slots = 1 + max(int(keys.index.max()), int(queries.index.max()))
        led = np.zeros((len(queries), slots), bool)
        for row, chain in zip(led, queries.chains, strict=True):
            row[chain] = True
        return prompt | led.take(keys.index, axis=1)

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


#: Names of the rules where each token continues one other token.
WITH_PARENTS = frozenset(name for name, rule in VISIBILITY.items() if rule.has_parents)


def visibility_of(given: Any) -> Visibility:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("visibility", given, VISIBILITY, Visibility)


def stored_visibility(given: Any) -> str | Visibility:
    """As :func:`visibility_of`; the name of a rule that has one in :data:`VISIBILITY`."""
    return stored(visibility_of(given), VISIBILITY)


def may_attend(rule: Visibility | str, queries: Slots, keys: Slots) -> np.ndarray:
    """Who sees whom by a rule, and by what holds for every rule: booleans [T, S].

    Raises:
        TempoError: for a rule that raises, or does not return such an array.
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
    return allowed & (keys.pruned_at >= queries.step[:, None])


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
