"""The analysis of a suite: who is compared with whom, what is controlled for, what stays empty."""

import json
from dataclasses import replace

from tempo_mlx.experiments.analysis import CONTENTS, analyze, load_analysis, save
from tempo_mlx.experiments.matching import (
    Rules,
    balance,
    count_matches,
    keys_of,
    match,
    sibling_sets,
    sibling_tokens,
    slopes,
)
from tempo_mlx.experiments.measures import measure
from tempo_mlx.experiments.summary import (
    by_prompt,
    condition_differences,
    condition_pairs,
    overall,
    summarise,
)
from tests.synthetic_experiment import Planted

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from scipy.stats import ttest_1samp, ttest_rel
from statsmodels.formula.api import ols

#: In one process, which makes the analysis once.
pytestmark = pytest.mark.xdist_group("analysis")

SMALL = Planted(prompts=3, layers=2, heads=2)
FAST = {"resamples": 99}


@pytest.fixture(scope="module")
def tables():
    return replace(SMALL, effect=0.006, condition_effect=0.004, prompt_sd=0.001).tables(1)


@pytest.fixture(scope="module")
def analysis(tables):
    return analyze(tables, **FAST)


def effects_alone(tables):
    """The table of effects without the rest of an analysis."""
    prompts = by_prompt(measure(tables, Rules()))
    beside = ["siblings", "controls", "naive"]
    return {"effects": summarise(prompts, ["measure", "condition"], beside, resamples=99, seed=0)}


def effects_of(analysis, measure="token", grouping="overall"):
    effects = analysis["effects"]
    return effects[(effects["measure"] == measure) & (effects["grouping"] == grouping)]


# Matching.


@pytest.mark.parametrize("rules", [Rules(), Rules(1.5, 1), Rules(None, 2), Rules(0.3, None)])
def test_controls_are_exactly_the_single_tokens_that_are_alike(tables, rules):
    keys = keys_of(tables)
    units = sibling_tokens(keys)
    pairs = match(units, keys, rules)
    assert len(pairs) > 20
    found = {unit: set(rows) for unit, rows in pairs.groupby("unit")["row"]}
    entries, runs = tables.entries, tables.runs.set_index("run_id")
    by_run = dict(list(entries.rename_axis("entry").reset_index().groupby("run_id")))
    for unit in units.sample(40, random_state=0).itertuples():
        mine = by_run[unit.run_id]
        # Written out from the definition, entry by entry.
        expected = {
            row.entry
            for row in mine.itertuples(index=False)
            if not row.is_prompt
            and row.set_size == 1
            and row.key_step < row.query_step
            and row.distance == unit.distance
            and (
                rules.caliper is None
                or abs(logit(row.probability) - logit(unit.probability)) <= rules.caliper
            )
            and (rules.window is None or abs(row.query_step - unit.query_step) <= rules.window)
        }
        assert found.get(unit.unit, set()) == expected
    assert set(pairs["scope"]) == {"run"} and not runs["seed"].notna().any()
    assert pairs.groupby("unit")["weight"].sum().to_numpy() == pytest.approx(1)


def test_other_runs_of_the_prompt_are_asked_only_where_the_own_run_has_none():
    tables = replace(SMALL, seeds=(1, 2, 3), single=0.4).tables(2)
    keys = keys_of(tables)
    units = sibling_tokens(keys)
    pairs = match(units, keys, Rules())
    sides = pairs.merge(units.drop(columns="row"), on="unit").merge(
        keys, on="row", suffixes=("", "_control")
    )
    assert (sides["prompt_id"] == sides["prompt_id_control"]).all()
    assert (sides["condition"] == sides["condition_control"]).all()
    own = sides["run_id"] == sides["run_id_control"]
    assert (own == (sides["scope"] == "run")).all() and {True, False} == set(own)
    counts = count_matches(units, pairs)
    total = counts[["in_run", "in_prompt", "without"]].sum(axis=1)
    assert (total == counts["units"]).all() and counts["units"].sum() == len(units)
    assert counts["in_prompt"].sum() == sides.loc[~own, "unit"].nunique()


def test_keys_leave_out_the_own_step_and_what_was_pruned_before(tables):
    keys = keys_of(tables)
    assert (keys["key_step"] < keys["query_step"]).all()
    token = tables.tokens[(tables.tokens["set_size"] > 1) & (tables.tokens["step"] == 2)].iloc[0]
    tokens = tables.tokens.copy()
    here = (tokens["run_id"] == token["run_id"]) & (tokens["slot"] == token["slot"])
    # Pruned after the pass of step 4: that step is the last that saw it.
    tokens.loc[here, "pruned_at"] = 4
    pruned = keys_of(replace(tables, tokens=tokens))
    seen = pruned[(pruned["run_id"] == token["run_id"]) & (pruned["slot"] == token["slot"])]
    assert sorted(seen["query_step"]) == [3, 4]
    assert len(keys) - len(pruned) == SMALL.steps - 5


def test_sets_add_up_their_live_tokens(tables):
    keys = keys_of(tables)
    sets = sibling_sets(keys)
    one = sets[sets["set_size"] == 3].iloc[0]
    same = (keys["run_id"] == one["run_id"]) & (keys["key_step"] == one["key_step"])
    members = keys[same & (keys["query_step"] == one["query_step"])]
    assert len(members) == 3
    assert one["probability"] == pytest.approx(members["probability"].sum())
    units = measure(tables, Rules(None, None)).measured["set"].units
    value = units.loc[one["unit"], "siblings"]
    expected = tables.received[members["row"]].sum(axis=0, dtype=np.float64).mean()
    assert value == pytest.approx(expected)


def test_matching_makes_probabilities_alike(tables):
    keys = keys_of(tables)
    units = sibling_tokens(keys)
    before = balance(units, match(units, keys, Rules(None, None)), keys)
    after = balance(units, match(units, keys, Rules()), keys)
    of_logit = [table[table["covariate"] == "logit"] for table in (before, after)]
    assert (of_logit[0]["difference_after"].abs() > 0.5).all()
    assert (of_logit[1]["difference_after"].abs() < 0.15).all()
    distance = after[after["covariate"] == "distance"]
    assert distance["difference_after"].abs().max() < 1e-12


@pytest.mark.parametrize(
    "bad", [{"caliper": 0}, {"caliper": float("nan")}, {"window": -1}, {"adjustment": "cubic"}]
)
def test_bad_rules_are_refused(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=name):
        Rules(**bad)


# What is measured.


def test_values_of_a_prompt_are_those_written_out_by_hand(tables):
    found = by_prompt(measure(tables, Rules(adjustment="none")))
    keys = keys_of(tables)
    pairs = match(sibling_tokens(keys), keys, Rules())
    units = sibling_tokens(keys).set_index("unit")
    run = units.loc[pairs["unit"], "run_id"].mode().iloc[0]
    mine = [unit for unit in pairs["unit"].unique() if units.loc[unit, "run_id"] == run]
    layer = 1
    siblings, controls = [], []
    for unit in mine:
        siblings.append(tables.received[units.loc[unit, "row"], layer].mean())
        rows = pairs.loc[pairs["unit"] == unit, "row"]
        controls.append(tables.received[rows, layer].mean())
    assert len(mine) > 5
    prompt, condition = tables.runs.set_index("run_id").loc[run, ["prompt_id", "condition"]]
    row = found[
        (found["measure"] == "token")
        & (found["prompt_id"] == prompt)
        & (found["condition"] == condition)
        & (found["layer"] == layer)
        & found["set_size"].isna()
    ].iloc[0]
    assert row["matched"] == len(mine)
    assert row["siblings"] == pytest.approx(np.mean(siblings))
    assert row["controls"] == pytest.approx(np.mean(controls))
    assert row["effect"] == pytest.approx(np.mean(siblings) - np.mean(controls))
    seen = keys[(keys["run_id"] == run) & (keys["kind"] == "sibling")]
    others = keys[
        (keys["run_id"] == run)
        & (keys["kind"] != "sibling")
        & keys["query_step"].isin(seen["query_step"])
    ]
    naive = [tables.received[part["row"], layer].mean() for part in (seen, others)]
    assert others["is_first"].any()
    assert row["naive"] == pytest.approx(naive[0] - naive[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_seeds_count_equally_and_are_no_replicates():
    tables = replace(SMALL, seeds=(1, 2, 3, 4), effect=0.006, seed_sd=0.003).tables(3)
    analysis = analyze(tables, **FAST)
    cell = effects_of(analysis).iloc[0]
    assert cell["n"] == 15 and analysis.info["n_runs"] == 120
    measured = measure(tables, Rules()).measured["token"]
    runs = measured.cells.assign(effect=measured.effect.mean(axis=(1, 2)))
    runs = runs[(runs["set_size"] == 0) & (runs["condition"] == cell["condition"])]
    by_hand = runs.groupby("prompt_id")["effect"].mean()
    assert cell["mean"] == pytest.approx(by_hand.mean())
    assert cell["p_t"] == pytest.approx(ttest_1samp(by_hand, 0).pvalue)
    seeds = analysis["seeds"].set_index(["measure", "condition"]).loc["token"]
    assert seeds["runs"].between(50, 60).all() and seeds["sd_seeds"].between(0.002, 0.004).all()
    over = analysis["intervals"]
    assert set(over.loc[over["measure"] == "token", "over"]) == {"runs"}


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_copies_are_named_as_such():
    tables = replace(SMALL, seeds=(1, 2)).tables(4)
    # The same ids in every run of a prompt and condition.
    tokens = tables.tokens.assign(id=7)
    first = tokens["run_id"].str.replace(r"/\d$", "", regex=True)
    kept = tokens.groupby(first)["run_id"].transform("min")
    sets = tokens[tokens["run_id"] == kept]
    copies = pd.concat(
        [
            sets.assign(run_id=sets["run_id"].str.replace(r"/\d$", f"/{seed}", regex=True))
            for seed in (1, 2)
        ]
    )
    analysis = analyze(replace(tables, tokens=copies), **FAST)
    assert len(analysis.info["notes"]) >= 2
    seeds = analysis["seeds"]
    assert (seeds["distinct"] == seeds["prompts"]).all() and (seeds["runs"] > 20).any()
    for row in seeds[seeds["measure"] == "token"].itertuples():
        said = (
            f"{row.condition}: {row.runs} runs of {row.prompts} prompts, {row.prompts} of them diff"
        )
        assert any(note.startswith(said) for note in analysis.info["notes"])


def test_taking_the_siblings_out_gives_what_softmax_gives_without_them():
    """Rows of a softmax in which siblings weigh what single tokens weigh: they only share."""
    one = Planted(prompts=40, categories=("any",), conditions=("isolated",), softmax=True, base=0.3)
    tables = replace(one, noise=0.0, layers=1, heads=1, single=0.5).tables(5)
    keys = keys_of(tables)
    units = measure(tables, Rules(None, None)).measured["alone"].units
    unit = units.iloc[0]
    row = keys[(keys["run_id"] == unit["run_id"]) & (keys["query_step"] == unit["query_step"])]
    received = tables.received[:, 0, 0].astype(float)
    mine = row[row["key_step"] == unit["key_step"]]["row"].to_numpy()
    rest = 1 - received[mine[1:]].sum()
    assert unit["siblings"] == pytest.approx(received[mine[0]] / rest, rel=1e-5)


# What is controlled for.


@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_pooling_and_decay_fool_the_naive_number_alone(decay):
    analysis = effects_alone(replace(SMALL, prompts=6, decay=decay).tables(6))
    for cell in effects_of(analysis).to_dict("records"):
        # The first token draws far more than any sibling, whatever siblings do.
        assert cell["naive_high"] < -0.02
        assert cell["low"] < 0 < cell["high"] and cell["p_t"] > 0.01
        assert abs(cell["mean"]) < 0.05 * abs(cell["naive"])


def test_decay_alone_fools_a_comparison_without_distances():
    """Siblings near their queries, single tokens far: an effect without the first token too."""
    tables = replace(SMALL, prompts=6, decay=0.5, prompt_tokens=12).tables(7)
    keys = keys_of(tables)
    rest = keys[~keys["is_first"].astype(bool)]
    received = tables.received.mean(axis=(1, 2))[rest["row"]]
    by_kind = pd.Series(received).groupby((rest["kind"] == "sibling").to_numpy()).mean()
    assert by_kind[True] > 1.5 * by_kind[False]
    for cell in effects_of(effects_alone(tables)).to_dict("records"):
        assert cell["low"] < 0 < cell["high"]


def test_attention_that_follows_probability_is_no_effect_of_siblings():
    """Siblings are less probable than single tokens; without a caliper that is an effect."""
    tables = replace(SMALL, prompts=12, by_probability=0.004, noise=0.1).tables(8)
    loose, close = (
        overall(by_prompt(measure(tables, rules)))
        for rules in (Rules(None, 3, "none"), Rules(0.25, 3, "none"))
    )
    means = [rows.loc[rows["measure"] == "token", "effect"].mean() for rows in (loose, close)]
    assert means[0] < -0.003 and abs(means[1]) < 0.1 * abs(means[0])


@pytest.mark.parametrize("planted", [{"dilution": 0.6, "early": 0.8}, {"by_probability": 0.004}])
def test_what_matching_leaves_different_is_adjusted_for(planted):
    """Sets come early, where a key draws more; or are less probable within the caliper."""
    tables = replace(SMALL, prompts=12, noise=0.1, **planted).tables(13)
    rough, adjusted = (
        overall(by_prompt(measure(tables, Rules(1.5, None, adjustment))))
        for adjustment in ("none", "linear")
    )
    means = [rows.loc[rows["measure"] == "token", "effect"].mean() for rows in (rough, adjusted)]
    assert abs(means[0]) > 0.0005 and abs(means[1]) < 0.25 * abs(means[0])


def test_slopes_are_those_of_a_regression(tables):
    singles = keys_of(tables).query("kind == 'single' and condition == 'visible'")
    attention = tables.received[singles["row"], 0, 1].astype(float)
    fit = ols(
        "attention ~ 0 + C(distance) + logit + query_step + n_keys",
        singles.assign(attention=attention),
    ).fit()
    found = slopes(singles) @ attention
    assert found == pytest.approx(fit.params[["logit", "query_step", "n_keys"]].to_numpy())
    assert slopes(singles.iloc[:20]) is None


def test_planted_effects_and_their_difference_are_found(analysis):
    cells = effects_of(analysis).set_index("condition")
    for condition, planted in (("isolated", 0.006), ("visible", 0.010)):
        assert cells.loc[condition, "low"] < planted < cells.loc[condition, "high"]
        assert cells.loc[condition, "p_t_holm"] < 1e-4 and cells.loc[condition, "p_w_holm"] < 0.01
    contrasts = analysis["contrasts"]
    cell = contrasts[(contrasts["measure"] == "token") & (contrasts["grouping"] == "overall")]
    assert cell["low"].item() < 0.004 < cell["high"].item() and cell["n"].item() > 10
    models = analysis["models"].set_index("question")
    assert models.loc["conditions", "low"] < 0.004 < models.loc["conditions", "high"]


@pytest.mark.slow
def test_sensitivity_holds_the_analysis_itself_and_what_other_rules_give(tables, analysis):
    found = analysis["sensitivity"]
    chosen = found[found["chosen"] & (found["measure"] == "token")].set_index("condition")
    cells, contrasts = effects_of(analysis).set_index("condition"), analysis["contrasts"]
    of_conditions = contrasts[
        (contrasts["measure"] == "token") & (contrasts["grouping"] == "overall")
    ]
    for condition, cell in [*cells.iterrows(), ("visible - isolated", of_conditions.iloc[0])]:
        assert chosen.loc[condition, "n"] == cell["n"]
        for name, value in (("effect", "mean"), ("effect_low", "low"), ("effect_high", "high")):
            assert chosen.loc[condition, name] == pytest.approx(cell[value], rel=1e-5)
    matches = analysis["matches"].query("of == 'tokens' and condition == 'visible'")
    share = matches["without"].sum() / matches["units"].sum()
    assert chosen.loc["visible", "without"] == pytest.approx(share)
    none = found[(found["adjustment"] == "none") & (found["caliper"] == 0.5)]
    assert set(none["condition"]) == set(chosen.index) and not none["chosen"].any()
    effect = overall(by_prompt(measure(tables, Rules(adjustment="none"))))
    mean = effect.query("measure == 'set' and condition == 'isolated'")["effect"].mean()
    row = none.query("measure == 'set' and condition == 'isolated'").iloc[0]
    assert row["effect"] == pytest.approx(mean, rel=1e-5)


def test_contrasts_pair_prompts(tables, analysis):
    prompts = overall(by_prompt(measure(tables, Rules())))
    wide = prompts[prompts["measure"] == "token"].pivot(
        index="prompt_id", columns="condition", values="effect"
    )
    contrasts = analysis["contrasts"]
    cell = contrasts[(contrasts["measure"] == "token") & (contrasts["grouping"] == "overall")].iloc[
        0
    ]
    paired = ttest_rel(wide["visible"], wide["isolated"], nan_policy="omit")
    assert (cell["condition_a"], cell["condition_b"]) == ("isolated", "visible")
    assert (cell["t"], cell["p_t"]) == pytest.approx((paired.statistic, paired.pvalue))
    # A prompt that lost one of its runs is in no pair.
    prompts = prompts[prompts["measure"] == "token"]
    lost = prompts[(prompts["prompt_id"] != "factual-1") | (prompts["condition"] != "visible")]
    pairs = condition_differences(lost, [("isolated", "visible")])
    assert "factual-1" not in set(pairs["prompt_id"]) and len(pairs) == len(wide.dropna()) - 1


def test_conditions_are_paired_that_differ_in_one_setting():
    runs = pd.DataFrame(
        {
            "condition": ["a", "b", "c", "d", "a"],
            "visibility": ["isolated", "visible", "isolated", "visible", "isolated"],
            "combine": ["mean", "mean", "last", "last", "mean"],
            "seed": [1, 2, 3, 4, 5],
        }
    )
    assert condition_pairs(runs) == [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]


# Tables.


def test_cells_are_means_over_prompts_of_every_margin(tables, analysis):
    prompts = by_prompt(measure(tables, Rules()))
    effects = analysis["effects"]
    assert set(effects["grouping"]) == {
        "overall",
        "by category",
        "by set size",
        "by layer",
        "interaction",
    }
    for cell in effects.sample(30, random_state=1).to_dict("records"):
        same = (prompts["measure"] == cell["measure"]) & (prompts["condition"] == cell["condition"])
        for factor in ("set_size", "layer"):
            value = cell[factor]
            same &= prompts[factor].isna() if pd.isna(value) else (prompts[factor] == value)
        if cell["category"] != "all":
            same &= prompts["category"] == cell["category"]
        values = prompts.loc[same.fillna(False), "effect"].dropna()
        assert cell["n"] == len(values)
        assert cell["mean"] == pytest.approx(values.mean(), nan_ok=True)
        assert cell["variance"] == pytest.approx(values.var(), nan_ok=True)
        if cell["grouping"] != "interaction" and len(values) > 2:
            assert cell["p_t"] == pytest.approx(ttest_1samp(values, 0).pvalue)


def test_families_are_the_groupings_and_interactions_are_not_tested(analysis):
    for table in ("effects", "contrasts"):
        cells = analysis[table]
        for grouping, family in cells.groupby("grouping"):
            if grouping == "interaction":
                assert family["p_t"].isna().all() and family["tests"].isna().all()
                assert family["low"].notna().any()
            else:
                assert (family["tests"] == family["p_t"].count()).all()
                given = family[family["p_t"].notna()]
                assert (given["p_t_holm"] >= given["p_t"]).all()
                smallest = given["p_t"].min()
                expected = min(1.0, smallest * len(given))
                assert given["p_t_holm"].min() == pytest.approx(expected)


def test_heads_average_to_the_layers(analysis):
    heads = analysis["heads"]
    means = heads.groupby(["measure", "condition", "layer"])["effect"].mean()
    layers = analysis["effects"]
    layers = layers[(layers["grouping"] == "by layer")].set_index(["measure", "condition", "layer"])
    for key, mean in means.items():
        assert layers.loc[key, "mean"] == pytest.approx(mean)
    assert len(heads) == 3 * 2 * SMALL.layers * SMALL.heads


def test_distances_show_the_decay_and_the_effect(analysis):
    found = analysis["distances"].set_index(["condition", "distance"])
    isolated = found.loc["isolated"]
    assert (isolated["controls"].diff().dropna() < 0.001).all()
    gap = isolated["siblings"] - isolated["controls"]
    assert gap.loc[1:5].to_numpy() == pytest.approx(0.006, abs=0.003)


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_an_outlier_is_found_and_its_influence(tables):
    analysis = analyze(replace(SMALL, prompts=4, outlier=0.02).tables(9), **FAST)
    found = analysis["influence"]
    mine = found[(found["measure"] == "token") & (found["question"] == "siblings")]
    assert set(mine.loc[mine["outlier"], "prompt_id"]) == {"narrative-1"}
    assert (mine.loc[mine["outlier"], "influential"]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_a_category_without_controls_is_named_and_left_empty():
    analysis = analyze(replace(SMALL, without_controls="dialogue").tables(10), **FAST)
    matches = analysis["matches"]
    mine = matches[(matches["category"] == "dialogue") & (matches["of"] == "tokens")]
    assert (mine["without"] == mine["units"]).all() and mine["controls_each"].isna().all()
    cells = effects_of(analysis, grouping="by category")
    cell = cells[cells["category"] == "dialogue"].iloc[0]
    assert cell["n"] == 0 and np.isnan(cell["mean"]) and cell["note"] == "n too small"
    # The naive number has no need of controls.
    assert np.isfinite(cell["naive"])
    assert any("dialogue-1, dialogue-2, dialogue-3" in note for note in analysis.info["notes"])
    overall_cell = effects_of(analysis).iloc[0]
    assert 6 <= overall_cell["n"] <= 12


@pytest.mark.usefixtures("without_checks")
def test_a_single_prompt_has_a_mean_and_no_interval():
    one = Planted(prompts=1, categories=("any",))
    analysis = analyze(one.tables(11), **FAST)
    for cell in [
        *effects_of(analysis).to_dict("records"),
        *analysis["contrasts"].to_dict("records"),
    ]:
        assert cell["note"] == "n too small" and cell["n"] <= 1
        for name in ("sd", "low", "high", "boot_low", "p_t", "p_w", "d_z", "p_t_holm"):
            assert np.isnan(cell[name]), name
    assert np.isfinite(effects_of(analysis)["mean"]).all()
    rows = analysis.to_dict()["tables"]["effects"]
    assert rows[0]["n"] == 1 and rows[0]["low"] is None


@pytest.mark.slow
def test_no_controls_anywhere_is_an_empty_result_not_an_error():
    analysis = analyze(replace(SMALL, single=0.0).tables(12), **FAST)
    assert (effects_of(analysis)["n"] == 0).all() and not len(analysis["intervals"])
    by_condition = analysis["sensitivity"]
    assert (
        by_condition["without"].eq(1).all()
        and by_condition["n"].eq(0).all()
        and len(by_condition) > 20
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5, -0.1])
def test_attention_that_is_none_is_refused(tables, value):
    received = tables.received.copy()
    received[17, 1, 0] = value
    with pytest.raises(ValueError, match="received, layer 1, must be"):
        analyze(replace(tables, received=received))


def test_tables_that_cannot_be_analysed_are_refused(tables):
    nothing = tables.entries.assign(probability=np.nan)
    cases = (
        (replace(tables, entries=nothing), "column probability of table entries must be finite"),
        (replace(tables, entries=tables.entries.drop(columns="slot")), "entries lacks .* slot"),
        (replace(tables, received=tables.received[1:]), "received must be"),
        (replace(tables, runs=tables.runs.iloc[:0]), "no run is done"),
        (replace(tables, runs=tables.runs.iloc[1:]), "table entries has runs that"),
        (replace(SMALL, single=1.0).tables(), "no run has a set of two or more tokens"),
        (
            replace(tables, entries=tables.entries.iloc[:0], received=np.zeros((0, 0, 0))),
            "no run has a set of two or more tokens",
        ),
        (replace(tables, kl=tables.kl.assign(kl_ab=np.inf)), "column kl_ab of table kl"),
    )
    for broken, message in cases:
        with pytest.raises(ValueError, match=message):
            analyze(broken)
    for bad in ({"resamples": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            analyze(tables, **bad)


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_hidden_siblings_are_said_to_be_so(tables):
    siblings = (tables.entries["set_size"] > 1).to_numpy()
    hidden = tables.entries["run_id"].str.contains("visible").to_numpy()
    received = np.where((siblings & hidden)[:, None, None], 0, tables.received)
    analysis = analyze(replace(tables, received=received.astype(np.float32)), **FAST)
    assert any(n.startswith("visible: siblings got no attention") for n in analysis.info["notes"])


@pytest.mark.slow
def test_analysis_is_the_same_again_and_from_its_files(tables, analysis, tmp_path):
    again = analyze(tables, **FAST)
    save(analysis, tmp_path)
    loaded = load_analysis(tmp_path)
    assert set(loaded.tables) == set(CONTENTS) == set(analysis.tables)
    for name, table in analysis.tables.items():
        pd.testing.assert_frame_equal(table, again[name])
        pd.testing.assert_frame_equal(table, loaded[name], check_dtype=False)
        assert len(pd.read_csv(tmp_path / "analysis" / f"{name}.csv")) == len(table)
    text = (tmp_path / "analysis" / "analysis.json").read_text()
    assert "NaN" not in text
    data = json.loads(text)
    assert data["schema"] == 2 and data["rules"] == {
        "caliper": 0.5,
        "window": 3,
        "adjustment": "linear",
    }
    assert len(data["tables"]["effects"]) == len(analysis["effects"])
    assert loaded.info["suite"] == tables.suite


def test_a_folder_without_analysis_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="tempo-mlx experiment analyze"):
        load_analysis(tmp_path)
