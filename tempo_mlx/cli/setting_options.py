"""Command-line options derived from the table of settings, see :mod:`tempo_mlx.rules.table`."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..old_names import renamed, warn_renamed
from ..rules.own import is_place, load_rule
from ..rules.pruning import Pruning
from ..rules.table import Biases, Entry, Inner, Layers, RuleChoice, Texts, table
from ..settings import Settings
from .effects import option_of


def flag(setting: str) -> str:
    """The option of a setting: "--prune-decision" for "pruning.decision"."""
    return "--" + option_of(setting).replace("_", "-")


#: Old option -> new option.
RENAMED = {
    flag(prefix + old): flag(prefix + new)
    for prefix, owner in (("", Settings), ("pruning.", Pruning))
    for old, new in renamed(owner).items()
}


@dataclass(frozen=True)
class Line:
    """A setting that has an option.

    Args:
        setting: its name, such as "pruning.rule" for a nested setting.
        field: of its class.
    """

    setting: str
    field: "Field[Any]"

    @property
    def entry(self) -> Entry:
        entry: Entry = self.field.metadata["entry"]
        return entry

    @property
    def default(self) -> Any:
        """The option's default, in the form given on the command line."""
        kind, default = self.entry.kind, self.field.default
        if self.setting == "pruning.rule" or isinstance(kind, Texts):
            return None
        if isinstance(kind, Layers):
            return self.entry.shown
        return str(default) if kind.option is str and default is not None else default

    def value(self, given: Any) -> Any:
        """The setting's value for the option's value."""
        kind = self.entry.kind
        if given is None:
            return () if isinstance(kind, Texts) else None
        if isinstance(kind, RuleChoice) and is_place(given):
            return load_rule(given, flag(self.setting), kind.rule)
        if not given and isinstance(kind, Biases):
            return None
        return kind.from_option(given)

    def parameter(self, name: str, options: "Mapping[str, Line]") -> inspect.Parameter:
        """The command's parameter of this name; help texts refer to the other options."""
        entry, default = self.entry, self.default
        flags = {line.setting: flag(line.setting) for line in options.values()}

        def in_options(text: str) -> str:
            text = text.replace("Or your own rule", "Or your own rule, FILE.py:NAME")
            return re.sub(r"`([\w.]+)`", lambda found: flags.get(found[1], found[0]), text)

        option = typer.Option(
            *(each for each in (flag(self.setting), entry.short) if each),
            metavar=entry.kind.metavar,
            help=in_options(entry.help),
            show_default=in_options(entry.shown) if entry.shown and default is None else True,
            rich_help_panel=entry.panel,
        )
        kind = entry.kind.option | None if default is None else entry.kind.option
        annotation: Any = Annotated[kind, option]
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, place, default=default, annotation=annotation)


class SettingsCommand(TyperCommand):
    """A command that also accepts old names of options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        for i, argument in enumerate(args[:end]):
            option, equals, value = argument.partition("=")
            if option in RENAMED:
                warn_renamed(option, RENAMED[option])
                args[i] = RENAMED[option] + equals + value
        return super().parse_args(ctx, args)


def options_of(owner: type) -> dict[str, Line]:
    """The settings of a class that have an option, by the option's parameter name."""
    lines = []
    for each in fields(owner):
        kind = each.metadata["entry"].kind
        if isinstance(kind, Inner):
            lines += [Line(f"{each.name}.{inner.name}", inner) for inner in fields(kind.owner)]
        else:
            lines.append(Line(each.name, each))
    return {option_of(line.setting): line for line in lines if line.entry.option}


def with_settings(owner: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's argument ``settings`` by the options of a settings class."""
    options = options_of(owner)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in options}
            command(settings=settings_of(owner, values), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += [line.parameter(name, options) for name, line in options.items()]
            else:
                parameters.append(parameter)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def settings_of(owner: type, values: Mapping[str, Any]) -> Any:
    """The settings for the values of options; nested settings are None without a rule.

    Args:
        owner: class of the settings.
        values: of its options, by parameter name.

    Raises:
        TempoError: naming the invalid option or setting.
    """
    known = {line.setting: line.value(values[name]) for name, line in options_of(owner).items()}
    outer = {name: value for name, value in known.items() if "." not in name}
    for name, entry in table(owner).items():
        if isinstance(entry.kind, Inner):
            prefix = f"{name}."
            inner = {n.removeprefix(prefix): known[n] for n in known if n.startswith(prefix)}
            # Without a rule there is no pruning.
            outer[name] = None if inner["rule"] is None else entry.kind.owner(**inner)
    return owner(**outer)


def files_of(owner: type, values: Mapping[str, Any]) -> dict[str, Path]:
    """The Python files given in options: option -> file."""
    return {
        flag(line.setting): Path(values[name].rpartition(":")[0])
        for name, line in options_of(owner).items()
        if isinstance(line.entry.kind, RuleChoice) and is_place(values[name])
    }
