"""Check that tables can be analysed: columns exist, numbers are finite."""

import numpy as np

from ..errors import TempoError
from .statistics import check_finite
from .tables import Tables

COLUMNS = {
    "runs": "run_id prompt_id category prompt seed condition n_steps n_tokens text",
    "tokens": "run_id step slot id probability set_size pruned_at",
    "entries": "run_id query_step slot key_step distance is_prompt is_first set_size probability",
    "entropy": "run_id step layer head entropy",
    "kl": "prompt_id category step condition_a condition_b kl_ab kl_ba",
}
NUMBERS = {
    "tokens": ["probability"],
    "entries": ["query_step", "key_step", "distance", "set_size", "probability"],
    "entropy": ["entropy"],
    "kl": ["kl_ab", "kl_ba"],
}
#: Half precision may round the sum of a row above 1.
MOST_ATTENTION = 1.001


def check_tables(tables: Tables) -> None:
    """Raise TempoError, naming table and column, unless the tables can be analysed."""
    for name, columns in COLUMNS.items():
        missing = set(columns.split()) - set(getattr(tables, name).columns)
        if missing:
            raise TempoError(f"table {name} lacks the columns {', '.join(sorted(missing))}")
    if not len(tables.runs):
        raise TempoError("no run is done: nothing to analyse")
    if tables.runs["run_id"].duplicated().any():
        twice = tables.runs["run_id"][tables.runs["run_id"].duplicated()].iloc[0]
        raise TempoError(f"table runs has run {twice} twice")
    entries, shape = tables.entries, tables.received.shape
    if len(shape) != 3 or shape[0] != len(entries):
        raise TempoError(
            f"received must be [{len(entries)}, layers, heads], a row for each entry, got {shape}"
        )
    unknown = set(entries["run_id"]) - set(tables.runs["run_id"])
    if unknown:
        raise TempoError(f"table entries has runs that table runs lacks: {sorted(unknown)[0]}")
    for name, numbers in NUMBERS.items():
        for column in numbers:
            check_finite(f"column {column} of table {name}", getattr(tables, name)[column])
    for layer in range(shape[1]):
        received = check_finite(f"received, layer {layer},", tables.received[:, layer])
        if received.size and not 0 <= received.min() <= received.max() <= MOST_ATTENTION:
            worst = received.flat[np.abs(received - 0.5).argmax()]
            raise TempoError(f"received, layer {layer}, must be in [0, 1], got {worst:g}")
