"""Options made of the table of settings, see :mod:`tempo_mlx.kinds`."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..kinds import Entry, Inner, Layers, RuleChoice, Texts, table
from ..old_names import renamed, warn_renamed
from ..rules.own import is_place, load_rule
from ..rules.pruning import Pruning
from ..settings import Settings
from .effects import option_of


def flag(setting: str) -> str:
    """The option of a setting: "--prune-decision" for "pruning.decision"."""
    return "--" + option_of(setting).replace("_", "-")


#: Settings that have an option, by the option's parameter -> (name in the table, line in it).
OPTIONS: dict[str, tuple[str, Entry]] = {}
for _name, _entry in table(Settings).items():
    _lines = {_name: _entry}
    if isinstance(_entry.kind, Inner):
        _lines = {f"{_name}.{inner}": each for inner, each in table(_entry.kind.owner).items()}
    OPTIONS |= {option_of(name): (name, each) for name, each in _lines.items() if each.option}

#: Old option -> its name now.
RENAMED = {
    flag(prefix + old): flag(prefix + new)
    for prefix, owner in (("", Settings), ("pruning.", Pruning))
    for old, new in renamed(owner).items()
}


class SettingsCommand(TyperCommand):
    """A command whose options may have the names that they had before."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        for i, argument in enumerate(args[:end]):
            option, equals, value = argument.partition("=")
            if option in RENAMED:
                warn_renamed(option, RENAMED[option])
                args[i] = RENAMED[option] + equals + value
        return super().parse_args(ctx, args)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`Settings`, in place of its argument ``settings``."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in OPTIONS}
        command(settings=settings_of(options), **given)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        ours = parameter.name == "settings"
        parameters += map(_parameter, OPTIONS) if ours else [parameter]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The settings that options ask for; pruning where there is a rule for it.

    Raises:
        TempoError: naming the option or setting that is wrong.
    """
    values: dict[str, Any] = {}
    for name, (setting, entry) in OPTIONS.items():
        values[setting] = _value(setting, entry, options[name])
    inner = {
        name.removeprefix("pruning."): values.pop(name)
        for name in [name for name in values if name.startswith("pruning.")]
    }
    if inner["rule"] is not None:
        values["pruning"] = Pruning(**inner)
    return Settings(**values)


def files_of(options: Mapping[str, Any]) -> dict[str, str]:
    """The Python files that options name: option -> file."""
    return {
        flag(setting): options[name].rpartition(":")[0]
        for name, (setting, entry) in OPTIONS.items()
        if isinstance(entry.kind, RuleChoice) and is_place(options[name])
    }


def _value(setting: str, entry: Entry, given: Any) -> Any:
    if given is None:
        return () if isinstance(entry.kind, Texts) else None
    if isinstance(entry.kind, RuleChoice) and is_place(given):
        return load_rule(given, flag(setting), entry.kind.rule)
    return entry.kind.from_json(given)


def _parameter(name: str) -> inspect.Parameter:
    setting, entry = OPTIONS[name]
    owner, _, inner = setting.rpartition(".")
    (default,) = (f.default for f in fields(Pruning if owner else Settings) if f.name == inner)
    if setting == "pruning.rule" or isinstance(entry.kind, Texts):
        default = None
    elif entry.kind.option is str:
        default = entry.shown if isinstance(entry.kind, Layers) else default and str(default)
    declarations = (flag(setting), entry.short) if entry.short else (flag(setting),)
    annotation = entry.kind.option | None if default is None else entry.kind.option
    option = typer.Option(
        *declarations,
        metavar=entry.kind.metavar,
        help=in_options(entry.help),
        show_default=in_options(entry.shown) if entry.shown and default is None else True,
        rich_help_panel=entry.panel,
    )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[annotation, option])


def in_options(text: str) -> str:
    """A text of the table, the settings in it as options."""
    names = {setting: flag(setting) for setting, _ in OPTIONS.values()}
    text = text.replace("Or a rule of your own", "Or FILE.py:NAME, a rule of your own")
    return re.sub(r"`([\w.]+)`", lambda found: names.get(found[1], found[0]), text)
