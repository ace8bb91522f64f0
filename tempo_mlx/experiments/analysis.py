"""The analysis of a suite: computed from its tables, saved as files."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from ..arguments import check_count, check_seed
from ..errors import TempoError
from ..io.files import write_atomically
from .matching import Rules, keys_of
from .measures import ALL, MEASURES, Measured, Measurements, measure
from .mixed_model import FIT, condition_model, observations, seed_model, sibling_model
from .statistics import CONFIDENCE, MIN_BOOTSTRAP, MIN_PROMPTS, MIN_WILCOXON, clustered_mean
from .store import done_runs
from .summary import (
    EVERY_CATEGORY,
    TESTED,
    by_head,
    by_prompt,
    condition_differences,
    condition_pairs,
    each,
    influences,
    over_prompts,
    overall,
    summarise,
)
from .table_checks import check_tables
from .tables import Tables

#: Version of the files.
SCHEMA = 2

#: Where the files are in a suite's folder.
FOLDER, INFO = "analysis", "analysis.json"
CSV, PARQUET = ".csv", ".parquet"
#: The tables and their contents. An empty set size or layer stands for all.
CONTENTS = {
    "runs": "the runs that were analysed",
    "matches": "how many siblings and sets have controls, by condition and category",
    "balance": "how similar siblings and controls are, before and after matching",
    "effects": "siblings minus controls, and the naive difference, by category, set size and layer",
    "contrasts": "the same, one condition minus another, prompt by prompt",
    "prompts": "the values of each prompt behind these tables",
    "intervals": "the effect in each prompt, with its interval",
    "heads": "siblings and controls by layer and head",
    "distances": "attention to matched siblings and controls by distance",
    "influence": "outliers and leave-one-out influence of the prompts",
    "sensitivity": "the effect under other matching rules",
    "seeds": "how much the effect varies between seeds and between prompts",
    "models": "mixed models of the same questions",
    "kl": "divergence between the conditions' next distributions by step",
    "entropy": "entropy of attention by condition and layer",
    "first_token": "attention to the prompt's first token by condition and layer",
}
#: Tables in Parquet and CSV only.
NOT_IN_JSON = ("prompts",)

#: Rules of matching for the table of sensitivity.
OTHER_RULES = (
    Rules(0.25, 3),
    Rules(0.5, 1),
    Rules(0.5, 3),
    Rules(0.5, 3, "none"),
    Rules(0.5, None),
    Rules(1.0, 3),
    Rules(2.0, 3),
    Rules(None, 3),
    Rules(None, None),
    Rules(None, None, "none"),
)

#: Default number of bootstrap samples, and their seed.
RESAMPLES, SEED = 9999, 0

#: Most bootstrap samples.
MOST_RESAMPLES = 1_000_000


@dataclass(frozen=True)
class Analysis:
    """The results of an analysis.

    Args:
        info: schema, suite, manifest, settings of the analysis (rules, confidence, families, ...)
            and notes on the data.
        tables: by the names in :data:`CONTENTS`.
    """

    info: dict[str, Any]
    tables: dict[str, DataFrame]

    def __getitem__(self, name: str) -> DataFrame:
        return self.tables[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``info`` and the rows of the tables; missing numbers are None."""
        kept = {name: table for name, table in self.tables.items() if name not in NOT_IN_JSON}
        return {**self.info, "tables": {name: _records(table) for name, table in kept.items()}}


def analyze(
    tables: Tables, rules: Rules | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> Analysis:
    """Analyse a suite. Only prompts are replicates.

    Args:
        tables: of the done runs.
        rules: of matching.
        resamples: of each bootstrap, at least 1.
        seed: of the bootstraps, at least 0.

    Raises:
        TempoError: if a number is not finite, a column is missing, or no run has siblings that a
            later step can see.
    """
    rules = rules or Rules()
    check_count("resamples", resamples, most=MOST_RESAMPLES)
    check_seed(seed)
    check_tables(tables)
    keys = keys_of(tables)
    if not (keys["kind"] == "sibling").any():
        raise TempoError(
            "no run has a set of two or more tokens that a later step can see, so there is nothing "
            "to compare; lower the threshold or run more steps"
        )
    found = measure(tables, rules, keys)
    runs = tables.runs
    pairs = condition_pairs(runs)
    prompts = by_prompt(found)
    differences = condition_differences(prompts, pairs)
    bootstrap = {"resamples": resamples, "seed": seed}
    of_conditions = ["measure", "condition_a", "condition_b"]
    beside = ["siblings", "controls", "naive"]
    contrasts = summarise(differences, of_conditions, ["effect_a", "effect_b"], **bootstrap)
    influence = [
        influences(prompts, ["measure", "condition"]).assign(question="siblings"),
        influences(differences, of_conditions).assign(question="conditions"),
    ]
    named = runs[["run_id", "prompt_id", "condition"]]
    first = found.first.merge(runs[["run_id", "prompt_id"]], on="run_id")
    entropy = tables.entropy.merge(named, on="run_id")
    seeds = seed_sensitivity(found, tables)
    results = {
        "runs": runs.reset_index(drop=True),
        "matches": found.matches,
        "balance": found.balance,
        "effects": summarise(prompts, ["measure", "condition"], beside, **bootstrap),
        "contrasts": contrasts,
        "prompts": prompts,
        "intervals": prompt_intervals(found, runs),
        "heads": by_head(found),
        "distances": distances(found.measured["token"]),
        "influence": pd.concat(influence, ignore_index=True),
        "sensitivity": sensitivity(tables, keys, rules, pairs),
        "seeds": seeds,
        "models": models(observations(keys, tables.received), pairs),
        "kl": over_prompts(tables.kl, ["condition_a", "condition_b", "step"], ["kl_ab", "kl_ba"]),
        "entropy": over_prompts(entropy, ["condition", "layer"], ["entropy"]),
        "first_token": over_prompts(first, ["condition", "layer"], ["attention"]),
    }
    info = {
        "schema": SCHEMA,
        "suite": tables.suite,
        "manifest": tables.manifest,
        "rules": asdict(rules),
        "bootstrap": bootstrap,
        "confidence": CONFIDENCE,
        "fewest_prompts": {
            "interval": MIN_PROMPTS,
            "bootstrap": MIN_BOOTSTRAP,
            "wilcoxon": MIN_WILCOXON,
        },
        "measures": MEASURES,
        "families": list(TESTED.values()),
        "n_runs": len(runs),
        "n_prompts": int(runs["prompt_id"].nunique()),
        "conditions": list(runs["condition"].unique()),
        "condition_pairs": [list(pair) for pair in pairs],
        "notes": notes(found, tables, seeds, rules),
        "contents": CONTENTS,
    }
    return Analysis(info, results)


def prompt_intervals(found: Measurements, runs: DataFrame) -> DataFrame:
    """The effect in each prompt, with an interval over what varies within the prompt.

    That is its runs, if there are at least three (seeds), else its parallel sets. The interval
    describes the prompt. Only intervals over prompts say what holds beyond them.

    Returns:
        measure, category, prompt_id, prompt, condition, effect, low, high, n (runs or sets that the
        interval is over), over ("runs" or "sets").
    """
    texts = runs.drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    rows = []
    for name, measured in found.measured.items():
        units = measured.units[measured.units["controls"].notna()]
        for labels, mine in units.groupby(["category", "prompt_id", "condition"], sort=False):
            category, prompt, condition = map(str, labels)
            several = mine["run_id"].nunique() >= MIN_PROMPTS
            clusters = ["run_id"] if several else ["run_id", "key_step"]
            # Every run counts equally.
            weights = 1 / mine.groupby("run_id")["siblings"].transform("size")
            effect, low, high, n = clustered_mean(
                (mine["siblings"] - mine["controls"]).to_numpy(),
                mine.groupby(clusters).ngroup().to_numpy(),
                weights.to_numpy(),
            )
            over = "runs" if several else "sets"
            rows.append(
                (name, category, prompt, texts[prompt], condition, effect, low, high, n, over)
            )
    columns = ["measure", "category", "prompt_id", "prompt", "condition"]
    return DataFrame(rows, columns=[*columns, "effect", "low", "high", "n", "over"])


def distances(measured: Measured) -> DataFrame:
    """Attention to matched units and their controls by distance: means over prompts."""
    matched = measured.units[measured.units["controls"].notna()]
    by = ["condition", "distance"]
    found = over_prompts(matched, by, ["siblings", "controls"])
    counts = matched.groupby(by, as_index=False).size().rename(columns={"size": "units"})
    return found.merge(counts, on=by).sort_values(by, ignore_index=True)


def sensitivity(
    tables: Tables, keys: DataFrame, rules: Rules, pairs: list[tuple[str, str]]
) -> DataFrame:
    """The overall effect by token and by set under other matching rules.

    Returns:
        caliper, window (empty: any), adjustment, chosen (the rules of this analysis), measure,
        condition (or "second - first" of a pair), n, effect, effect_low, effect_high, without
        (share of a condition's units that found no control).
    """
    # These measures are linear, so the mean over layers and heads can be taken first.
    mean = tables.received.mean(axis=(1, 2), dtype=np.float64)
    flat = replace(tables, received=mean[:, None, None])
    by = ["measure", "condition"]
    parts = []
    for other in dict.fromkeys([*OTHER_RULES, rules]):
        rows = by_prompt(measure(flat, other, keys))
        rows = rows[(rows["measure"] != "alone") & rows["set_size"].isna() & rows["layer"].isna()]
        both = condition_differences(rows, pairs)
        both["condition"] = (
            both["condition_b"].astype(str) + " - " + both["condition_a"].astype(str)
        )
        known = pd.concat([overall(rows)[[*by, "prompt_id", "effect"]], both], join="inner")
        sums = rows.groupby(by, sort=False)[["units", "matched"]].sum()
        without = (1 - sums["matched"] / sums["units"]).rename("without").reset_index()
        found = without.merge(over_prompts(known, by, ["effect"]), on=by, how="outer")
        found["n"] = found["n"].fillna(0).astype(int)
        parts.append(found.assign(**asdict(other), chosen=other == rules))
    table = pd.concat(
        [part.astype({"caliper": "Float64", "window": "Int64"}) for part in parts],
        ignore_index=True,
    )
    columns = ["caliper", "window", "adjustment", "chosen", "measure", "condition", "n", "effect"]
    return table[[*columns, "effect_low", "effect_high", "without"]]


def seed_sensitivity(found: Measurements, tables: Tables) -> DataFrame:
    """How much of the effect's variance lies between seeds of one prompt.

    Returns:
        measure, condition, prompts, runs, distinct (different texts or sets within their prompt),
        sd_seeds, sd_prompts, icc (share of the variance between prompts, ICC(1) of Shrout and
        Fleiss 1979, from the mixed model's components), converged, note.
    """
    tokens = tables.tokens.sort_values(["run_id", "step", "slot"])
    contents = tokens.groupby("run_id")["id"].agg(tuple)
    rows = []
    for name, measured in found.measured.items():
        cells = measured.cells.assign(effect=measured.effect.mean(axis=(1, 2)))
        used = cells[(cells["set_size"] == ALL) & cells["effect"].notna()]
        for condition, mine in used.groupby("condition", sort=False):
            texts = mine.assign(content=mine["run_id"].map(contents))
            distinct = len(texts.drop_duplicates(["prompt_id", "content"]))
            row: dict[str, Any] = {"measure": name, "condition": condition}
            row |= {"prompts": mine["prompt_id"].nunique(), "runs": len(mine)}
            row |= {"distinct": distinct, "sd_seeds": None, "sd_prompts": None, "icc": None}
            if len(mine) == row["prompts"]:
                note = "one run for each prompt: only the prompt varies"
                rows.append(row | {"converged": None, "note": note})
                continue
            model = seed_model(mine[["prompt_id", "effect"]])
            if model["var_residual"] is not None:
                within, between = model["var_residual"], model["var_prompt"]
                row |= {"sd_seeds": within**0.5, "sd_prompts": between**0.5}
                row["icc"] = between / (between + within) if between + within > 0 else None
            rows.append(row | {"converged": model["converged"], "note": model["note"]})
    columns = ["measure", "condition", "prompts", "runs", "distinct"]
    numbers = dict.fromkeys(("sd_seeds", "sd_prompts", "icc"), float)
    table = DataFrame(rows, columns=[*columns, *numbers, "converged", "note"])
    return table.astype({**numbers, "converged": "boolean"})


def models(seen: DataFrame, pairs: list[tuple[str, str]]) -> DataFrame:
    """Mixed models of siblings' attention in each condition, and of the difference between two."""
    by_condition = dict(list(seen.groupby("condition", sort=False)))
    rows = [
        {"question": "siblings", "condition": condition, **sibling_model(mine)}
        for condition, mine in by_condition.items()
    ]
    rows += [
        {"question": "conditions", "condition": f"{second} - {first}", **model}
        for first, second in pairs
        if first in by_condition and second in by_condition
        for model in [condition_model(by_condition[first], by_condition[second])]
    ]
    numbers = ["estimate", "low", "high", "p", "var_prompt", "var_sibling", "var_residual"]
    return DataFrame(rows, columns=["question", "condition", *FIT]).astype(
        dict.fromkeys(numbers, float)
    )


def notes(found: Measurements, tables: Tables, seeds: DataFrame, rules: Rules) -> list[str]:
    """Notes for the reader of the results."""
    said = []
    runs = tables.runs
    if runs["seed"].isna().all():
        said.append(
            "Selection was deterministic, so seeds have no effect: each configuration ran once."
        )
    of_tokens = seeds[seeds["measure"] == "token"]
    for row in each(of_tokens):
        if row.distinct < row.runs:
            said.append(
                f"{row.condition}: {row.runs} runs of {row.prompts} prompts, {row.distinct} of "
                "them different; runs are averaged within their prompt, so copies are no evidence."
            )
    measured = found.measured["token"]
    cells = measured.cells[measured.cells["set_size"] == ALL]
    for condition, mine in runs.groupby("condition", sort=False):
        prompts = set(mine["prompt_id"])
        here = cells[cells["condition"] == condition]
        with_units = set(here["prompt_id"])
        with_controls = set(here.loc[here["matched"] > 0, "prompt_id"])
        for what, missing in (
            ("no set of several tokens that a later step can see", prompts - with_units),
            ("siblings, but none with a matched control", with_units - with_controls),
        ):
            if missing:
                names = ", ".join(sorted(missing))
                said.append(
                    f"{condition}: {len(missing)} of {len(prompts)} prompts have {what}: {names}"
                )
        mine_units = measured.units[measured.units["condition"] == condition]
        if len(mine_units) and not mine_units["siblings"].fillna(0).any():
            said.append(
                f"{condition}: siblings got no attention at all; where later steps cannot see "
                "them, the difference says nothing about the model."
            )
        if rules.adjustment != "none" and condition not in found.adjusted:
            said.append(
                f"{condition}: too few single tokens to fit slopes; controls are not adjusted."
            )
    everyone = set(runs["prompt_id"])
    for condition, mine in runs.groupby("condition", sort=False):
        lacking = everyone - set(mine["prompt_id"])
        if lacking:
            names = ", ".join(sorted(lacking))
            said.append(f"{condition}: no finished run of {len(lacking)} prompts: {names}")
    return said


def save(analysis: Analysis, folder: Path) -> Path:
    """Write every table as CSV and Parquet, and analysis.json last.

    Args:
        folder: of the suite's run.

    Returns:
        The folder ``analysis`` in it.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    for name, table in analysis.tables.items():
        write_atomically(target / f"{name}{CSV}", table.to_csv(index=False))
        write_atomically(target / f"{name}{PARQUET}", table.to_parquet(index=False))
    text = json.dumps(
        analysis.to_dict(), ensure_ascii=False, indent=1, allow_nan=False, default=_plain
    )
    write_atomically(target / INFO, text + "\n")
    return target


def files_of(folder: Path) -> list[Path]:
    """The files that :func:`save` writes, in this order."""
    tables = [folder / FOLDER / f"{name}{end}" for name in CONTENTS for end in (CSV, PARQUET)]
    return [*tables, folder / FOLDER / INFO]


def load_analysis(folder: Path) -> Analysis:
    """The analysis that :func:`save` wrote.

    Raises:
        TempoError: if there is none, it is of another version, or runs have finished since.
    """
    path = folder / FOLDER / INFO
    if not path.is_file():
        raise TempoError(f"{folder} has no analysis; run: tempo-mlx experiment analyze {folder}")
    info = json.loads(path.read_text(encoding="utf-8"))
    if info.get("schema") != SCHEMA:
        raise TempoError(
            f"{path} has version {info.get('schema')}, this version of tempo-mlx reads {SCHEMA}; "
            f"run again: tempo-mlx experiment analyze {folder}"
        )
    del info["tables"]
    tables = {name: pd.read_parquet(path.with_name(f"{name}{PARQUET}")) for name in CONTENTS}
    done = done_runs(folder)
    if new := done - set(tables["runs"]["run_id"]):
        raise TempoError(
            f"the analysis lacks {len(new)} of {len(done)} runs; run again: tempo-mlx "
            f"experiment analyze {folder}"
        )
    return Analysis(info, tables)


def _records(table: DataFrame) -> list[dict[Any, Any]]:
    objects = table.astype(object)
    return objects.where(table.notna(), None).to_dict("records")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


__all__ = ["EVERY_CATEGORY", "Analysis", "analyze", "load_analysis", "save"]
