"""The table of settings: what each of them may be, its bounds and what it is for, written once.

A settings class declares its fields with :func:`setting`. Validation, the command line's options,
JSON prompt files, suites and their schema, and the class's docstring are made from that.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from textwrap import fill
from typing import Any, ClassVar, TypeVar

from ..arguments import (
    MOST_BYTES,
    check_choice,
    check_count,
    check_range,
    check_seed,
    check_text,
    parse_bytes,
    shown,
)
from ..errors import TempoError
from ..io.inputs import object_of, read_text
from .rule import Named, find, stored
from .schedules import parse_schedule

#: Largest bias of a logit.
MOST_BIAS = 1e6

#: Temperatures at which logits that were divided by them are finite and differ in fp32.
TEMPERATURES = 1e-6, 1e6


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        words: what JSON has for it, in words.
        option: type of the command line's option.
    """

    words: ClassVar[str] = "text"
    option: ClassVar[Any] = str
    #: type in YAML; None for the option's
    written: ClassVar[Any] = None
    #: whether only Python has such values
    python_only: ClassVar[bool] = False

    @property
    def metavar(self) -> str | None:
        """What stands for the value in the help; None for the name of the option's type."""
        return None

    def check(self, name: str, value: Any) -> Any:
        """The value as the settings keep it; TempoError names what is wrong with it."""
        return value

    @property
    def bounds(self) -> dict[str, Any]:
        """What a JSON Schema says of the range."""
        return {}

    def from_json(self, value: Any) -> Any:
        """What a value that JSON, YAML or an option has means; NotImplemented for another type.

        Raises:
            OverflowError: for an integer that no float holds.
        """
        return value if type(value) is str else NotImplemented

    def from_option(self, value: Any) -> Any:
        """What the value of an option means.

        Raises:
            TempoError: if it cannot be read.
        """
        return self.from_json(value)


@dataclass(frozen=True)
class Count(Kind):
    """An integer of at least ``least``."""

    words = "an integer"
    option = int

    least: int = 1

    def check(self, name: str, value: Any) -> Any:
        check_count(name, value, self.least)
        return value

    @property
    def bounds(self) -> dict[str, Any]:
        return {"minimum": self.least}

    def from_json(self, value: Any) -> Any:
        # Not by isinstance, for which true is an integer.
        return value if type(value) is int else NotImplemented


@dataclass(frozen=True)
class OneOf(Kind):
    """One of a few integers."""

    words = "an integer"
    option = int

    values: tuple[int, ...]

    def check(self, name: str, value: Any) -> Any:
        if type(value) is not int or value not in self.values:
            *first, last = map(str, self.values)
            raise TempoError(f"{name} must be {', '.join(first)} or {last}, got {shown(value)}")
        return value

    @property
    def bounds(self) -> dict[str, Any]:
        return {"minimum": min(self.values), "maximum": max(self.values)}

    def from_json(self, value: Any) -> Any:
        return value if type(value) is int else NotImplemented


@dataclass(frozen=True)
class Seed(Count):
    """An integer in [0, 2^63)."""

    def check(self, name: str, value: Any) -> Any:
        check_seed(value)
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A number in [low, high], or (low, high]."""

    words = "a number"
    option = float

    low: float
    high: float
    low_open: bool = False
    #: what messages say before the range, such as "above 0, "
    said: str = ""

    def check(self, name: str, value: Any) -> Any:
        check_range(name, value, self.low, self.high, self.low_open, self.said)
        return value

    @property
    def bounds(self) -> dict[str, Any]:
        least = "exclusiveMinimum" if self.low_open else "minimum"
        return {least: self.low, "maximum": self.high}

    def from_json(self, value: Any) -> Any:
        if type(value) is int:
            return float(value)
        return value if type(value) is float else NotImplemented


@dataclass(frozen=True)
class Temperature(Number):
    """A number that keeps logits divided by it finite and apart in fp32.

    Args:
        advice: what to do instead of a lower one.
        or_zero: whether it may be 0, too.
    """

    low: float = TEMPERATURES[0]
    high: float = TEMPERATURES[1]
    said: str = "above 0, "
    advice: str = ""
    or_zero: bool = False

    def check(self, name: str, value: Any) -> Any:
        if self.or_zero and value == 0:
            return value
        try:
            return super().check(name, value)
        except TempoError as error:
            raise TempoError(f"{error}; {self.advice}") from error


@dataclass(frozen=True)
class Bytes(Kind):
    """A number of bytes, or its text, such as 800MB."""

    words = "an integer"

    def check(self, name: str, value: Any) -> Any:
        check_count(name, value, most=MOST_BYTES)
        return value

    def from_json(self, value: Any) -> Any:
        if isinstance(value, str):
            return parse_bytes(value)
        return value if type(value) is int else NotImplemented


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few names."""

    names: Collection[str]

    @property
    def metavar(self) -> str | None:
        return "|".join(self.names)

    def check(self, name: str, value: Any) -> Any:
        check_choice(name, value, self.names)
        return value


@dataclass(frozen=True)
class RuleChoice(Kind):
    """A rule, by its name or of the user's own; kept by its name where it has one.

    Args:
        known: rules by name.
        rule: their class.
    """

    known: Mapping[str, Named]
    rule: type[Named]

    @property
    def metavar(self) -> str | None:
        return "|".join(self.known)

    def check(self, name: str, value: Any) -> Any:
        return stored(find(name, value, self.known, self.rule), self.known)


@dataclass(frozen=True)
class ScheduleText(Kind):
    """A schedule, or its text."""

    words = "text such as bezier(0.2,0.8)"

    def check(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise TempoError(
                f"{name} must be a schedule, as parse_schedule makes one of text, got "
                f"{shown(value)}"
            )
        return value

    def from_json(self, value: Any) -> Any:
        return parse_schedule(value) if isinstance(value, str) else NotImplemented


@dataclass(frozen=True)
class Layers(Kind):
    """How many layers, counted from the last one, or their numbers."""

    words = "an integer or a list of integers"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple) and value:
            for layer in value:
                check_count(name, layer, 0)
        else:
            check_count(name, value)
        return value

    def from_json(self, value: Any) -> Any:
        if isinstance(value, str):
            return parse_layers(value)
        if isinstance(value, list) and all(type(layer) is int for layer in value):
            return tuple(value)
        return value if type(value) is int else NotImplemented


@dataclass(frozen=True)
class Texts(Kind):
    """Texts that are not empty."""

    words = "a list of texts"
    option = list[str]

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)) or not all(value):
            raise TempoError(
                f"{name} must be a tuple of texts that are not empty, got {shown(value)}"
            )
        for i, text in enumerate(value):
            check_text(f"{name}[{i}]", text)
        return tuple(value)

    def from_json(self, value: Any) -> Any:
        texts = isinstance(value, list) and all(type(text) is str for text in value)
        return tuple(value) if texts else NotImplemented


@dataclass(frozen=True)
class Text(Kind):
    """A text that is not empty."""

    def check(self, name: str, value: Any) -> Any:
        check_text(name, value)
        if not value:
            raise TempoError(f"{name} must not be empty")
        return value


@dataclass(frozen=True)
class LongText(Text):
    """A text that the command line takes from a file."""

    @property
    def metavar(self) -> str | None:
        return "FILE"

    def from_option(self, value: Any) -> Any:
        return read_text(Path(value))


@dataclass(frozen=True)
class JsonObject(Kind):
    """A JSON object; the command line takes it from a file."""

    words = "an object"
    written = dict[str, Any]

    @property
    def metavar(self) -> str | None:
        return "FILE"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TempoError(f"{name} must be an object, got {shown(value)}")
        return dict(value)

    def from_json(self, value: Any) -> Any:
        return value if isinstance(value, dict) else NotImplemented

    def from_option(self, value: Any) -> Any:
        text = read_text(Path(value)).encode()
        try:
            return object_of(text, '{"type": "object"}')
        except TempoError as error:
            raise TempoError(f"{value}: {error}") from error


@dataclass(frozen=True)
class Biases(Kind):
    """Numbers by token id."""

    words = "an object of token ids and numbers"
    option = list[str]
    written = dict[str, float]

    @property
    def metavar(self) -> str | None:
        return "ID=BIAS"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TempoError(f"{name} must map token ids to numbers, got {shown(value)}")
        for id, bias in value.items():
            check_count(f"a token id of {name}", id, 0)
            check_range(f"{name}[{id}]", bias, -MOST_BIAS, MOST_BIAS)
        return {int(id): float(bias) for id, bias in value.items()}

    def from_json(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return NotImplemented
        try:
            return {int(id): float(bias) for id, bias in value.items()}
        except (TypeError, ValueError):
            return NotImplemented

    def from_option(self, value: Any) -> Any:
        pairs = [text.partition("=") for text in value]
        found = self.from_json({id: bias for id, _, bias in pairs})
        if found is NotImplemented:
            raise TempoError(f"a bias must be ID=BIAS, such as 42=-1.5, got {shown(value)}")
        return found


@dataclass(frozen=True)
class Function(Kind):
    """A function, which only Python has."""

    words = "a function, which only Python has"
    python_only = True

    def check(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise TempoError(f"{name} must be a function, got {shown(value)}")
        return value

    def from_json(self, value: Any) -> Any:
        return NotImplemented


@dataclass(frozen=True)
class Functions(Function):
    """Functions, which only Python has."""

    words = "functions, which only Python has"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            raise TempoError(f"{name} must be a list of functions, got {shown(value)}")
        return tuple(super(Functions, self).check(f"{name}[{i}]", v) for i, v in enumerate(value))

    def from_json(self, value: Any) -> Any:
        return () if value == [] else NotImplemented


@dataclass(frozen=True)
class Inner(Kind):
    """Settings of a class of their own."""

    words = "an object"

    owner: type

    def from_json(self, value: Any) -> Any:
        return NotImplemented

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.owner):
            raise TempoError(f"{name} must be a {self.owner.__name__} or None, got {shown(value)}")
        return value


def parse_layers(text: str) -> int | tuple[int, ...] | None:
    """Layers written as ``all``, ``last:4`` or ``0,5,11``.

    Raises:
        ValueError: for anything else.
    """
    if text == "all":
        return None
    try:
        if text.startswith("last:"):
            return int(text.removeprefix("last:"))
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise TempoError(
            f"prune layers must be all, last:N or numbers like 3,7,11, got {shown(text)}"
        ) from error


@dataclass(frozen=True)
class Entry:
    """A setting's line in the table.

    Args:
        kind: what it may be.
        help: what it is for, with its range; names of settings stand in backticks.
        optional: whether it may be None.
        shown: what the command line's help shows for the default; None shows the default itself.
        short: a short option, such as "-m".
        panel: of the command line's help.
        option: whether the command line has it.
    """

    kind: Kind
    help: str
    optional: bool
    shown: str | None
    short: str | None
    panel: str | None
    option: bool

    @property
    def words(self) -> str:
        """What JSON has for the setting."""
        return self.kind.words + (" or null" if self.optional else "")


def setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    shown: str | None = None,
    short: str | None = None,
    panel: str | None = None,
    option: bool = True,
) -> Any:
    """A field of a settings class; its default and a line of the table, see :class:`Entry`."""
    entry = Entry(kind, help, default is None, shown, short, panel, option)
    return field(default=default, metadata={"entry": entry})


def same(owner: type, name: str, default: Any) -> Any:
    """A field as another settings class has it, with a default of its own."""
    return field(default=default, metadata={"entry": table(owner)[name]})


def table(owner: type) -> dict[str, Entry]:
    """The settings of a class by name."""
    return {each.name: each.metadata["entry"] for each in fields(owner)}


def check_all(settings: Any, prefix: str = "") -> None:
    """Check every field of new settings, and keep each as its kind keeps it.

    Args:
        settings: of a class whose fields are made by :func:`setting`.
        prefix: what messages say before a field's name.

    Raises:
        TempoError: naming the first that is wrong.
    """
    for name, entry in table(type(settings)).items():
        value = getattr(settings, name)
        if value is not None or not entry.optional:
            kept = entry.kind.check(prefix + name, value)
            object.__setattr__(settings, name, kept)


T = TypeVar("T", bound=type)


def documented(owner: T) -> T:
    """Append the table to a settings class's docstring, as its arguments."""
    lines = []
    for each in fields(owner):
        entry: Entry = each.metadata["entry"]
        default = "" if each.default is MISSING or each.default is None else f" [{each.default}]"
        text = f"{each.name}: {re.sub('`+', '``', entry.help)}{default}"
        lines.append(fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12))
    arguments = "\n".join(lines)
    says, raises, errors = (owner.__doc__ or "").partition("\n    Raises:")
    owner.__doc__ = f"{says}\n    Args:\n{arguments}\n{raises}{errors}"
    return owner
