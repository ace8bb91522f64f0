"""Which settings change something only beside others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rules.pruning import decision_rule, pruning_rule
from .rules.selection import sampling_rule
from .rules.visibility import visibility_of


@dataclass(frozen=True)
class Need:
    """What a setting needs of another one to have an effect.

    Args:
        of: name of the other setting.
        values: that it must have, one of them; none means any that is not None, False, 0 or empty.
        absent: it must have none of these instead.
        holds: whether a value will do, in place of comparing it with ``values``, which then only
            say so: for rules, which may be of the user's own.
    """

    of: str
    values: tuple[Any, ...] = ()
    absent: bool = False
    holds: Callable[[Any], bool] | None = None

    def met(self, value: Any) -> bool:
        """Whether the other setting's value will do."""
        if value is None:
            found = False
        elif self.holds is not None:
            found = self.holds(value)
        else:
            found = value in self.values if self.values else bool(value)
        return found != self.absent


#: Name of a setting -> what it needs, all of it.
Needs = Mapping[str, tuple[Need, ...]]

_MERGED = Need("visibility", ("tree",), absent=True, holds=lambda v: visibility_of(v).branches)
_TREE = Need("visibility", ("tree",), holds=lambda v: visibility_of(v).branches)
_SEEN = Need("visibility", ("hidden",), absent=True, holds=lambda v: visibility_of(v).hides_sets)
_ATTENTION = Need(
    "pruning.rule", ("attention",), holds=lambda rule: pruning_rule(rule).needs_attention
)
_THRESHOLD = Need(
    "pruning.decision",
    ("quota",),
    absent=True,
    holds=lambda rule: not decision_rule(rule).by_threshold,
)

#: Of :class:`tempo_mlx.Settings`; those of its pruning are named "pruning.rule" and so on.
NEEDS: Needs = {
    "combine": (_MERGED,),
    "beam_width": (_TREE,),
    "beam_margin": (_TREE, Need("beam_width", (1,), absent=True)),
    "branching": (_TREE,),
    "min_tokens_to_keep": (Need("min_p"),),
    "xtc_threshold": (Need("xtc_probability"),),
    "repetition_context_size": (Need("repetition_penalty"),),
    "presence_context_size": (Need("presence_penalty"),),
    "frequency_context_size": (Need("frequency_penalty"),),
    "kv_group_size": (Need("kv_bits"),),
    "quantized_kv_start": (Need("kv_bits"),),
    # Where later steps do not see a set, nothing looks at its keys.
    "weighting": (_SEEN,),
    "pruning.threshold": (_THRESHOLD,),
    "pruning.schedule": (_THRESHOLD,),
    "pruning.min_age": (_THRESHOLD,),
    # Only the verdicts that are drawn depend on how steep it is.
    "pruning.steepness": (
        Need("pruning.decision", ("sigmoid",), holds=lambda rule: decision_rule(rule).draws),
        Need("sampling", ("gumbel",), holds=lambda rule: sampling_rule(rule).draws),
    ),
    "pruning.keep_rate": (
        Need(
            "pruning.decision", ("quota",), holds=lambda rule: not decision_rule(rule).by_threshold
        ),
    ),
    # The other decisions never prune the best token of a set.
    "pruning.if_all_pruned": (
        Need(
            "pruning.decision",
            ("absolute", "sigmoid"),
            holds=lambda rule: not decision_rule(rule).keeps_best,
        ),
    ),
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
