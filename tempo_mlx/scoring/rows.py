"""Rows of candidates to score, as files have them: JSON lines, or context, tab, word."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import TempoError
from ..io.inputs import name_of, object_of, read_lines, shown_json, text_of
from ..io.resumable_jsonl import ERROR, row_key

#: Version of the records.
SCHEMA = 1

#: What a result adds to its row.
RESULTS = ("scores", "ranks", "best", "details", ERROR)

#: First lines that name the columns.
HEADERS = (("context", "word"), ("context", "candidate"))

EXAMPLE = '{"context": "He is", "candidates": ["happy"]}'

#: Lines of one context that a message names.
NAMED_LINES = 5


@dataclass(frozen=True)
class Row:
    """A context with its candidates, or what is wrong with a line.

    Args:
        name: of the file.
        lines: their numbers, from 1.
        context: may be empty.
        candidates: words, or lists of spellings of one.
        given: all that the row has, to be kept.
        error: why the row cannot be scored; None if it can.
    """

    name: str
    lines: list[int]
    context: str = ""
    candidates: list[str | list[str]] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def where(self) -> str:
        """File and lines, for messages."""
        first, last, n = self.lines[0], self.lines[-1], len(self.lines)
        if n == 1:
            return f"{self.name}, line {first}"
        if last - first == n - 1:
            return f"{self.name}, lines {first} to {last}"
        more = f" and {n - NAMED_LINES} more" if n > NAMED_LINES else ""
        return f"{self.name}, lines {', '.join(map(str, self.lines[:NAMED_LINES]))}{more}"


def read_rows(file: str, kind: str) -> list[Row]:
    """The rows of a file in UTF-8, or of standard input ("-"); blank lines are left out.

    Args:
        file: its name.
        kind: "jsonl", an object a line; or "tsv", context, tab and word a line. The lines of one
            context are one row, wherever they are; a first line that names the columns is
            skipped.

    Returns:
        in the order of their first lines. A line that cannot be read is a row with an ``error``.

    Raises:
        TempoError: if the file cannot be read, is too long, or has no row.
    """
    lines = read_lines(file)
    rows = (_objects if kind == "jsonl" else _contexts)(name_of(file), lines)
    if not rows:
        raise TempoError(f"{name_of(file)} has no rows")
    return rows


def _objects(name: str, lines: list[tuple[int, bytes]]) -> list[Row]:
    rows = []
    for number, line in lines:
        given: dict[str, Any] = {}
        try:
            given = object_of(line, EXAMPLE)
            _require_row(given)
            rows.append(Row(name, [number], given["context"], given["candidates"], given))
        except TempoError as error:
            kept = {key: given[key] for key in given if key not in ("row", "key", *RESULTS)}
            rows.append(Row(name, [number], given=kept, error=str(error)))
    return rows


def _contexts(name: str, lines: list[tuple[int, bytes]]) -> list[Row]:
    # By context; a line that cannot be read is alone, by its number.
    groups: dict[str | int, list[tuple[int, str]]] = {}
    for i, (number, line) in enumerate(lines):
        try:
            context, word = _columns(line)
        except TempoError as error:
            groups[number] = [(number, str(error))]
            continue
        if i > 0 or (context.strip().lower(), word.strip().lower()) not in HEADERS:
            groups.setdefault(context, []).append((number, word))
    return [_group(name, context, group) for context, group in groups.items()]


def _group(name: str, context: str | int, group: list[tuple[int, str]]) -> Row:
    numbers, texts = [number for number, _ in group], [text for _, text in group]
    if isinstance(context, int):
        return Row(name, numbers, error=texts[0])
    candidates: list[Any] = texts
    return Row(name, numbers, context, candidates, {"context": context, "candidates": candidates})


def _columns(line: bytes) -> tuple[str, str]:
    columns = text_of(line).split("\t")
    if len(columns) != 2:
        raise TempoError(f"must be a context, a tab and a word, got {len(columns)} columns")
    context, word = columns
    if not word.strip():
        raise TempoError("the word is empty")
    return context, word


def _require_row(given: dict[str, Any]) -> None:
    """Raise TempoError unless an object is a context with candidates."""
    for name in ("context", "candidates"):
        if name not in given:
            raise TempoError(f'there is no "{name}"')
    if not isinstance(given["context"], str):
        raise TempoError(f"context must be text, got {shown_json(given['context'])}")
    if not isinstance(given["candidates"], list):
        raise TempoError(f"candidates must be a list, got {shown_json(given['candidates'])}")
    for i, candidate in enumerate(given["candidates"]):
        spellings = candidate if isinstance(candidate, list) else [candidate]
        if not spellings or not all(isinstance(each, str) and each.strip() for each in spellings):
            raise TempoError(
                f"candidates[{i}] must be a word or a list of spellings, none of them empty, "
                f"got {shown_json(candidate)}"
            )
    for name in ("row", "key", *RESULTS):
        if name in given:
            raise TempoError(f'"{name}" is the name of a result; rename it')


def ranked(row: Row, scores: list[float]) -> dict[str, Any]:
    """Scores, ranks (1 is the best; candidates that score alike share one), the best candidate."""
    places: dict[float, int] = {}
    for place, score in enumerate(sorted(scores, reverse=True), 1):
        places.setdefault(score, place)
    ranks = [places[score] for score in scores]
    best = row.candidates[ranks.index(1)] if ranks else None
    return {"scores": scores, "ranks": ranks, "best": best}


def key_of(row: Row, settings: dict[str, Any], model: str) -> str:
    """What identifies a row's result.

    Args:
        row: all that it has counts.
        settings: of the scorer, and what else decides what a record holds.
        model: the :func:`~tempo_mlx.weights.fingerprint.identify` of model and tokenizer.
    """
    return row_key(SCHEMA, row.given, row.error, settings, model)
