"""Which settings may stand in a suite file, and what their values look like there."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    create_model,
    model_validator,
)

from ..old_names import new_names, renamed
from ..rules.own import PLACE, is_place
from ..rules.pruning import Pruning
from ..rules.table import Choice, Entry, Inner, Layers, RuleChoice, table
from ..settings import Settings

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


def _written(entry: Entry, inner: type | None) -> Any:
    """The type that a setting has in YAML."""
    kind = entry.kind
    written: Any = kind.written or kind.option
    if isinstance(kind, RuleChoice):
        written = _rule(kind)
    elif isinstance(kind, Choice):
        written = Literal[tuple(kind.names)]
    elif isinstance(kind, Layers):
        written = int | list[int] | str
    elif isinstance(kind, Inner):
        written = inner
    # A rule that was not chosen is left out.
    optional = entry.optional and not isinstance(kind, RuleChoice)
    return written | None if optional else written


def _rule(kind: RuleChoice) -> Any:
    """A rule's name, or FILE.py:NAME."""

    def named(text: str) -> str:
        if not is_place(text):
            kind.check("it", text)
        return text

    names = {"enum": list(kind.known), "type": "string"}
    own = {"pattern": PLACE.pattern, "type": "string"}
    return Annotated[str, AfterValidator(named), WithJsonSchema({"anyOf": [names, own]})]


def _keys(owner: type, inner: type | None = None) -> dict[str, Any]:
    """Name -> type of the fields of a settings class; a seed comes from the suite's list."""
    return {
        name: Annotated[
            _written(entry, inner),
            Field(description=entry.help.replace("`", ""), json_schema_extra=entry.kind.bounds),
        ]
        for name, entry in table(owner).items()
        if name != "seed" and not entry.kind.python_only
    }


def by_new_names(keys: Any) -> Any:
    """What a suite that was stored says, its settings by the names that they have now."""
    names = {**renamed(Settings), **renamed(Pruning)}
    if isinstance(keys, dict):
        return {names.get(name, name): by_new_names(value) for name, value in keys.items()}
    return [by_new_names(key) for key in keys] if isinstance(keys, list) else keys


class _Keys(BaseModel):
    """Keys of which each may be left out, and may have the name that it had before."""

    model_config = STRICT

    @model_validator(mode="before")
    @classmethod
    def _by_new_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return new_names(new_names(given, Settings), Pruning)


def _spec(title: str, keys: dict[str, Any]) -> type[BaseModel]:
    """A model all of whose keys may be left out."""
    optional: dict[str, Any] = {name: (kind, None) for name, kind in keys.items()}
    return create_model(title, __base__=_Keys, **optional)


def _alternatives(keys: dict[str, Any]) -> dict[str, Any]:
    """The same keys, each with a list of values."""
    return {
        name: Annotated[list[kind], Field(min_length=1)]  # type: ignore[valid-type]
        for name, kind in keys.items()
    }


PruningSpec = _spec("Pruning", _keys(Pruning))
PruningGrid = _spec("PruningGrid", _alternatives(_keys(Pruning)))
SettingsSpec = _spec("Settings", _keys(Settings, PruningSpec))
Grid = _spec(
    "Grid",
    _alternatives(_keys(Settings, PruningSpec))
    | {
        "pruning": Annotated[
            Annotated[list[PruningSpec | None], Field(min_length=1), Tag("list")]  # type: ignore[valid-type]
            | Annotated[PruningGrid, Tag("object")],
            Discriminator(lambda given: "list" if isinstance(given, list) else "object"),
        ]
    },
)
