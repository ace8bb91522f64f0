"""Files of prompts: one a line, as text or as JSON with settings of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import TempoError
from ..io.inputs import object_of, read_lines, shown_json, text_of
from ..old_names import new_names
from ..rules.pruning import Pruning
from ..rules.table import Entry, Inner, table
from ..settings import Settings

#: Endings of the names of files that can be read.
FORMATS = (".txt", ".jsonl")

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts.

    Args:
        prompt: text, token ids or chat messages; None where the row has none that can be used.
        overrides: settings of this row by name, with values as :class:`Settings` takes them;
            "pruning" is None or such a dictionary for :class:`Pruning`.
        id: what the row calls itself, if anything.
        path: of the file.
        line: number of the line, from 1.
        error: what is wrong with the row, with its file and line; None if it can be run.
    """

    prompt: Prompt | None
    overrides: dict[str, Any]
    id: str | int | None
    path: Path
    line: int
    error: str | None = None

    def told(self, message: str | Exception) -> str:
        """What is wrong with the row, with its file and line, once."""
        told, prefix = str(message), _at(self.path, self.line, "")
        return told if told.startswith(prefix) else prefix + told

    def own_settings(self) -> set[str]:
        """Names of the settings that the row has; see :func:`setting_names`."""
        return setting_names(self.overrides)


def setting_names(given: Mapping[str, Any]) -> set[str]:
    """Names of settings, those inside "pruning" as "pruning.rule" and so on."""
    return {*given, *(f"pruning.{name}" for name in given.get("pruning") or ())}


def read_prompts(path: Path) -> list[PromptRow]:
    """The rows of a file in UTF-8, blank lines left out.

    Args:
        path: ``.txt``, one prompt a line; or ``.jsonl``, one object a line: "prompt" is a text, a
            list of token ids or a list of chat messages; "id" (a text or an integer, optional) is
            carried through; every other key is a setting of that row, see :func:`row_settings`.

    Returns:
        a row for each line that is not blank; where something is wrong with one, it says so in
        ``error``, and the others stand.

    Raises:
        ValueError: if the file cannot be read, has another ending, or has no prompts.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise TempoError(f"{path} must end in {' or '.join(FORMATS)}")
    read = _read_text if kind == ".txt" else _read_object
    rows = [read(path, number, line) for number, line in read_lines(path)]
    if not rows:
        raise TempoError(f"{path} has no prompts")
    return rows


def row_settings(row: PromptRow, defaults: Settings) -> Settings:
    """The settings of a row: its own, and the defaults for those that it does not name.

    The same holds inside "pruning": what its object does not name is as in the pruning of the
    defaults, or as in ``Pruning()`` where they prune nothing. "pruning": null prunes nothing.

    Raises:
        ValueError: naming file, line and setting, if the row has an error, a value is out of range
            or settings do not go together.
    """
    if row.error is not None:
        raise TempoError(row.error)
    overrides = dict(row.overrides)
    try:
        if overrides.get("pruning") is not None:
            overrides["pruning"] = replace(defaults.pruning or Pruning(), **overrides["pruning"])
        return replace(defaults, **overrides)
    except TempoError as error:
        raise TempoError(row.told(error)) from error


def _read_text(path: Path, number: int, line: bytes) -> PromptRow:
    try:
        return PromptRow(text_of(line), {}, None, path, number)
    except TempoError as error:
        return PromptRow(None, {}, None, path, number, _at(path, number, error))


def _read_object(path: Path, number: int, line: bytes) -> PromptRow:
    prompt = id = None
    try:
        given = object_of(line, '{"prompt": "Once upon a time"}')
        id = _checked_id(given.pop("id", None))
        prompt = _checked_prompt(given)
        return PromptRow(prompt, settings_from_json(given, Settings), id, path, number)
    except TempoError as error:
        return PromptRow(prompt, {}, id, path, number, _at(path, number, error))


def _at(path: Path, number: int, message: str | Exception) -> str:
    return f"{path}, line {number}: {message}"


def _checked_id(id: Any) -> str | int | None:
    if id is not None and type(id) not in (str, int):
        raise TempoError(f"id must be text or an integer, got {shown_json(id)}")
    return id


def _checked_prompt(given: dict[str, Any]) -> Prompt:
    """The prompt, taken out of the row."""
    if "prompt" not in given:
        raise TempoError('there is no "prompt"')
    prompt: Prompt = given.pop("prompt")
    if prompt in ("", []):
        raise TempoError("prompt is empty")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        if all(type(item) is int for item in prompt):
            return prompt
        if all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in prompt):
            return prompt
    raise TempoError(
        "prompt must be text, a list of token ids, or a list of chat messages such as "
        '{"role": "user", "content": "Hello"}'
    )


def settings_from_json(given: Mapping[str, Any], owner: type, prefix: str = "") -> dict[str, Any]:
    """Values that JSON or YAML has, as the fields of a settings class have them.

    Args:
        given: by name; old names are accepted, with a warning.
        owner: the class.
        prefix: what messages say before a name.

    Raises:
        TempoError: for a name that is no field, or a value of another type.
    """
    entries = table(owner)
    values = new_names(given, owner)
    for name, value in values.items():
        if name not in entries:
            raise TempoError(
                f"unknown {prefix}setting {name!r}; {prefix}settings are {', '.join(entries)}"
            )
        values[name] = _from_json(prefix + name, value, entries[name])
    return values


def _from_json(name: str, value: Any, entry: Entry) -> Any:
    if value is None and entry.optional:
        return None
    if isinstance(entry.kind, Inner) and isinstance(value, dict):
        return settings_from_json(value, entry.kind.owner, "prune ")
    try:
        found = entry.kind.from_json(value)
    except OverflowError as error:
        raise TempoError(f"{name} is too large for a number") from error
    if found is NotImplemented:
        raise TempoError(f"{name} must be {entry.words}, got {shown_json(value)}")
    return found
