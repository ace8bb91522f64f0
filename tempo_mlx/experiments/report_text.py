"""What a report says of an analysis."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pandas import DataFrame

from .analysis import Analysis
from .report_blocks import Items, Picture, Section, Table, Text, flat, interval, number, shortened
from .summary import each

LIMITS = (
    "Attention is observed, not intervened on: what a token draws is not what it does to the "
    "output.",
    "The prompts are the sample. An interval says what other prompts of the same kinds would give, "
    "as far as these were drawn like them; nothing here speaks of other models.",
    "Matching leaves out siblings without an alike single token. The effect is that of the matched "
    "ones, and the table of matches says how many they are.",
    "Siblings and controls are not at one query: single tokens at the same distance belong to "
    "other steps of the run, whose rows are shared by other numbers of keys. The table of balance "
    "says how far apart they are; the adjustment for it is linear.",
    "What siblings give each other within their step has no control at the same distance, and is "
    "not part of any number here.",
    "Runs of two conditions choose their own tokens: after step 0 their sets may differ, and so "
    "may what the divergences and the paired differences compare.",
    "Where each branch sees one token of a set only (visibilities tree and recombined), means over "
    "a step's queries include those that cannot see the token.",
    "Layers and heads of one model are no independent samples. They are described; tests by layer "
    "are one family.",
    "Seeds of one prompt are averaged within it. Runs of deterministic selection that differ in "
    "their seed alone would be copies.",
)


def sections(analysis: Analysis) -> list[Section]:
    """The whole report."""
    return [
        _what_was_run(analysis),
        _how_compared(analysis),
        _siblings(analysis),
        _parts(analysis),
        _conditions(analysis),
        _checks(analysis),
        _distributions(analysis),
        Section("Limits", [Items([*analysis.info["notes"], *LIMITS])]),
        _files(analysis),
    ]


def _what_was_run(analysis: Analysis) -> Section:
    info, runs = analysis.info, analysis["runs"]
    seeds = runs["seed"].nunique()
    blocks: list[Table | Picture | Text | Items] = [
        Text(
            f"{info['n_runs']} runs of {info['n_prompts']} prompts in "
            f"{runs['category'].nunique()} categories, in {len(info['conditions'])} conditions "
            f"({'; '.join(info['conditions'])}), with "
            + (f"{seeds} seeds." if seeds else "deterministic selection and no seeds.")
        ),
        Table(["what", "value"], flat(info["manifest"]), "What it was run on"),
        Table(["setting", "value"], flat(info["suite"], leave_out=("prompts",)), "The suite"),
    ]
    prompts = runs.drop_duplicates("prompt_id")
    rows = [[row.prompt_id, row.category, row.prompt] for row in each(prompts)]
    blocks.append(shortened(["id", "category", "prompt"], rows, "Prompts"))
    by_condition = runs.groupby("condition", sort=False)
    rows = []
    for condition, mine in by_condition:
        steps, tokens = mine["n_steps"].sum(), mine["n_tokens"].sum()
        width = tokens / steps if steps else None
        rows.append([str(condition), str(len(mine)), str(steps), str(tokens), number(width)])
    columns = ["condition", "runs", "steps", "tokens in sets", "tokens per step"]
    blocks.append(Table(columns, rows, "Runs"))
    texts = [[row.prompt, row.condition, _seed(row.seed), str(row.text)] for row in each(runs)]
    blocks.append(shortened(["prompt", "condition", "seed", "best path"], texts, "Texts"))
    return Section("What was run", blocks)


def _how_compared(analysis: Analysis) -> Section:
    info = analysis.info
    rules = info["rules"]
    caliper, window = rules["caliper"], rules["window"]
    alike = [
        "any probability" if caliper is None else f"logits of the probability within {caliper:g}",
        "any query step" if window is None else f"query steps within {window}",
    ]
    matches = [
        [
            row.of,
            row.condition,
            row.category,
            str(row.units),
            str(row.in_run),
            str(row.in_prompt),
            str(row.without),
            number(row.controls_each),
        ]
        for row in each(analysis["matches"])
    ]
    head = [
        "of",
        "condition",
        "category",
        "siblings",
        "matched in run",
        "in prompt",
        "without",
        "controls each",
    ]
    balance = [
        [
            row.of,
            row.condition,
            str(row.covariate).replace("_", " "),
            number(row.units_before),
            number(row.controls_before),
            number(row.difference_before, True),
            number(row.units_after),
            number(row.controls_after),
            number(row.difference_after, True),
        ]
        for row in each(analysis["balance"])
    ]
    columns = ["of", "condition", "", "siblings", "singles", "difference"]
    columns += ["matched siblings", "controls", "difference"]
    return Section(
        "Who is compared with whom",
        [
            Text(
                "A sibling is a generated token whose set has two tokens or more, seen by a query "
                "of a later step. Its controls are the generated tokens that stand alone in their "
                f"set, at the same distance from their query, {' and '.join(alike)}: in the same "
                "run, or if there are none in other runs of the same prompt and condition; never "
                "in other prompts. All that qualify count equally, and one may serve several "
                "siblings. The prompt, with the first token in which attention pools, is never a "
                "control."
            ),
            Text(_adjustment(rules["adjustment"])),
            Text("A query's attention sums to one, so three measures answer three questions:"),
            Items([f"{name}: {what}" for name, what in info["measures"].items()]),
            Text(
                "Values are means over heads, layers (where none is named), siblings and runs, "
                "down to one for each prompt and condition. Only prompts are replicates: every "
                "interval and test is over prompts. Attention is a fraction of a query's whole."
            ),
            Table(head, matches, "Siblings (tokens) and sets with and without controls"),
            Table(
                columns,
                balance,
                "Before and after matching: means, and their difference in standard deviations "
                "before matching (below 0.1 is taken for negligible, Austin 2009); n keys: keys "
                "that share the query's attention",
            ),
        ],
    )


def _adjustment(name: str) -> str:
    if name == "none":
        return "What matching left different, as the table of balance has it, is not adjusted for."
    return (
        "What matching left different is adjusted for: what the controls draw is moved to their "
        "sibling's logit of the probability, query step and number of keys, along slopes fitted "
        "to all single tokens of the condition with a level for each distance (least squares, "
        "a layer and head at a time; matching with bias correction, Abadie and Imbens 2011). The "
        "slopes' own error is not in the intervals."
    )


def _effect_rows(cells: DataFrame, *names: str) -> list[list[str]]:
    rows = []
    for cell in cells.to_dict("records"):
        rows.append(
            [
                *(_label(cell[name]) for name in names),
                str(cell["n"]),
                number(cell["naive"], True),
                interval(cell["naive_low"], cell["naive_high"]),
                number(cell["mean"], True),
                interval(cell["low"], cell["high"], _few(cell)),
                interval(cell["boot_low"], cell["boot_high"]),
                number(cell["variance"]),
                *_tests(cell),
            ]
        )
    return rows


EFFECT_COLUMNS = [
    "n",
    "naive",
    "95%",
    "controlled",
    "95% (t)",
    "95% (bootstrap)",
    "variance",
    "d_z",
    "p (t)",
    "p (Wilcoxon)",
]


def _tests(cell: Mapping[Any, Any]) -> list[str]:
    d_z = number(cell["d_z"], True)
    if not pd.isna(cell["d_z_low"]):
        d_z += f" {interval(cell['d_z_low'], cell['d_z_high'])}"
    return [d_z, _p(cell, "p_t"), _p(cell, "p_w")]


def _p(cell: Mapping[Any, Any], name: str) -> str:
    if pd.isna(cell[name]):
        return "–"
    return f"{number(cell[name])} ({number(cell[f'{name}_holm'])})"


def _few(cell: Mapping[Any, Any]) -> str:
    return str(cell["note"]) if cell["note"] else "–"


def _label(value: Any) -> str:
    return "all" if pd.isna(value) else str(value)


READING = (
    "p-values stand with those of Holm's correction in brackets, over all tests of the table's "
    "grouping (all measures and conditions). d_z is Cohen's d of paired values: mean over standard "
    "deviation of the differences, with its 95% interval. The bootstrap (BCa) resamples prompts. n "
    "counts prompts with matched siblings."
)


def _siblings(analysis: Analysis) -> Section:
    effects = analysis["effects"]
    cells = effects[effects["grouping"] == "overall"]
    first = [
        [row.condition, str(row.layer), number(row.attention), interval(*row[-2:])]
        for row in each(_by_layers(analysis["first_token"]))
    ]
    return Section(
        "Siblings against controls, and the naive number beside",
        [
            Text(
                "Naive is the comparison that is not to be trusted: siblings against all other "
                "tokens that the same queries could see, the prompt and its first token among "
                "them, at any distance. Controlled is siblings minus matched controls."
            ),
            Table(
                ["measure", "condition", *EFFECT_COLUMNS],
                _effect_rows(cells, "measure", "condition"),
                READING,
            ),
            Picture("prompts", "The effect in each prompt"),
            Table(
                ["condition", "layer", "attention", "95%"],
                first,
                "What the first token of the prompt draws: the layers with the least, the median "
                "and the most",
            ),
        ],
    )


def _by_layers(first: DataFrame) -> DataFrame:
    """Each condition's layers with the lowest, the median and the highest value."""
    parts = []
    for _, mine in first.groupby("condition", sort=False):
        ranked = mine.sort_values("attention")
        places = sorted({0, (len(ranked) - 1) // 2, len(ranked) - 1})
        parts.append(ranked.iloc[places])
    columns = ["condition", "layer", "attention", "attention_low", "attention_high"]
    return pd.concat(parts)[columns] if parts else DataFrame(columns=columns)


def _parts(analysis: Analysis) -> Section:
    effects = analysis["effects"]
    blocks: list[Table | Picture | Text | Items] = [Text(READING)]
    for grouping, name, title in (
        ("by category", "category", "category"),
        ("by set size", "set_size", "set size"),
        ("by layer", "layer", "layer"),
    ):
        cells = effects[effects["grouping"] == grouping]
        if grouping == "by layer":
            # The other measures by layer are in the files.
            cells = cells[cells["measure"] == "token"]
        blocks.append(
            Table(
                ["measure", "condition", title, *EFFECT_COLUMNS],
                _effect_rows(cells, "measure", "condition", name),
                f"Siblings minus controls {grouping}",
            )
        )
        if grouping == "by category":
            blocks.append(Picture("categories", "The prompts' effects by category"))
    blocks += [
        Picture("heads", "Siblings minus controls by layer and head"),
        Picture("distances", "Attention of matched siblings and of their controls by distance"),
    ]
    return Section("By category, set size, layer, head and distance", blocks)


def _conditions(analysis: Analysis) -> Section:
    contrasts = analysis["contrasts"]
    if not len(contrasts):
        return Section(
            "Between conditions",
            [Text("No two conditions differ in one setting and share prompts.")],
        )
    blocks: list[Table | Picture | Text | Items] = [
        Text(
            "The same prompt in two conditions that differ in one setting: siblings minus controls "
            "in the second minus the same in the first. Tests are paired by prompt. " + READING
        )
    ]
    for grouping, names in (
        ("overall", []),
        ("by category", ["category"]),
        ("by set size", ["set_size"]),
        ("by layer", ["layer"]),
    ):
        cells = contrasts[contrasts["grouping"] == grouping]
        if grouping == "by layer":
            cells = cells[cells["measure"] == "token"]
        rows = [
            [
                cell["measure"],
                f"{cell['condition_b']} − {cell['condition_a']}",
                *(_label(cell[name]) for name in names),
                str(cell["n"]),
                number(cell["effect_a"], True),
                number(cell["effect_b"], True),
                number(cell["mean"], True),
                interval(cell["low"], cell["high"], _few(cell)),
                interval(cell["boot_low"], cell["boot_high"]),
                *_tests(cell),
            ]
            for cell in cells.to_dict("records")
        ]
        columns = [
            "measure",
            "conditions",
            *(name.replace("_", " ") for name in names),
            "n",
            "first",
        ]
        columns += ["second", "difference", "95% (t)", "95% (bootstrap)", *EFFECT_COLUMNS[-3:]]
        blocks.append(Table(columns, rows, f"Second condition minus first, {grouping}"))
    return Section("Between conditions", blocks)


def _checks(analysis: Analysis) -> Section:
    sensitivity = [
        [
            _limit(row.caliper),
            _limit(row.window),
            row.adjustment + (" (these)" if row.chosen else ""),
            row.measure,
            row.condition,
            str(row.n),
            number(row.effect, True),
            interval(row.effect_low, row.effect_high, "n too small"),
            "–" if pd.isna(row.without) else f"{row.without:.0%}",
        ]
        for row in each(analysis["sensitivity"])
    ]
    models = [
        [
            row.condition,
            f"{row.term} in {row.formula}",
            str(row.n_prompts),
            str(row.n_rows),
            number(row.estimate, True),
            interval(row.low, row.high),
            number(row.p),
            "yes" if row.converged else "no",
            row.note or "–",
        ]
        for row in each(analysis["models"])
    ]
    influence = analysis["influence"]
    flagged = influence[influence["outlier"].fillna(False) | influence["influential"].fillna(False)]
    rows = [
        [
            row.measure,
            row.condition
            if row.question == "siblings"
            else f"{row.condition_b} − {row.condition_a}",
            row.prompt_id,
            number(row.value, True),
            number(row.z, True),
            "yes" if row.outlier else "no",
            number(row.mean_without, True),
            number(row.dfbetas, True),
            number(row.p_without),
        ]
        for row in each(flagged)
    ]
    seeds = [
        [
            row.measure,
            row.condition,
            str(row.prompts),
            str(row.runs),
            str(row.distinct),
            number(row.sd_seeds),
            number(row.sd_prompts),
            number(row.icc),
            row.note or "–",
        ]
        for row in each(analysis["seeds"])
    ]
    return Section(
        "Checks",
        [
            Table(
                [
                    "caliper",
                    "window",
                    "adjustment",
                    "measure",
                    "condition",
                    "n",
                    "effect",
                    "95% (t)",
                ]
                + ["unmatched"],
                sensitivity,
                "Other rules of matching: largest difference of the logits, of the query steps; "
                "whether the rest is adjusted for",
            ),
            Text(
                "The mixed model asks the same question without matching: all generated keys, "
                "distance as a factor, logit of the probability, query step and number of keys as "
                "covariates, "
                "each prompt with its own level and its own effect of siblings (REML, Wald "
                "intervals, attention averaged over layers and heads). What did not converge, or "
                "was warned of, is said."
            ),
            Table(
                ["condition", "term", "n", "rows", "estimate", "95%", "p", "converged", "note"],
                models,
                "Mixed models",
            ),
            shortened(
                ["measure", "condition", "prompt", "value", "z", "|z| > 3"]
                + ["mean without", "dfbetas", "p without"],
                rows,
                "Prompts that are outliers, or influential: |dfbetas| > 2 / sqrt(n) (Belsley, Kuh "
                "and Welsch 1980). Below 11 prompts no |z| can exceed 3.",
            ),
            Table(
                [
                    "measure",
                    "condition",
                    "prompts",
                    "runs",
                    "distinct",
                    "sd of seeds",
                    "sd of prompts",
                ]
                + ["share between prompts", "note"],
                seeds,
                "Seeds: standard deviations of the effect between runs of one prompt and between "
                "prompts",
            ),
        ],
    )


def _distributions(analysis: Analysis) -> Section:
    kl = [
        [
            row.condition_a,
            row.condition_b,
            str(row.step),
            str(row.n),
            number(row.kl_ab),
            interval(row.kl_ab_low, row.kl_ab_high),
            number(row.kl_ba),
            interval(row.kl_ba_low, row.kl_ba_high),
        ]
        for row in each(analysis["kl"])
    ]
    if not kl:
        text = "No pair of runs differs in visibility alone: there is no divergence to report."
        return Section("Next distributions", [Text(text)])
    return Section(
        "Next distributions",
        [
            Text(
                "Kullback-Leibler divergence, in nats, of the distributions from which the two "
                "conditions selected their sets at the same step. At step 0 both saw the same "
                "prompt; after it their sets may differ."
            ),
            Picture("kl", "Divergence between conditions over the steps"),
            Table(
                ["a", "b", "step", "n", "KL(a ‖ b)", "95%", "KL(b ‖ a)", "95%"],
                kl,
                "Means over prompts",
            ),
        ],
    )


def _files(analysis: Analysis) -> Section:
    items = [f"{name}: {what}" for name, what in analysis.info["contents"].items()]
    return Section(
        "Tables in full",
        [Text("In the folder analysis, each as CSV and Parquet:"), Items(items)],
    )


def _limit(value: Any) -> str:
    return "any" if pd.isna(value) else f"{value:g}"


def _seed(seed: Any) -> str:
    return "–" if pd.isna(seed) else str(seed)
