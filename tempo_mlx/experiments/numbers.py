"""How numbers are shown in reports and on the command line."""

from typing import Any

import pandas as pd


def number(value: Any, signed: bool = False) -> str:
    """Three significant digits; a dash if there is no value."""
    if pd.isna(value):
        return "–"
    return f"{value:{'+' if signed else ''}.3g}"


def interval(low: Any, high: Any, note: str = "") -> str:
    """Bounds of an interval; if there are none, the note or a dash."""
    if pd.isna(low) or pd.isna(high):
        return note or "–"
    return f"[{number(low, True)}, {number(high, True)}]"


def with_holm(p: Any, adjusted: Any) -> str:
    """A p-value, followed by Holm's correction of it."""
    return "–" if pd.isna(p) else f"{number(p)} ({number(adjusted)})"
