"""Settings that have an effect only in combination with others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rules.pruning import decision_rule, pruning_rule
from .rules.selection import sampling_rule
from .rules.visibility import visibility_of


@dataclass(frozen=True)
class Need:
    """A condition on another setting, without which a setting has no effect.

    Args:
        of: name of the other setting.
        values: allowed values of the other setting; if empty, any except None, False, 0 and empty.
        absent: whether these values are forbidden instead.
        holds: decides whether a value is allowed, instead of ``values``, which is then only used in
            messages. For rules, which may be the user's.
    """

    of: str
    values: tuple[Any, ...] = ()
    absent: bool = False
    holds: Callable[[Any], bool] | None = None

    def met(self, value: Any) -> bool:
        """Whether the other setting's value meets the condition."""
        if value is None:
            found = False
        elif self.holds is not None:
            found = self.holds(value)
        else:
            found = value in self.values if self.values else bool(value)
        return found != self.absent


#: Name of a setting -> its conditions, all of which must be met.
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

#: For :class:`tempo_mlx.Settings`; settings of pruning are named "pruning.rule" etc.
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
    # If later steps do not see a set, its keys have no queries.
    "weighting": (_SEEN,),
    "pruning.threshold": (_THRESHOLD,),
    "pruning.schedule": (_THRESHOLD,),
    "pruning.min_age": (_THRESHOLD,),
    # Only drawn verdicts depend on the steepness.
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
    """The unmet conditions of a setting; it has an effect if there are none.

    Args:
        name: of the setting.
        needs: of all settings.
        value: name of a setting -> its value.
    """
    return [need for need in needs.get(name, ()) if not need.met(value(need.of))]


def told(missing: Sequence[Need], named: Callable[[str], str] = str) -> str:
    """The reason why a setting has no effect, such as "without visibility tree".

    Args:
        missing: unmet conditions, at least one.
        named: name of a setting -> its name for the user.
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
