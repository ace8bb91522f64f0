"""Rows of candidates to score, as files have them: JSON lines, or context, tab, word."""

import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import TempoError

#: What a result adds to its row.
RESULTS = ("scores", "ranks", "best", "details")


@dataclass(frozen=True)
class Row:
    """A context with its candidates.

    Args:
        where: file and line, or lines, for messages.
        context: may be empty.
        candidates: words, or lists of spellings of one.
        given: all that the row has, to be kept.
    """

    where: str
    context: str
    candidates: list[str | list[str]]
    given: dict[str, Any]


def read_rows(file: str, kind: str) -> list[Row]:
    """The rows of a file in UTF-8, or of standard input ("-"); blank lines are left out.

    Raises:
        ValueError: naming file, line and field, for the first line that is no row; or if there is
            no row, or the file cannot be read.
    """
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise TempoError(f"{name} cannot be read: {error.strerror}") from error
    # As bytes, because text also splits at characters that a context may hold.
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    parse = _object if kind == "jsonl" else _columns
    parsed = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                parsed.append((number, parse(line)))
            except (ValueError, RecursionError) as error:
                raise TempoError(f"{name}, line {number}: {error}") from error
    if not parsed:
        raise TempoError(f"{name} has no rows")
    if kind == "jsonl":
        return [_row(f"{name}, line {number}", given) for number, given in parsed]
    rows = []
    for context, group in groupby(parsed, key=lambda each: each[1]["context"]):
        numbers, columns = zip(*group, strict=True)
        where = f"{name}, line {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")
        words = [given["word"] for given in columns]
        rows.append(_row(where, {"context": context, "candidates": words}))
    return rows


def _row(where: str, given: dict[str, Any]) -> Row:
    return Row(where, given["context"], given["candidates"], given)


def _columns(line: bytes) -> dict[str, Any]:
    columns = _text(line).split("\t")
    if len(columns) != 2:
        raise TempoError(f"must be a context, a tab and a word, got {len(columns)} columns")
    if not columns[1].strip():
        raise TempoError("the word is empty")
    return dict(zip(("context", "word"), columns, strict=True))


def _object(line: bytes) -> dict[str, Any]:
    try:
        given = json.loads(_text(line))
    except json.JSONDecodeError as error:
        raise TempoError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(given, dict):
        raise TempoError('not an object such as {"context": "He is", "candidates": ["happy"]}')
    for name in ("context", "candidates"):
        if name not in given:
            raise TempoError(f'there is no "{name}"')
    if not isinstance(given["context"], str):
        raise TempoError(f"context must be text, got {_shown(given['context'])}")
    if not isinstance(given["candidates"], list):
        raise TempoError(f"candidates must be a list, got {_shown(given['candidates'])}")
    for i, candidate in enumerate(given["candidates"]):
        spellings = candidate if isinstance(candidate, list) else [candidate]
        if not spellings or not all(isinstance(each, str) and each.strip() for each in spellings):
            raise TempoError(
                f"candidates[{i}] must be a word or a list of spellings, none of them empty, "
                f"got {_shown(candidate)}"
            )
    for name in ("row", "key", *RESULTS):
        if name in given:
            raise TempoError(f'"{name}" is the name of a result; rename it')
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise TempoError(r"half a surrogate pair (\ud800 to \udfff), which is no text") from error
    return given


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise TempoError("not UTF-8 text") from error


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def ranked(row: Row, scores: list[float]) -> dict[str, Any]:
    """Scores, ranks (1 is the best; candidates that score alike share one), the best candidate."""
    places: dict[float, int] = {}
    for place, score in enumerate(sorted(scores, reverse=True), 1):
        places.setdefault(score, place)
    ranks = [places[score] for score in scores]
    best = row.candidates[ranks.index(1)] if ranks else None
    return {"scores": scores, "ranks": ranks, "best": best}


def key_of(row: Row, settings: dict[str, Any], model: str) -> str:
    """What identifies a row's result: all that the row has, the settings, the model."""
    text = json.dumps([row.given, settings, model], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
