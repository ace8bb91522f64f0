"""Options that a user typed and that can change nothing beside the others."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import typer

from ..errors import TempoError
from ..io.files import STANDARD_OUTPUT
from ..needs import NEEDS, Need, Needs, told, unmet
from ..rules.pruning import Pruning
from .options import flag_of

#: What a report on the screen needs: neither the text alone nor the result as JSON in its place.
PRINTED = (Need("quiet", absent=True), Need("output", (STANDARD_OUTPUT,), absent=True))


def typed(context: typer.Context) -> dict[str, str]:
    """The options on the command line: name of the parameter -> the option, "--beam-width"."""
    return {
        name: flag
        for name, flag in _flags(context).items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def require_effect(context: typer.Context, needs: Needs, *cases: Mapping[str, Any]) -> None:
    """Refuse options that were typed and have no effect.

    Args:
        context: of the command.
        needs: of its options, by the names of the command's parameters.
        cases: values of the settings in each run of the command, by name; where none are given,
            or a name is not among them, what was typed counts. One case with an effect is enough.

    Raises:
        TempoError: naming the first such option and what it needs.
    """
    flags = _flags(context)
    for name, flag in typed(context).items():
        missing = [unmet(name, needs, {**context.params, **case}.get) for case in cases or ({},)]
        if all(missing):
            why = told(missing[0], lambda other: flags[option_of(other)])
            barred = any(need.absent for need in missing[0])
            remedy = "leave one out" if barred else f"add that, or leave {flag} out"
            raise TempoError(f"{flag} has no effect {why}; {remedy}")


def option_of(setting: str) -> str:
    """The parameter that holds a setting: "prune_decision" for "pruning.decision"."""
    return "prune" if setting == "pruning.rule" else setting.replace("pruning.", "prune_")


def setting_needs() -> dict[str, tuple[Need, ...]]:
    """What the options of :class:`tempo_mlx.Settings` need; of pruning, ``--prune`` as well."""
    pruned = {f"prune_{f.name}": (Need("prune"),) for f in fields(Pruning) if f.name != "rule"}
    others = {option_of(name): needs for name, needs in NEEDS.items()}
    return {name: pruned.get(name, ()) + others.get(name, ()) for name in pruned | others}


def _flags(context: typer.Context) -> dict[str, str]:
    return {
        str(parameter.name): flag_of(parameter)
        for parameter in context.command.params
        if parameter.param_type_name == "option"
    }
