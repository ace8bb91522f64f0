"""Tables of means over prompts, with intervals in every cell and tests in families."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from .measures import ALL, Measurements
from .statistics import (
    MIN_BOOTSTRAP,
    MIN_PROMPTS,
    TOO_SMALL,
    bootstrap_interval,
    holm,
    influence,
    mean_tests,
    t_interval,
)

#: Factors of the cells. An empty set_size or layer, and the category "all", stand for all.
FACTORS = ["category", "set_size", "layer"]
EVERY_CATEGORY = "all"

#: Names of the groupings whose cells are tested, by the factors they split. All tests of a
#: grouping, over measures and conditions, are one family.
TESTED = {
    (): "overall",
    ("category",): "by category",
    ("set_size",): "by set size",
    ("layer",): "by layer",
}
#: The other groupings: means and intervals, no tests.
DESCRIBED = "interaction"

#: Columns of runs that are not settings of the grid.
NOT_SETTINGS = frozenset(
    ("run_id", "prompt_id", "category", "prompt", "seed", "condition")
    + ("n_steps", "n_tokens", "text", "finish_reason", "seconds")
)

#: Values of each prompt.
VALUES = ("siblings", "controls", "effect", "naive")


def each(table: DataFrame) -> Iterator[Any]:
    """The rows, with columns as attributes."""
    return table.itertuples(index=False)


def by_prompt(measurements: Measurements) -> DataFrame:
    """One row for each measure, prompt, condition, set size and layer: means over runs and heads.

    Runs that differ in the seed alone count equally within their prompt.

    Returns:
        measure, category, prompt_id, condition, set_size, layer, runs, units, matched, siblings,
        controls, effect (siblings - controls), naive; NaN where there is no unit, or no control.
    """
    parts = []
    for name, measured in measurements.measured.items():
        arrays = {
            "siblings": measured.siblings,
            "controls": measured.controls,
            "effect": measured.effect,
            "naive": measured.naive,
        }
        n_layers = measured.naive.shape[1]
        for layer in (None, *range(n_layers)):
            values = {
                value: array.mean(axis=(1, 2)) if layer is None else array[:, layer].mean(axis=1)
                for value, array in arrays.items()
            }
            parts.append(measured.cells.assign(measure=name, layer=layer, **values))
    rows = pd.concat([part.astype({"layer": "Int64"}) for part in parts], ignore_index=True)
    rows["set_size"] = rows["set_size"].astype("Int64").mask(rows["set_size"] == ALL)
    keys = ["measure", "category", "prompt_id", "condition", "set_size", "layer"]
    # The totals come first.
    rows = rows.sort_values(["set_size", "layer"], na_position="first", kind="stable")
    grouped = rows.groupby(keys, sort=False, dropna=False)
    return grouped.agg(
        runs=("run_id", "size"),
        units=("units", "sum"),
        matched=("matched", "sum"),
        **{value: (value, "mean") for value in VALUES},
    ).reset_index()


def by_head(measurements: Measurements) -> DataFrame:
    """Siblings, controls and effect by measure, condition, layer and head: means over the prompts.

    The column prompts counts them. Heads of one model are not replicates, so nothing is tested.
    """
    parts = []
    for name, measured in measurements.measured.items():
        used = (measured.cells["set_size"] == ALL) & (measured.cells["matched"] > 0)
        cells = measured.cells[used].reset_index(drop=True)
        _, n_layers, n_heads = measured.naive.shape
        layers, heads = np.divmod(np.arange(n_layers * n_heads), n_heads)
        prompts = {
            value: DataFrame(array[used.to_numpy()].reshape(len(cells), n_layers * n_heads))
            .groupby([cells["condition"], cells["prompt_id"]], sort=False)
            .mean()
            for value, array in (("siblings", measured.siblings), ("controls", measured.controls))
        }
        means = {
            value: rows.groupby("condition", sort=False).mean() for value, rows in prompts.items()
        }
        counts = prompts["siblings"].groupby("condition", sort=False).size()
        for condition, count in zip(map(str, counts.index), counts, strict=True):
            siblings, controls = (means[value].loc[condition].to_numpy() for value in means)
            part = DataFrame({"layer": layers, "head": heads, "siblings": siblings})
            part = part.assign(controls=controls, effect=siblings - controls, prompts=count)
            parts.append(part.assign(measure=name, condition=condition))
    columns = ["measure", "condition", "layer", "head", "siblings", "controls", "effect", "prompts"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else DataFrame(columns=columns)


def condition_pairs(runs: DataFrame) -> list[tuple[str, str]]:
    """Pairs of conditions that differ in one setting, in the order of the runs."""
    settings = [column for column in runs.columns if column not in NOT_SETTINGS]
    conditions = runs.drop_duplicates("condition").set_index("condition")[settings].astype(str)
    return [
        (first, second)
        for first, second in combinations(conditions.index, 2)
        if (conditions.loc[first] != conditions.loc[second]).sum() == 1
    ]


def condition_differences(prompts: DataFrame, pairs: list[tuple[str, str]]) -> DataFrame:
    """Effect in the second condition minus effect in the first, for prompts that have both.

    Args:
        prompts: of :func:`by_prompt`.
        pairs: of conditions.

    Returns:
        measure, category, prompt_id, set_size, layer, condition_a, condition_b, effect_a, effect_b,
        effect (b - a).
    """
    keys = ["measure", "category", "prompt_id", "set_size", "layer"]
    kept = prompts.loc[prompts["effect"].notna(), [*keys, "condition", "effect"]]
    parts = []
    for first, second in pairs:
        both = kept[kept["condition"] == first].merge(
            kept[kept["condition"] == second], on=keys, suffixes=("_a", "_b"), validate="one_to_one"
        )
        parts.append(both.assign(effect=both["effect_b"] - both["effect_a"]))
    columns = [*keys, "condition_a", "condition_b", "effect_a", "effect_b", "effect"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else DataFrame(columns=columns)


def summarise(
    rows: DataFrame, by: list[str], beside: list[str], resamples: int, seed: int
) -> DataFrame:
    """Mean effect over prompts in every cell of the factors and their margins, with tests.

    Args:
        rows: one for each prompt in each cell: ``by``, category, prompt_id, set_size, layer,
            effect, and the columns in ``beside``.
        by: further columns of the cells: measure and condition, or measure and two conditions.
        beside: columns whose means are given too; "naive" with an interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One row a cell: ``by``, category, set_size, layer, grouping, n (prompts), mean, sd, variance
        (between prompts), low, high (t-interval), the means in ``beside``, and for the groupings in
        :data:`TESTED` boot_low, boot_high, the tests of :func:`~.statistics.mean_tests`, p_t_holm,
        p_w_holm and tests (with a p-value, in the family).
    """
    keys = [*by, *FACTORS]
    margins = pd.concat([rows.assign(category=EVERY_CATEGORY), rows], ignore_index=True)
    grouped = margins.groupby(keys, sort=False, dropna=False)
    cells = grouped.agg(
        n=("effect", "count"),
        mean=("effect", "mean"),
        sd=("effect", "std"),
        variance=("effect", "var"),
        **{name: (name, "mean") for name in beside},
    )
    cells["low"], cells["high"] = t_interval(cells["n"], cells["mean"], cells["sd"])
    if "naive" in beside:
        naive = grouped["naive"].agg(["count", "std"])
        bounds = t_interval(naive["count"], cells["naive"], naive["std"])
        cells["naive_low"], cells["naive_high"] = bounds
    cells = cells.reset_index()
    cells["grouping"] = _groupings(cells)
    cells["note"] = np.where(cells["n"] < MIN_PROMPTS, TOO_SMALL, "")
    members = grouped.ngroup().to_numpy()
    effects = margins["effect"].to_numpy(float)
    tested = []
    rng = np.random.default_rng(seed)
    for cell in np.flatnonzero(cells["grouping"] != DESCRIBED):
        # Cells are numbered in the order in which they appear, as groups are.
        values = effects[members == cell]
        values = values[~np.isnan(values)]
        result = mean_tests(values)
        if len(values) >= MIN_BOOTSTRAP:
            low, high = bootstrap_interval(values, resamples, rng)
            result |= {"boot_low": float(low), "boot_high": float(high)}
        tested.append({"cell": cell, **result})
    columns = ["cell", *mean_tests([])]
    tests = DataFrame(tested, columns=[*columns, "boot_low", "boot_high"]).set_index("cell")
    notes = tests.pop("note")
    del tests["n"]
    for column in tests.columns:
        cells[column] = tests[column].astype(float)
    cells.loc[notes.index, "note"] = notes
    for p in ("p_t", "p_w"):
        cells[f"{p}_holm"] = np.nan
        for _, family in cells[cells["grouping"] != DESCRIBED].groupby("grouping"):
            cells.loc[family.index, f"{p}_holm"] = holm(family[p])
    sizes = cells.groupby("grouping")["p_t"].transform("count")
    cells["tests"] = sizes.where(cells["grouping"] != DESCRIBED).astype("Int64")
    return cells


def _groupings(cells: DataFrame) -> list[str]:
    split = DataFrame(
        {
            "category": cells["category"] != EVERY_CATEGORY,
            "set_size": cells["set_size"].notna(),
            "layer": cells["layer"].notna(),
        }
    ).to_numpy(bool)
    return [
        TESTED.get(
            tuple(name for name, on in zip(FACTORS, row, strict=True) if on),
            DESCRIBED,
        )
        for row in split
    ]


def overall(rows: DataFrame) -> DataFrame:
    """The rows of all set sizes and all layers together that have an effect."""
    return rows[rows["set_size"].isna() & rows["layer"].isna() & rows["effect"].notna()]


def influences(rows: DataFrame, by: list[str]) -> DataFrame:
    """Outliers and leave-one-out influence of the prompts, over all layers and set sizes."""
    compared = overall(rows)
    groups: list[tuple[Any, DataFrame]] = list(compared.groupby(by, sort=False))
    parts = []
    # An empty table has the same columns.
    for labels, group in groups or [((None,) * len(by), compared)]:
        named: dict[str, Any] = dict(zip(by, labels, strict=True))
        values = group.set_index("prompt_id")["effect"].astype(float)
        parts.append(influence(values).reset_index().assign(**named))
    found = pd.concat(parts, ignore_index=True)
    flags = {"outlier": "boolean", "influential": "boolean"}
    return found[[*by, *found.columns.drop(by)]].astype(flags)


def over_prompts(rows: DataFrame, by: list[str], values: list[str]) -> DataFrame:
    """Means over prompts with t-intervals, of rows that may have several for each prompt.

    Returns:
        ``by``, n (prompts), and each value with its name_low and name_high.
    """
    prompts = rows.groupby([*by, "prompt_id"], sort=False)[values].mean()
    grouped = prompts.groupby(by, sort=False)
    found = DataFrame({"n": grouped.size()})
    for value in values:
        described = grouped[value].agg(["count", "mean", "std"])
        found[value] = described["mean"]
        bounds = t_interval(described["count"], described["mean"], described["std"])
        found[f"{value}_low"], found[f"{value}_high"] = bounds
    return found.reset_index()
