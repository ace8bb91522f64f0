"""Arguments out of range are named with their value and what is allowed, in one short line."""

import math

from tempo_mlx.arguments import MOST, check_choice, check_count, check_range, check_text, shown
from tempo_mlx.errors import TempoError
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import parse_schedule
from tempo_mlx.search import SearchSettings
from tempo_mlx.settings import Settings

import numpy as np
import pytest


def test_valid_arguments_pass():
    check_count("n", 1)
    check_count("n", MOST)
    check_count("n", 0, 0)
    check_count("n", 5, 5, 5)
    check_range("x", 0, 0, 1)
    check_range("x", np.float64(1.0), 0, 1, low_open=True)
    check_choice("c", "a", {"a": 1})
    check_text("t", "café \U0001f600\x00")


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_count, ("n", 0), "n must be at least 1, got 0"),
        (check_count, ("n", -1, 0), "n must be at least 0, got -1"),
        (check_count, ("n", 1.0), "n must be an integer of at least 1, got 1.0"),
        (check_count, ("n", True), "n must be an integer of at least 1, got True"),
        (check_count, ("n", "3"), "n must be an integer of at least 1, got '3'"),
        (check_count, ("n", None), "n must be an integer of at least 1, got None"),
        (check_count, ("n", 10**9, 1, 100), "n must be at most 100, got 1000000000"),
        (check_range, ("x", 2.0, 0, 1), "x must be in [0, 1], got 2.0"),
        (check_range, ("x", 0, 0, 1, True), "x must be in (0, 1], got 0"),
        (check_range, ("x", math.nan, 0, 1), "x must be in [0, 1], got nan"),
        (check_range, ("x", True, 0, 1), "x must be a number in [0, 1], got True"),
        (check_range, ("x", "1", 0, 1), "x must be a number in [0, 1], got '1'"),
        (check_range, ("x", 1j, 0, 1), "x must be a number in [0, 1], got 1j"),
        (check_choice, ("c", "b", {"a": 1}), "c must be one of a, got 'b'"),
        (check_choice, ("c", ["a"], {"a": 1}), "c must be one of a, got ['a']"),
        (check_text, ("t", 3), "t must be a text, got 3"),
        (check_text, ("t", "a\ud800"), "t is not Unicode text: character 2 is half a surrogate"),
    ],
)
def test_invalid_arguments_are_named(check, arguments, message):
    with pytest.raises(TempoError) as caught:
        check(*arguments)
    assert str(caught.value).startswith(message)


def test_values_are_shown_on_a_short_line():
    for value in ("x\n" * 1000, list(range(10**6)), 10**200, 10**5000, {i: i for i in range(999)}):
        assert "\n" not in shown(value) and len(shown(value)) < 200
    assert shown(np.zeros((3, 3))).startswith("array([[0., 0., 0.], [0.")
    nested: list = []
    nested.append(nested)
    assert shown(nested)


BIG = 10**30
COUNTS = ["max_tokens", "max_parallel", "beam_width", "prefill_step_size"]
SEARCH_COUNTS = [
    "max_tokens",
    "simulations",
    "max_parallel",
    "leaves_per_batch",
    "depth",
    "max_forward_tokens",
    "max_kv_bytes",
    "prefill_step_size",
    "seed",
]


@pytest.mark.parametrize(
    ("make", "given"),
    [
        *((Settings, {name: BIG}) for name in [*COUNTS, "seed", "temp", "beam_margin"]),
        *((Settings, {name: "3"}) for name in [*COUNTS, "seed", "temp", "beam_margin"]),
        *((Settings, {name: True}) for name in [*COUNTS, "seed", "temp", "beam_margin"]),
        *((SearchSettings, {name: BIG}) for name in [*SEARCH_COUNTS, "exploration", "max_seconds"]),
        *((SearchSettings, {name: 2.5}) for name in SEARCH_COUNTS),
        *((SearchSettings, {name: "3"}) for name in [*SEARCH_COUNTS, "exploration"]),
        *((Pruning, {name: BIG}) for name in ("lookback", "min_age", "layers")),
        *((Pruning, {name: "3"}) for name in ("lookback", "min_age", "layers", "steepness")),
        *((Settings, {"temp": x}) for x in (1e-300, 1e300, 1e-7, 1e7, math.nan, math.inf)),
        *((SearchSettings, {"rollout_temp": x}) for x in (1e-300, 1e300, math.nan, math.inf)),
        *((SearchSettings, {"exploration": x}) for x in (1e300, math.nan)),
        *((SearchSettings, {"max_seconds": x}) for x in (math.inf, math.nan)),
        *((Settings, {"threshold": x}) for x in ("0.1", None, True, [0.1])),
        *((Settings, {"schedule": x, "final_threshold": 0.5}) for x in ("relu(0)", None)),
        *((Settings, {"pruning": x}) for x in ({}, "posterior", True)),
        *((Settings, {"stop": x}) for x in (5, "a", (5,), ("\ud800",), None, {"a": 1})),
        *((Settings, {name: ["x"]}) for name in ("visibility", "combine", "sampling")),
        (Settings, {"beam_margin": math.inf}),
        (Pruning, {"schedule": "relu(0)"}),
        (Pruning, {"layers": (1.5,)}),
        (Pruning, {"layers": ()}),
        (Pruning, {"layers": (True,)}),
        (Pruning, {"rule": None}),
        (Pruning, {"steepness": math.inf}),
        (SearchSettings, {"evaluation": None}),
    ],
)
def test_settings_of_any_size_and_type_are_used_or_refused(make, given):
    (name, value), *_ = given.items()
    with pytest.raises(TempoError) as caught:
        make(**given)
    assert name in str(caught.value) and len(str(caught.value)) < 250


def test_bounds_of_settings_are_themselves_allowed():
    Settings(max_tokens=MOST, max_parallel=MOST, prefill_step_size=MOST, seed=2**63 - 1)
    Settings(temp=1e-6)
    Settings(temp=1e6)
    SearchSettings(simulations=MOST, rollout_temp=1e-6, seed=2**63 - 1, exploration=1e9)


@pytest.mark.parametrize("text", ["bezier(0.1,,0.2)", "bezier(,)", "relu(0.5,)", "relu(0.5,0.5)"])
def test_schedules_with_holes_are_refused(text):
    with pytest.raises(TempoError, match="schedule"):
        parse_schedule(text)
