"""Statistics of experiments: against other implementations, and on effects that were planted."""

from dataclasses import replace

from tempo_mlx.experiments.matching import Rules, keys_of
from tempo_mlx.experiments.measures import measure
from tempo_mlx.experiments.mixed_model import observations, seed_model, sibling_model
from tempo_mlx.experiments.statistics import (
    MIN_BOOTSTRAP,
    MIN_PROMPTS,
    bootstrap_interval,
    clustered_mean,
    cohen_d_z,
    differences,
    holm,
    influence,
    mean_tests,
    t_interval,
)
from tempo_mlx.experiments.summary import by_prompt, overall
from tests.synthetic_experiment import Planted

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

REPETITIONS, PROMPTS = 200, 8
#: Families of tests; statsmodels takes its time for each.
FAMILIES = 40


@pytest.fixture
def rng():
    return np.random.default_rng(5)


# Named statistics.


def test_holm_is_that_of_statsmodels_over_the_tests_that_there_are():
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005, np.nan])
    given = np.isfinite(p)
    adjusted = holm(p)
    assert adjusted[given] == pytest.approx(multipletests(p[given], method="holm")[1])
    assert np.isnan(adjusted[~given]).all()
    # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and no less than the one before.
    assert adjusted[given] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(holm([np.nan, np.nan])).all()


def test_mean_tests_are_the_paired_tests(rng):
    first, second = rng.normal(0, 1, 14), rng.normal(0.4, 1, 14)
    found = mean_tests(second - first)
    paired, signed = stats.ttest_rel(second, first), stats.wilcoxon(second, first)
    assert (found["t"], found["p_t"]) == pytest.approx((paired.statistic, paired.pvalue))
    assert (found["w"], found["p_w"]) == pytest.approx((signed.statistic, signed.pvalue))
    assert (found["n"], found["df"], found["note"]) == (14, 13, "")


def test_t_interval_is_that_of_the_paired_test(rng):
    values = rng.normal(0.3, 1, 9)
    low, high = t_interval(9, values.mean(), values.std(ddof=1))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_interval_of_d_z_holds_the_values_whose_tails_are_a_fortieth(rng, shift):
    values = rng.normal(shift, 1, 12)
    d_z, low, high = cohen_d_z(values)
    assert d_z == pytest.approx(values.mean() / values.std(ddof=1))
    # By definition: under these effects a t as large, or as small, has probability 0.025.
    t, root = d_z * np.sqrt(12), np.sqrt(12)
    assert stats.nct.sf(t, 11, low * root) == pytest.approx(0.025, abs=1e-5)
    assert stats.nct.cdf(t, 11, high * root) == pytest.approx(0.025, abs=1e-5)


def test_pairs_are_by_prompt_not_by_place():
    prompts = [f"p{i}" for i in range(8)]
    level = np.array([0.0, 5, 1, 9, 2, 7, 3, 4])
    wobble = np.array([0.1, -0.1, 0.2, 0, -0.2, 0.1, 0, -0.1])
    first = pd.Series(level, prompts)
    second = pd.Series(level + 1 + wobble, prompts).iloc[::-1]
    found = differences(first, second)
    assert found.loc[prompts].to_numpy() == pytest.approx(1 + wobble)
    # Unpaired, the prompts' levels bury it.
    assert mean_tests(found)["p_t"] < 1e-6
    assert stats.ttest_ind(first, second).pvalue > 0.3
    # A prompt of one condition alone is no pair.
    assert list(differences(first, second.drop("p3")).index) == [p for p in prompts if p != "p3"]
    with pytest.raises(ValueError, match="p1"):
        differences(first, pd.concat([second, pd.Series({"p1": 0.0})]))


def test_nan_is_refused():
    values = np.array([1.0, np.nan, 2.0, 3.0])
    series = pd.Series(values, list("abcd"))
    calls = (
        lambda: mean_tests(values),
        lambda: cohen_d_z(values),
        lambda: influence(series),
        lambda: bootstrap_interval(values, 99, np.random.default_rng(0)),
        lambda: differences(series, series),
        lambda: clustered_mean(values, np.arange(4), np.ones(4)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"must be finite, got nan at \[1\]"):
            call()


def test_too_few_prompts_have_no_numbers_and_a_note(rng):
    for n in range(MIN_PROMPTS):
        found = mean_tests(np.arange(n, dtype=float))
        assert found["note"] == "n too small" and found["n"] == n
        assert found["p_t"] is found["p_w"] is found["d_z"] is None
        assert np.isnan(t_interval(n, 0.0, 1.0)).all()
    found = mean_tests(rng.normal(size=5))
    assert found["p_t"] is not None and found["p_w"] is None and "Wilcoxon" in found["note"]
    few = bootstrap_interval(rng.normal(size=MIN_BOOTSTRAP - 1), 99, rng)
    enough = bootstrap_interval(rng.normal(size=MIN_BOOTSTRAP), 99, rng)
    assert np.isnan(few).all() and np.isfinite(enough).all()
    same = mean_tests(np.full(8, 0.1))
    assert same["p_t"] is None and same["note"] == "no variance between prompts"


def test_influence_finds_the_prompt_that_carries_the_mean(rng):
    values = pd.Series(rng.normal(0, 1, 20), [f"p{i}" for i in range(20)])
    values["p7"] = 30.0
    found = influence(values)
    assert list(found.index[found["outlier"]]) == ["p7"]
    assert "p7" in found.index[found["influential"]]
    rest = values.drop("p7")
    assert found.loc["p7", "mean_without"] == pytest.approx(rest.mean())
    assert found.loc["p7", "p_without"] == pytest.approx(stats.ttest_1samp(rest, 0).pvalue)
    # DFBETAS: the shift of the mean in standard errors that the others give.
    error = rest.std(ddof=1) / np.sqrt(20)
    assert found.loc["p7", "dfbetas"] == pytest.approx((values.mean() - rest.mean()) / error)


def test_no_value_among_ten_is_an_outlier_but_it_is_influential():
    values = pd.Series([0.0, 0.01, -0.01, 0.02, 0, 0.01, -0.02, 0, 0.01, 50])
    found = influence(values)
    assert not found["outlier"].any() and found["z"].max() < 9 / np.sqrt(10) + 1e-9
    assert found["influential"].iloc[-1]
    assert influence(values[:2])["outlier"].isna().all()


def test_interval_of_clusters_counts_clusters_not_values(rng):
    level = np.repeat(rng.normal(0, 1, 12), 50)
    values = level + rng.normal(0, 0.01, 600)
    clusters = np.repeat(np.arange(12), 50)
    mean, low, high, n = clustered_mean(values, clusters, np.ones(600))
    assert n == 12 and mean == pytest.approx(values.mean())
    means = level[::50]
    width = 2 * stats.t.ppf(0.975, 11) * means.std(ddof=1) / np.sqrt(12)
    assert high - low == pytest.approx(width, rel=0.02)
    _, low, high, n = clustered_mean(values, np.arange(600) % 2, np.ones(600))
    assert n == 2 and np.isnan([low, high]).all()


def test_bootstrap_interval_is_the_same_for_the_same_seed(rng):
    values = rng.normal(size=12)
    seeds = [0, 0, 1]
    found = [bootstrap_interval(values, 999, np.random.default_rng(seed)) for seed in seeds]
    assert found[0] == found[1] != found[2]
    low, high = found[0]
    assert low < values.mean() < high


# Planted effects, through matching and measures: many suites at once, each with its own prompts.


def repeated(planted, seed):
    """Effects of the prompts of many suites, [repetitions, prompts], by measure."""
    many = replace(
        planted,
        prompts=REPETITIONS * PROMPTS,
        categories=("any",),
        conditions=("isolated",),
        layers=1,
        heads=1,
        prompt_tokens=2,
        steps=12,
    )
    tables = many.tables(seed)
    number = tables.runs["prompt_id"].str.removeprefix("any-").astype(int) - 1
    # As conditions the suites share nothing, not even slopes.
    runs = tables.runs.assign(condition="suite " + (number // PROMPTS).astype(str))
    found = measure(replace(tables, runs=runs), Rules())
    assert len(found.adjusted) == REPETITIONS
    return {
        name: [mine["effect"].to_numpy() for _, mine in part.groupby("condition")]
        for name, part in overall(by_prompt(found)).groupby("measure")
    }


def summaries(effects):
    """n, mean and standard deviation of each suite."""
    return tuple(
        np.array([f(e) for e in effects]) for f in (len, np.mean, lambda e: np.std(e, ddof=1))
    )


@pytest.fixture(scope="module")
def with_effect():
    return repeated(Planted(effect=0.006, prompt_sd=0.002), 1)["token"]


@pytest.fixture(scope="module")
def without_effect():
    return repeated(Planted(), 2)


def bounds(probability):
    """Counts among the repetitions that 99.9% of right procedures give."""
    return stats.binom.interval(0.999, REPETITIONS, probability)


@pytest.mark.slow
@pytest.mark.xdist_group("planted suites")
def test_interval_covers_the_planted_effect_in_about_95_of_100_suites(with_effect):
    n, mean, sd = summaries(with_effect)
    assert len(n) == REPETITIONS and n.min() >= MIN_PROMPTS
    low, high = t_interval(n, mean, sd)
    fewest, most = bounds(0.95)
    assert fewest <= ((low <= 0.006) & (high >= 0.006)).sum() <= most
    # Found, too, in nearly all of them.
    assert (low > 0).mean() > 0.9
    assert mean.mean() == pytest.approx(0.006, abs=3 * sd.mean() / np.sqrt(n.sum()))


@pytest.mark.slow
@pytest.mark.xdist_group("planted suites")
def test_bootstrap_covers_nearly_as_often(with_effect, rng):
    given = inside = 0
    for values in with_effect:
        low, high = bootstrap_interval(values, 499, rng)
        given += bool(np.isfinite(low))
        inside += bool(low <= 0.006 <= high)
    # With eight prompts it is known to be too narrow; how much so is what is held here.
    assert given > 0.9 * REPETITIONS
    assert stats.binom.ppf(0.9995, given, 0.95) >= inside >= stats.binom.ppf(0.0005, given, 0.86)


def test_d_z_is_covered_in_about_95_of_100_samples(rng):
    true, inside = 0.8, 0
    for _ in range(REPETITIONS):
        _, low, high = cohen_d_z(rng.normal(true, 1, PROMPTS))
        inside += low <= true <= high
    fewest, most = bounds(0.95)
    assert fewest <= inside <= most


@pytest.mark.slow
@pytest.mark.xdist_group("planted suites")
def test_no_effect_gives_false_alarms_at_the_nominal_rate(without_effect):
    found = [mean_tests(values) for values in without_effect["token"]]
    fewest, most = bounds(0.05)
    assert fewest <= sum(each["p_t"] < 0.05 for each in found) <= most
    given = [each["p_w"] for each in found if each["p_w"] is not None]
    assert len(given) > 0.9 * REPETITIONS
    # Its p-values are discrete: never more often than nominal, up to chance.
    assert sum(p < 0.05 for p in given) <= most


@pytest.mark.slow
def test_holm_keeps_the_rate_of_a_whole_family(rng):
    families = rng.uniform(size=(FAMILIES, 30))
    alarms = sum((holm(family) < 0.05).any() for family in families)
    assert alarms <= stats.binom.ppf(0.9995, FAMILIES, 0.05)
    assert (families < 0.05).any(axis=1).mean() > 0.6


@pytest.mark.slow
@pytest.mark.xdist_group("planted suites")
def test_measures_differ_as_they_must_where_siblings_draw_what_single_tokens_draw(without_effect):
    # Sets have 2 to 4 tokens: whole sets draw two to four times as much as a single token.
    assert np.concatenate(without_effect["set"]).mean() > 0.01
    assert abs(np.concatenate(without_effect["token"]).mean()) < 0.0002


# The mixed model.


def observations_of(tables):
    return observations(keys_of(tables), tables.received)


def test_mixed_model_finds_the_planted_effect():
    planted = Planted(prompts=3, conditions=("isolated",), effect=0.006, prompt_sd=0.003)
    found = sibling_model(observations_of(planted.tables(4)))
    assert found["low"] < 0.006 < found["high"] and found["p"] < 1e-3
    assert found["n_prompts"] == 15 and 0.001 < found["var_sibling"] ** 0.5 < 0.006


def test_mixed_model_says_why_there_is_none():
    one = Planted(prompts=1, categories=("any",), conditions=("isolated",))
    found = sibling_model(observations_of(one.tables()))
    assert found["estimate"] is None and found["note"] == "n too small"
    crowded = sibling_model(observations_of(replace(one, prompts=4, single=0.0).tables()))
    assert crowded["estimate"] is None and crowded["note"] == "no siblings or no single tokens"
    still = seed_model(pd.DataFrame({"prompt_id": list("abcd"), "effect": 0.0}))
    assert still["estimate"] is None and still["note"] == "no variance"


def test_mixed_model_that_does_not_converge_is_not_hidden():
    # One run for each prompt: level and residual cannot be told apart.
    rows = pd.DataFrame({"prompt_id": list("abcdef"), "effect": [1.0, 2, 3, 4, 5, 7]})
    found = seed_model(rows)
    assert found["note"] != ""


def test_seed_model_tells_seeds_from_prompts(rng):
    level = np.repeat(rng.normal(0, 3, 30), 5)
    prompts = np.repeat([f"p{i}" for i in range(30)], 5)
    rows = pd.DataFrame({"prompt_id": prompts, "effect": level + rng.normal(0, 1, 150)})
    found = seed_model(rows)
    assert found["var_residual"] == pytest.approx(1, rel=0.3)
    assert found["var_prompt"] == pytest.approx(9, rel=0.5)
