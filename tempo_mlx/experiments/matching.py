"""Matching: which single tokens are the controls of the tokens of parallel sets.

Attention pools in the first token and decays with distance. So a token of a set is compared only
with single tokens at the same distance from their query, and never with the prompt.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
from pandas import DataFrame
from scipy.special import logit
from statsmodels.stats.weightstats import DescrStatsW  # type: ignore[import-untyped]

from ..arguments import check_choice, check_count, check_range
from .tables import Tables

#: Where controls are searched, in this order, and the columns that unit and control share there.
#: Never in other prompts: they are the replicates, and shared controls would make them dependent.
SCOPES = {"run": ["run_id"], "prompt": ["prompt_id", "condition"]}

#: Probabilities are clipped to this distance from 0 and 1, whose logits are infinite.
NEAREST = 1e-6

#: Candidate pairs in memory at once.
PAIRS_AT_ONCE = 4_000_000

#: Covariates that matching may leave different, and that adjustment corrects for.
ADJUSTED = ["logit", "query_step", "n_keys"]
COVARIATES = ("distance", *ADJUSTED)

#: Largest caliper; no two logits in fp32 differ by more.
MOST_LOGITS = 1e39

#: How remaining differences are adjusted for.
ADJUSTMENTS = ("linear", "none")
#: Fewest single tokens for each coefficient of the adjustment.
ROWS_EACH = 10


@dataclass(frozen=True)
class Rules:
    """How similar a control must be. Its distance is always the same.

    All single tokens that qualify are controls with equal weights, each for any number of units
    (radius matching with replacement, Dehejia and Wahba 2002).

    Args:
        caliper: largest difference between the logits of the two probabilities, above 0. With 0.5
            the odds differ by a factor of up to 1.65. None for any.
        window: largest difference between the two query steps, at least 0. More keys share the
            attention at later steps. 0 finds controls in other runs only. None for any.
        adjustment: "linear" moves the attention of controls to the unit's logit, query step and
            number of keys, along slopes fitted to all single tokens of the condition (matching
            with bias correction, Abadie and Imbens 2011). "none" leaves it.
    """

    caliper: float | None = 0.5
    window: int | None = 3
    adjustment: str = "linear"

    def __post_init__(self) -> None:
        if self.caliper is not None:
            check_range("caliper", self.caliper, 0, MOST_LOGITS, True, "above 0, ")
        if self.window is not None:
            check_count("window", self.window, 0)
        check_choice("adjustment", self.adjustment, ADJUSTMENTS)


def keys_of(tables: Tables) -> DataFrame:
    """Every key that a query of a later step can see.

    Returns:
        One row for each key and query: row (of ``tables.received``), run_id, prompt_id,
        category, condition, query_step, key_step, distance, set_size, probability, logit, is_first,
        n_keys (keys that the query can see, without those of its own step) and kind:
        "prompt", "single" (generated, alone in its set) or "sibling" (generated, not alone).
    """
    entries = tables.entries.assign(row=np.arange(len(tables.entries)))
    entries = entries[entries["key_step"] < entries["query_step"]]
    tokens = tables.tokens[["run_id", "slot", "pruned_at"]]
    entries = entries.merge(tokens, on=["run_id", "slot"], how="left", validate="many_to_one")
    # Later steps do not see a pruned token.
    pruned_at = entries["pruned_at"].astype("Float64").to_numpy(float, na_value=np.inf)
    entries = entries[pruned_at >= entries["query_step"]].drop(columns="pruned_at")
    runs = tables.runs[["run_id", "prompt_id", "category", "condition"]]
    keys = entries.merge(runs, on="run_id", validate="many_to_one").reset_index(drop=True)
    prompt, several = keys["is_prompt"].to_numpy(bool), keys["set_size"].to_numpy() > 1
    keys["kind"] = np.select([prompt, several], ["prompt", "sibling"], "single")
    keys["logit"] = _logit(keys["probability"])
    keys["n_keys"] = keys.groupby(["run_id", "query_step"])["row"].transform("size")
    return keys


def _logit(probability: pd.Series) -> np.ndarray:
    return cast(np.ndarray, logit(np.clip(probability.to_numpy(float), NEAREST, 1 - NEAREST)))


def sibling_tokens(keys: DataFrame) -> DataFrame:
    """The units of comparisons by token: siblings that a later query can see, numbered."""
    siblings = keys[keys["kind"] == "sibling"].reset_index(drop=True)
    return siblings.assign(unit=np.arange(len(siblings)))


def sibling_sets(keys: DataFrame) -> DataFrame:
    """The units of comparisons by set: live members together, with their total probability."""
    columns = ["run_id", "query_step", "key_step"]
    shared = ["prompt_id", "category", "condition", "distance", "set_size", "n_keys"]
    siblings = keys[keys["kind"] == "sibling"]
    sets = siblings.groupby(columns, sort=False, as_index=False).agg(
        {**dict.fromkeys(shared, "first"), "probability": "sum"}
    )
    # Rounding, and visibilities in which each branch has its own distribution.
    sets["probability"] = sets["probability"].clip(upper=1.0)
    return sets.assign(logit=_logit(sets["probability"]), unit=np.arange(len(sets)))


def match(units: DataFrame, keys: DataFrame, rules: Rules) -> DataFrame:
    """All controls of each unit: in its run, or if it has none there, in its prompt's other runs.

    Args:
        units: of :func:`sibling_tokens` or :func:`sibling_sets`.
        keys: of :func:`keys_of`; its single tokens are the candidates.
        rules: of matching.

    Returns:
        One row for each pair: unit, row (of ``received``, the control's), scope ("run" or
        "prompt"), weight (one over the unit's controls).
    """
    singles = keys[keys["kind"] == "single"]
    found, unmatched = [], units
    for scope, columns in SCOPES.items():
        pairs = _pairs(unmatched, singles, [*columns, "distance"], rules).assign(scope=scope)
        found.append(pairs)
        unmatched = unmatched[~unmatched["unit"].isin(pairs["unit"])]
    pairs = pd.concat(found, ignore_index=True)
    return pairs.assign(weight=1 / pairs.groupby("unit")["row"].transform("size"))


def _pairs(units: DataFrame, singles: DataFrame, columns: list[str], rules: Rules) -> DataFrame:
    """Units and single tokens that agree in the columns and satisfy the rules."""
    # The same number on both sides for each combination of the columns.
    both = pd.concat([units[columns], singles[columns]])
    group = both.groupby(columns, sort=False).ngroup().to_numpy()
    compared = ["group", "logit", "query_step"]
    left = units.assign(group=group[: len(units)])[[*compared, "unit"]]
    right = singles.assign(group=group[len(units) :])[[*compared, "row"]]
    sizes = [np.bincount(side["group"], minlength=len(both)) for side in (left, right)]
    part = np.cumsum(sizes[0] * sizes[1]) // PAIRS_AT_ONCE
    found = []
    for number in np.unique(part[group]) if len(both) else []:
        pairs = left[part[left["group"]] == number].merge(
            right[part[right["group"]] == number], on="group", suffixes=("", "_control")
        )
        alike = np.ones(len(pairs), bool)
        if rules.caliper is not None:
            alike &= (pairs["logit"] - pairs["logit_control"]).abs() <= rules.caliper
        if rules.window is not None:
            alike &= (pairs["query_step"] - pairs["query_step_control"]).abs() <= rules.window
        found.append(pairs.loc[alike, ["unit", "row"]])
    return pd.concat(found) if found else DataFrame({"unit": [], "row": []}, dtype=int)


def count_matches(units: DataFrame, pairs: DataFrame) -> DataFrame:
    """How many units have a control, and from where, by condition and category."""
    scopes = pairs.drop_duplicates("unit").set_index("unit")["scope"]
    counted = units.assign(
        units=1,
        in_run=(units["unit"].map(scopes) == "run").astype(int),
        in_prompt=(units["unit"].map(scopes) == "prompt").astype(int),
        without=(~units["unit"].isin(pairs["unit"])).astype(int),
        pairs=units["unit"].map(pairs["unit"].value_counts()).fillna(0).astype(int),
    )
    sums = ["units", "in_run", "in_prompt", "without", "pairs"]
    counts = counted.groupby(["condition", "category"], sort=False, as_index=False)[sums].sum()
    matched = counts["units"] - counts["without"]
    counts["controls_each"] = counts.pop("pairs") / matched.where(matched > 0)
    return counts


def balance(units: DataFrame, pairs: DataFrame, keys: DataFrame) -> DataFrame:
    """How similar units and controls are, before and after matching, by condition.

    Returns:
        condition, covariate, sd, and for "before" (all units, all single tokens) and "after" (units
        with controls, their controls) the two means and their difference in units of sd: the
        standardised difference of Austin (2009), sd^2 being the mean of the two variances before
        matching. Austin calls differences below 0.1 negligible.
    """
    singles = keys[keys["kind"] == "single"].set_index("row")
    matched = pairs.merge(units[["unit", "condition"]], on="unit")
    rows = []
    for condition, mine in units.groupby("condition", sort=False):
        theirs = matched[matched["condition"] == condition]
        kept = mine[mine["unit"].isin(theirs["unit"])]
        controls = singles.loc[theirs["row"]]
        for covariate in COVARIATES:
            everyone = singles.loc[singles["condition"] == condition, covariate]
            before = [_moments(mine[covariate]), _moments(everyone)]
            weights = theirs["weight"].to_numpy()
            after = [_moments(kept[covariate]), _moments(controls[covariate], weights)]
            sd = np.sqrt((before[0].var + before[1].var) / 2)
            row: dict[str, object] = {"condition": condition, "covariate": covariate, "sd": sd}
            for when, (ours, others) in (("before", before), ("after", after)):
                row[f"units_{when}"], row[f"controls_{when}"] = ours.mean, others.mean
                difference = (ours.mean - others.mean) / sd if sd > 0 else np.nan
                row[f"difference_{when}"] = difference
            rows.append(row)
    return DataFrame(rows)


def _moments(values: pd.Series, weights: np.ndarray | None = None) -> DescrStatsW:
    """Mean and variance; NaN without values."""
    if not len(values):
        return DescrStatsW(np.array([np.nan]))
    return DescrStatsW(values.to_numpy(float), weights=weights)


def remaining_difference(units: DataFrame, pairs: DataFrame, keys: DataFrame) -> np.ndarray:
    """What matching left different.

    Returns:
        [units, 3]: the :data:`ADJUSTED` covariates of each unit minus the mean of its controls'; 0
        for units without a control.
    """
    covariates = keys.set_index("row")[ADJUSTED].loc[pairs["row"]].to_numpy(float)
    weighted = DataFrame(covariates * pairs[["weight"]].to_numpy(), columns=ADJUSTED)
    controls = weighted.groupby(pairs["unit"].to_numpy()).sum()
    left = np.zeros((len(units), len(ADJUSTED)))
    matched = controls.index.to_numpy(int)
    left[matched] = units[ADJUSTED].to_numpy(float)[matched] - controls.to_numpy()
    return left


def slopes(singles: DataFrame) -> np.ndarray | None:
    """The matrix that maps the attention of single tokens to slopes along the covariates.

    Least squares with a level for each distance.

    Args:
        singles: single tokens of one condition, [N] rows of :func:`keys_of`.

    Returns:
        [3, N]; None with fewer than :data:`ROWS_EACH` rows for each coefficient.
    """
    levels = pd.get_dummies(singles["distance"]).to_numpy(float)
    centred = singles[ADJUSTED] - singles[ADJUSTED].mean()
    design = np.hstack([levels, centred.to_numpy(float)])
    if len(design) < ROWS_EACH * design.shape[1]:
        return None
    return np.linalg.pinv(design)[-len(ADJUSTED) :]
