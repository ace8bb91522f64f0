"""Refuse options that have no effect in combination with the others."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import typer

from ..errors import TempoError
from ..io.files import STANDARD_OUTPUT
from ..needs import NEEDS, Need, Needs, told, unmet
from ..rules.pruning import Pruning
from .options import flag_of

#: Conditions for printing a report: not only the text is printed, and not JSON instead.
PRINTED = (Need("quiet", absent=True), Need("output", (STANDARD_OUTPUT,), absent=True))


def typed(context: typer.Context) -> dict[str, str]:
    """The options given on the command line: parameter name -> option, such as "--beam-width"."""
    return {
        name: flag
        for name, flag in _flags(context).items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }


def require_effect(context: typer.Context, needs: Needs, *cases: Mapping[str, Any]) -> None:
    """Refuse options that were given and have no effect.

    Args:
        context: of the command.
        needs: conditions of its options, by parameter name.
        cases: values of the settings in each run of the command, by name. Without cases, or for
            names that a case does not have, the given options are used. An option is accepted if it
            has an effect in at least one case.

    Raises:
        TempoError: naming the first such option and its condition.
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
