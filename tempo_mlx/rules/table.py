"""The table of settings: type, bounds and help of each setting, written once.

A settings class declares its fields with :func:`setting`. Validation, command-line options, JSON
prompt files, suites and their schema, and the class's docstring are derived from them.
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

#: Range of temperatures for which divided logits stay finite and distinct in fp32.
TEMPERATURES = 1e-6, 1e6


@dataclass(frozen=True)
class Kind:
    """The kind of value that a setting takes.

    Attributes:
        words: description of the JSON type.
        option: type of the command-line option.
    """

    words: ClassVar[str] = "text"
    option: ClassVar[Any] = str
    #: type in YAML; None for the same as ``option``
    written: ClassVar[Any] = None
    #: whether such values can only be given in Python
    python_only: ClassVar[bool] = False

    @property
    def metavar(self) -> str | None:
        """Placeholder of the value in the help; None for the name of the option's type."""
        return None

    def check(self, name: str, value: Any) -> Any:
        """Return a valid value in the form that is stored; raise TempoError otherwise."""
        return value

    @property
    def bounds(self) -> dict[str, Any]:
        """The range as JSON Schema keywords."""
        return {}

    def from_json(self, value: Any) -> Any:
        """Convert a value from JSON, YAML or an option; NotImplemented if it has the wrong type.

        Raises:
            OverflowError: for an integer too large for a float.
        """
        return value if type(value) is str else NotImplemented

    def from_option(self, value: Any) -> Any:
        """Convert the value of a command-line option.

        Raises:
            TempoError: if it is malformed.
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
        # isinstance would accept booleans.
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
    #: text before the range in messages, such as "above 0, "
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
    """A temperature for which divided logits stay finite and distinct in fp32.

    Args:
        advice: what to do instead of choosing a lower one.
        or_zero: whether 0 is allowed as well.
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
    """A number of bytes, or text such as 800MB."""

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
    """A built-in rule, stored as its name, or a user's rule.

    Args:
        known: built-in rules by name.
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
    """A schedule, or its textual form."""

    words = "text such as bezier(0.2,0.8)"

    def check(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise TempoError(
                f"{name} must be a schedule, such as one made by parse_schedule, got {shown(value)}"
            )
        return value

    def from_json(self, value: Any) -> Any:
        return parse_schedule(value) if isinstance(value, str) else NotImplemented


@dataclass(frozen=True)
class Layers(Kind):
    """A number of last layers, or a tuple of layer numbers."""

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
    """Non-empty texts."""

    words = "a list of texts"
    option = list[str]

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)) or not all(value):
            raise TempoError(f"{name} must be a tuple of non-empty texts, got {shown(value)}")
        for i, text in enumerate(value):
            check_text(f"{name}[{i}]", text)
        return tuple(value)

    def from_json(self, value: Any) -> Any:
        texts = isinstance(value, list) and all(type(text) is str for text in value)
        return tuple(value) if texts else NotImplemented


@dataclass(frozen=True)
class Text(Kind):
    """A non-empty text."""

    def check(self, name: str, value: Any) -> Any:
        check_text(name, value)
        if not value:
            raise TempoError(f"{name} must not be empty")
        return value


@dataclass(frozen=True)
class LongText(Text):
    """A text that the command line reads from a file."""

    @property
    def metavar(self) -> str | None:
        return "FILE"

    def from_option(self, value: Any) -> Any:
        return read_text(Path(value))


@dataclass(frozen=True)
class JsonObject(Kind):
    """A JSON object; the command line reads it from a file."""

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
    """A function, which can only be given in Python."""

    words = "a function, which can only be given in Python"
    python_only = True

    def check(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise TempoError(f"{name} must be a function, got {shown(value)}")
        return value

    def from_json(self, value: Any) -> Any:
        return NotImplemented


@dataclass(frozen=True)
class Functions(Function):
    """Functions, which can only be given in Python."""

    words = "functions, which can only be given in Python"

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, (tuple, list)):
            raise TempoError(f"{name} must be a list of functions, got {shown(value)}")
        return tuple(super(Functions, self).check(f"{name}[{i}]", v) for i, v in enumerate(value))

    def from_json(self, value: Any) -> Any:
        return () if value == [] else NotImplemented


@dataclass(frozen=True)
class Inner(Kind):
    """An instance of another settings class."""

    words = "an object"

    owner: type

    def from_json(self, value: Any) -> Any:
        return NotImplemented

    def check(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.owner):
            raise TempoError(f"{name} must be a {self.owner.__name__} or None, got {shown(value)}")
        return value


def parse_layers(text: str) -> int | tuple[int, ...] | None:
    """Parse layers such as ``all``, ``last:4`` or ``0,5,11``.

    Raises:
        ValueError: if the text has none of these forms.
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
    """One row of the table.

    Args:
        kind: of value.
        help: purpose and range; names of settings are in backticks.
        optional: whether None is allowed.
        shown: text for the default in the command line's help; None for the default itself.
        short: a short option, such as "-m".
        panel: of the command line's help.
        option: whether there is a command-line option.
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
        """Description of the setting's JSON type."""
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
    """Declare a field of a settings class: its default, and a row of the table (:class:`Entry`)."""
    entry = Entry(kind, help, default is None, shown, short, panel, option)
    return field(default=default, metadata={"entry": entry})


def same(owner: type, name: str, default: Any) -> Any:
    """Declare a field like that of another settings class, with a different default."""
    return field(default=default, metadata={"entry": table(owner)[name]})


def table(owner: type) -> dict[str, Entry]:
    """The table of a settings class, by name."""
    return {each.name: each.metadata["entry"] for each in fields(owner)}


def check_all(settings: Any, prefix: str = "") -> None:
    """Validate every field of new settings, and store each in the form that its kind returns.

    Args:
        settings: of a class whose fields are declared by :func:`setting`.
        prefix: of field names in messages.

    Raises:
        TempoError: naming the first invalid field.
    """
    for name, entry in table(type(settings)).items():
        value = getattr(settings, name)
        if value is not None or not entry.optional:
            kept = entry.kind.check(prefix + name, value)
            object.__setattr__(settings, name, kept)


T = TypeVar("T", bound=type)


def documented(owner: T) -> T:
    """Add the table to a settings class's docstring as its arguments."""
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
