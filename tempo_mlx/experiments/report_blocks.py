"""What a report is made of: sections of texts, tables and pictures, in no markup of their own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

#: Rows of tables that grow with the suite: prompts, texts, influence.
MOST_ROWS = 60


@dataclass(frozen=True)
class Table:
    """Rows of texts under their heads."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A picture by the name of its file, without folder and ending."""

    name: str
    caption: str
    kind: str = "picture"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Items:
    """A list of short texts."""

    items: list[str]
    kind: str = "items"


@dataclass(frozen=True)
class Section:
    """A part of the report under a heading."""

    title: str
    blocks: list[Table | Picture | Text | Items] = field(default_factory=list)


def number(value: Any, signed: bool = False) -> str:
    """Three digits that count; a dash where there is none."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:{'+' if signed else ''}.3g}"


def interval(low: Any, high: Any, note: str = "") -> str:
    """Bounds, or why there are none."""
    if pd.isna(low) or pd.isna(high):
        return note or "–"
    return f"[{number(low, True)}, {number(high, True)}]"


def shortened(columns: list[str], rows: list[list[str]], caption: str) -> Table:
    left_out = len(rows) - MOST_ROWS
    if left_out > 0:
        caption = f"{caption} (the first {MOST_ROWS} of {len(rows)})"
    return Table(columns, rows[:MOST_ROWS], caption)


def flat(
    tree: Mapping[str, Any], before: str = "", leave_out: tuple[str, ...] = ()
) -> list[list[str]]:
    """Names and values of a nested mapping, names joined by points."""
    rows = []
    for name, value in tree.items():
        if name in leave_out:
            continue
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            rows += flat(value, f"{before}{name}.")
        else:
            joined = isinstance(value, list | tuple)
            rows.append([f"{before}{name}", ", ".join(map(str, value)) if joined else str(value)])
    return rows
