"""Which settings change something only beside others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """What a setting needs of another one to have an effect.

    Args:
        of: name of the other setting.
        values: that it must have, one of them; none means any that is not None, False, 0 or empty.
        absent: it must have none of these instead.
    """

    of: str
    values: tuple[Any, ...] = ()
    absent: bool = False

    def met(self, value: Any) -> bool:
        """Whether the other setting's value will do."""
        found = value in self.values if self.values else bool(value)
        return found != self.absent


#: Name of a setting -> what it needs, all of it.
Needs = Mapping[str, tuple[Need, ...]]

_MERGED = Need("visibility", ("tree",), absent=True)
_TREE = Need("visibility", ("tree",))
_ATTENTION = Need("pruning.rule", ("attention",))
_THRESHOLD = Need("pruning.decision", ("quota",), absent=True)

#: Of :class:`tempo_mlx.Settings`; those of its pruning are named "pruning.rule" and so on.
NEEDS: Needs = {
    "combine": (_MERGED,),
    "max_leaves": (_TREE,),
    "leaf_margin": (_TREE, Need("max_leaves", (1,), absent=True)),
    "branching": (_TREE,),
    # Where later steps do not see a set, nothing looks at its keys.
    "weighting": (Need("visibility", ("hidden",), absent=True),),
    "pruning.threshold": (_THRESHOLD,),
    "pruning.schedule": (_THRESHOLD,),
    "pruning.min_age": (_THRESHOLD,),
    # Only the verdicts that are drawn depend on how steep it is.
    "pruning.steepness": (Need("pruning.decision", ("sigmoid",)), Need("sampling", ("gumbel",))),
    "pruning.keep_rate": (Need("pruning.decision", ("quota",)),),
    # The other decisions never prune the best token of a set.
    "pruning.when_all_fall": (Need("pruning.decision", ("absolute", "sigmoid")),),
    "pruning.layers": (_ATTENTION,),
    "pruning.layer_weights": (_ATTENTION,),
    "pruning.query_weights": (_ATTENTION,),
}


def unmet(name: str, needs: Needs, value: Callable[[str], Any]) -> list[Need]:
    """What is missing for a setting to have an effect.

    Args:
        name: of the setting.
        needs: of all settings.
        value: name -> value of each setting.
    """
    return [need for need in needs.get(name, ()) if not need.met(value(need.of))]


def told(missing: Sequence[Need], named: Callable[[str], str] = str) -> str:
    """Why a setting has no effect: "without visibility tree".

    Args:
        missing: at least one.
        named: name of a setting -> what the user calls it.
    """
    parts = []
    for word, absent in (("without", False), ("with", True)):
        of = [
            f"{named(need.of)} {' or '.join(map(str, need.values))}".rstrip()
            for need in missing
            if need.absent == absent
        ]
        if of:
            parts.append(f"{word} {' and '.join(of)}")
    return " and ".join(parts)
