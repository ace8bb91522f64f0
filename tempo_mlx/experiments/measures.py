"""Measures of the attention to siblings and to their controls, by run, layer and head.

A query's attention sums to one, and n siblings share the place of a single token. So there are
three measures, which answer different questions (:data:`MEASURES`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame
from scipy.sparse import csr_array

from .matching import (
    Rules,
    balance,
    count_matches,
    keys_of,
    match,
    remaining_difference,
    sibling_sets,
    sibling_tokens,
    slopes,
)
from .tables import Tables

#: Measures, and the question that each answers.
MEASURES = {
    "token": (
        "attention per sibling: does a token of a set get as much attention as a token that is "
        "alone? If n siblings together get what one token gets, each gets 1/n of it"
    ),
    "set": (
        "attention of the whole set: does a position with a set get as much attention as a "
        "position with one token? If each of n siblings gets what one token gets, the set gets n "
        "times as much"
    ),
    "alone": (
        "attention per sibling as if its siblings were not there: a / (1 - attention of the "
        "siblings). For one query that is the softmax without their keys; for a query set of "
        "several tokens it is computed from their mean. Does a token of a set differ from a single "
        "token in more than having to share?"
    ),
}

#: Units that each measure matches.
UNITS = {"token": "tokens", "set": "sets", "alone": "tokens"}

#: In place of a set size: all sizes.
ALL = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """One measure in every cell; a cell is the siblings of one set size, or of all, in one run.

    Args:
        cells: run_id, prompt_id, category, condition, set_size (0: all), units, matched.
        units: that the cells average over: run_id, prompt_id, category, condition, query_step,
            key_step, distance, set_size, and siblings and controls (means over layers and heads;
            NaN without a control).
        siblings, controls: [C, L, H], means over the matched units; NaN if there are none.
        naive: [C, L, H], mean over all units minus mean over all other keys that the same queries
            can see, including the prompt and its first token.
    """

    cells: DataFrame
    units: DataFrame
    siblings: np.ndarray
    controls: np.ndarray
    naive: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """Siblings minus matched controls, [C, L, H]."""
        return self.siblings - self.controls


@dataclass(frozen=True)
class Measurements:
    """All measures of a suite.

    Args:
        measured: by name of the measure.
        matches: how many units have controls: of ("tokens" or "sets"), condition, category, ...
        balance: how similar they are: of, condition, covariate, ...
        first: condition, run_id, layer, attention: of the prompt's first token, mean over heads and
            query steps.
        adjusted: conditions whose controls were adjusted.
    """

    measured: dict[str, Measured]
    matches: DataFrame
    balance: DataFrame
    first: DataFrame
    adjusted: list[str]


@dataclass(frozen=True, eq=False)
class Adjustment:
    """How much more attention a condition's units would get than their controls as single tokens.

    Args:
        units: numbers of the condition's units, [U].
        left: covariates of units minus those of controls, [U, 3].
        singles: rows of ``received``, [N].
        slopes: maps their attention to slopes, [3, N].
    """

    units: np.ndarray
    left: np.ndarray
    singles: np.ndarray
    slopes: np.ndarray


def measure(tables: Tables, rules: Rules, keys: DataFrame | None = None) -> Measurements:
    """Match siblings with controls, and measure both.

    Args:
        tables: of the runs.
        rules: of matching.
        keys: :func:`~.matching.keys_of` the tables, if already computed.
    """
    keys = keys_of(tables) if keys is None else keys
    units = {"tokens": sibling_tokens(keys), "sets": sibling_sets(keys)}
    pairs = {kind: match(units[kind], keys, rules) for kind in units}
    n_entries = len(tables.received)
    members = {
        "tokens": _matrix(units["tokens"]["unit"], units["tokens"]["row"], n_entries),
        "sets": _members(units["sets"], keys, n_entries),
    }
    whole = _members(units["tokens"], keys, n_entries)

    def alone(received: np.ndarray) -> np.ndarray:
        own = members["tokens"] @ received
        siblings = whole @ received - own
        # Nothing is left if the siblings got everything; rounding may make it negative.
        left = 1 - siblings
        return own / np.where(left > 0, left, np.nan)

    outcomes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "token": lambda received: members["tokens"] @ received,
        "set": lambda received: members["sets"] @ received,
        "alone": alone,
    }
    fitted = _fit(keys) if rules.adjustment == "linear" else {}
    adjustments = {kind: _adjustments(fitted, units[kind], pairs[kind], keys) for kind in units}
    measured = {
        name: _measure(
            outcome,
            units[UNITS[name]],
            pairs[UNITS[name]],
            adjustments[UNITS[name]],
            keys,
            tables.received,
        )
        for name, outcome in outcomes.items()
    }
    matches = [count_matches(units[kind], pairs[kind]).assign(of=kind) for kind in units]
    balances = [balance(units[kind], pairs[kind], keys).assign(of=kind) for kind in units]
    return Measurements(
        measured,
        pd.concat(matches, ignore_index=True),
        pd.concat(balances, ignore_index=True),
        _first_token(keys, tables.received),
        list(fitted),
    )


def _fit(keys: DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of the single tokens of each condition, and the map of their attention to slopes."""
    fitted = {}
    for condition, singles in keys[keys["kind"] == "single"].groupby("condition", sort=False):
        found = slopes(singles)
        if found is not None:
            fitted[str(condition)] = singles["row"].to_numpy(), found
    return fitted


def _adjustments(
    fitted: dict[str, tuple[np.ndarray, np.ndarray]],
    units: DataFrame,
    pairs: DataFrame,
    keys: DataFrame,
) -> list[Adjustment]:
    left = remaining_difference(units, pairs, keys)
    places = {condition: np.flatnonzero(units["condition"] == condition) for condition in fitted}
    return [
        Adjustment(places[condition], left[places[condition]], singles, found)
        for condition, (singles, found) in fitted.items()
    ]


def _matrix(rows: Any, columns: Any, n_columns: int, weights: Any = None) -> csr_array:
    """Sparse [rows, n_columns] with the weight, by default 1, of each pair."""
    rows, columns = np.asarray(rows, int), np.asarray(columns, int)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, float)
    return csr_array((weights, (rows, columns)), shape=(rows.max(initial=-1) + 1, n_columns))


def _members(units: DataFrame, keys: DataFrame, n_entries: int) -> csr_array:
    """[units, entries], 1 for each live token of the set that the unit is or belongs to."""
    same_set = ["run_id", "query_step", "key_step"]
    siblings = keys.loc[keys["kind"] == "sibling", [*same_set, "row"]]
    pairs = units[[*same_set, "unit"]].merge(siblings, on=same_set)
    return _matrix(pairs["unit"], pairs["row"], n_entries)


def _averages(groups: np.ndarray, columns: np.ndarray, n_groups: int, n_columns: int) -> csr_array:
    """Sparse [n_groups, n_columns], each row the mean over its columns, or empty."""
    counts = np.bincount(groups, minlength=n_groups)
    weights = 1 / counts[groups]
    return csr_array((weights, (groups, columns)), shape=(n_groups, n_columns))


def _measure(
    outcome: Callable[[np.ndarray], np.ndarray],
    units: DataFrame,
    pairs: DataFrame,
    adjustments: list[Adjustment],
    keys: DataFrame,
    received: np.ndarray,
) -> Measured:
    n_units, (n_entries, n_layers, n_heads) = len(units), received.shape
    labels = ["run_id", "prompt_id", "category", "condition"]
    everything = units.assign(cell_size=ALL)
    by_size = units.assign(cell_size=units["set_size"])
    placed = pd.concat([everything, by_size], ignore_index=True)
    matched = placed["unit"].isin(pairs["unit"]).to_numpy()
    grouped = placed.assign(matched=matched).groupby([*labels, "cell_size"], sort=False)
    cell = grouped.ngroup().to_numpy()
    cells = grouped.agg(units=("unit", "size"), matched=("matched", "sum")).reset_index()
    cells = cells.rename(columns={"cell_size": "set_size"})
    n_cells = len(cells)

    unit = placed["unit"].to_numpy()
    over_all = _averages(cell, unit, n_cells, n_units)
    over_matched = _averages(cell[matched], unit[matched], n_cells, n_units)
    to_controls = csr_array(
        (pairs["weight"].to_numpy(), (pairs["unit"].to_numpy(), pairs["row"].to_numpy())),
        shape=(n_units, n_entries),
    )
    # For each run all keys but siblings, of the queries that saw siblings.
    seen = units[["run_id", "query_step"]].drop_duplicates()
    others = keys[keys["kind"] != "sibling"].merge(seen, on=["run_id", "query_step"])
    runs = pd.Index(cells["run_id"].unique())
    over_others = _averages(
        runs.get_indexer(others["run_id"]), others["row"].to_numpy(), len(runs), n_entries
    )
    run_of_cell = runs.get_indexer(cells["run_id"])

    shape = (n_cells, n_layers, n_heads)
    siblings, controls, naive = (np.full(shape, np.nan) for _ in range(3))
    unit_sums = np.zeros((2, n_units))
    # A layer at a time: sums are in double precision, and captures may be large.
    for layer in range(n_layers):
        row = received[:, layer].astype(np.float64)
        found, expected = outcome(row), to_controls @ row
        for adjustment in adjustments:
            along = adjustment.slopes @ row[adjustment.singles]
            expected[adjustment.units] += adjustment.left @ along
        siblings[:, layer] = over_matched @ found
        controls[:, layer] = over_matched @ expected
        naive[:, layer] = over_all @ found - (over_others @ row)[run_of_cell]
        unit_sums += found.mean(axis=1), expected.mean(axis=1)
    empty = (cells["matched"] == 0).to_numpy()
    siblings[empty] = controls[empty] = np.nan
    lonely = ~units["unit"].isin(pairs["unit"]).to_numpy()
    unit_sums[:, lonely] = np.nan
    columns = [*labels, "query_step", "key_step", "distance", "set_size"]
    described = units[columns].assign(
        siblings=unit_sums[0] / n_layers, controls=unit_sums[1] / n_layers
    )
    return Measured(cells, described, siblings, controls, naive)


def _first_token(keys: DataFrame, received: np.ndarray) -> DataFrame:
    """Attention to the prompt's first token, by run and layer."""
    first = keys[keys["is_first"].astype(bool)]
    per_head = received[first["row"].to_numpy()]
    attention = DataFrame(per_head.mean(axis=2, dtype=np.float64))
    by_run = attention.groupby([first["run_id"].to_numpy(), first["condition"].to_numpy()]).mean()
    by_run.index.names = ["run_id", "condition"]
    return by_run.reset_index().melt(
        ["run_id", "condition"], var_name="layer", value_name="attention"
    )
