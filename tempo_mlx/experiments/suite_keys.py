"""Which settings may stand in a suite file, and what their values look like there."""

from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
)

from ..rules.combining import COMBINE
from ..rules.pruning import (
    DECISIONS,
    IF_ALL_PRUNED,
    LAYER_WEIGHTS,
    QUERY_WEIGHTS,
    REPAIRS,
    RULES,
    Pruning,
)
from ..rules.schedules import Schedule
from ..rules.visibility import VISIBILITY
from ..settings import BRANCHING, SAMPLING, WEIGHTINGS, Settings

#: Settings whose values are among a few names.
CHOICES: dict[str, Any] = {
    "visibility": VISIBILITY,
    "combine": COMBINE,
    "sampling": SAMPLING,
    "branching": BRANCHING,
    "weighting": WEIGHTINGS,
    "rule": RULES,
    "decision": DECISIONS,
    "if_all_pruned": IF_ALL_PRUNED,
    "layer_weights": LAYER_WEIGHTS,
    "query_weights": QUERY_WEIGHTS,
    "repair": REPAIRS,
}

#: Types of settings as YAML has them.
WRITTEN: dict[Any, Any] = {
    Schedule: str,
    tuple[str, ...]: list[str],
    tuple[int, ...]: list[int] | str,
}

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


def _written(name: str, hint: Any, pruning: type | None) -> Any:
    """The type that a setting has in YAML."""
    if name in CHOICES:
        return Literal[tuple(CHOICES[name])]
    parts = get_args(hint) if get_origin(hint) is not tuple and get_args(hint) else (hint,)
    kinds = [pruning if part is Pruning else WRITTEN.get(part, part) for part in parts]
    return Union[tuple(kinds)]  # noqa: UP007


def _keys(owner: type, pruning: type | None = None) -> dict[str, Any]:
    """Name -> type of the fields of a settings class; a seed comes from the suite's list."""
    hints = get_type_hints(owner)
    names = [field.name for field in fields(owner) if field.name != "seed"]
    return {name: _written(name, hints[name], pruning) for name in names}


def _spec(title: str, keys: dict[str, Any]) -> type[BaseModel]:
    """A model all of whose keys may be left out."""
    optional: dict[str, Any] = {name: (kind, None) for name, kind in keys.items()}
    return create_model(title, __config__=STRICT, **optional)


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
