"""Suite files: YAML, its errors in one line, its JSON Schema."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from ..io.inputs import shown_json
from ..weights import recipes
from .suite import Suite, SuiteError
from .suite_keys import Grid, PruningGrid, PruningSpec, SettingsSpec

#: Parts of an error's place that name a kind of value, not a key.
TAGS = frozenset({"list", "object", "Pruning", "str", "int", "float", "list[int]", "none"})


#: Numbers; PyYAML reads those like 1e-1 as text, unlike YAML 1.2.
NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?", re.ASCII)
WITH_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$", re.ASCII)


class _Loader(yaml.SafeLoader):
    """Reads 1e-1 as a number, and refuses duplicate keys, of which YAML drops the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise SuiteError(f"the key {key!r} is there twice in the block from line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", WITH_EXPONENT, list("-+.0123456789"))


def read_suite(name: str | Path) -> Suite:
    """The suite of a file, or a built-in one by its name.

    Raises:
        SuiteError: if there is none, or naming the wrong key.
    """
    path = Path(name)
    known = built_in()
    if not path.is_file() and str(name) in known:
        path = known[str(name)]
    if not path.is_file():
        raise SuiteError(
            f"{str(name)!r} is not a file or a built-in suite; built-in are {', '.join(known)}"
        )
    try:
        return parse_suite(path.read_text(encoding="utf-8")).beside(path)
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise SuiteError(f"{path} cannot be read: {error.strerror}") from error
    except SuiteError as error:
        raise SuiteError(f"{path}: {error}") from error


def parse_suite(text: str) -> Suite:
    """The suite in a YAML text; a SuiteError names the wrong key."""
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise SuiteError(f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise SuiteError("not a suite: an object with name and prompts is needed")
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise SuiteError(_line(error)) from error


def _line(error: ValidationError) -> str:
    """The first error in one line; unknown keys come before missing ones."""
    first, *_ = sorted(
        error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden"
    )
    place = [str(part) for part in first["loc"] if part not in TAGS]
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        owner = _owner(place[:-1])
        return f"unknown key {where!r}; keys are {', '.join(owner.model_fields)}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {message}"
    given = first["input"]
    return f"{where}: {message}, got {shown_json(given)}{_hint(first['type'], given)}"


def _hint(kind: str, given: Any) -> str:
    """How to write a value that YAML reads as another type."""
    if kind in ("string_type", "literal_error") and not isinstance(given, str | list):
        if isinstance(given, bool):
            return '; yes, no, on, off, true and false are not text in YAML: write "yes", in quotes'
        if isinstance(given, dict):
            return "; put a text with a colon and a space in quotes"
        return "; numbers, dates and null are not text in YAML: put them in quotes"
    if kind in ("float_type", "int_type") and isinstance(given, str) and NUMBER.fullmatch(given):
        return "; write numbers without quotes, such as 0.1 or 1e-1"
    return ""


def _owner(place: list[str]) -> type[BaseModel]:
    """The model whose keys belong at a place of the file."""
    inside = [part for part in place if not part.isdigit()]
    if not inside:
        return Suite
    if inside[-1] == "pruning":
        return PruningSpec if inside[0] == "settings" or len(place) > 2 else PruningGrid
    return {"settings": SettingsSpec, "grid": Grid}[inside[0]]


def json_schema() -> dict[str, Any]:
    """JSON Schema of suite files, for editors."""
    schema = Suite.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def built_in() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    checkout = recipes.checkout_folder()
    folder = recipes.PACKAGE / "suites" if checkout is None else checkout / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
