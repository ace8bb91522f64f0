"""Schedules against their formulas and properties."""

from tempo_mlx.rules.schedules import Bezier, Constant, Relu, interpolate, parse_schedule

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

unit = st.floats(0, 1)


@given(unit, unit)
def test_bezier_endpoints(p1, p2):
    assert Bezier(p1, p2)(0) == 0 and Bezier(p1, p2)(1) == 1


@given(unit, unit, unit, unit)
def test_bezier_never_falls_for_ordered_control_points(p, q, t, u):
    curve = Bezier(min(p, q), max(p, q))
    assert curve(min(t, u)) <= curve(max(t, u)) + 1e-12


@given(unit, unit, unit)
def test_bezier_is_de_casteljau(p1, p2, t):
    points = np.array([0.0, p1, p2, 1.0])
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    assert Bezier(p1, p2)(t) == pytest.approx(points[0], abs=1e-12)


@given(st.floats(0, 0.99), unit)
def test_relu_is_flat_then_linear(activation, t):
    value = Relu(activation)(t)
    assert value == (0 if t <= activation else pytest.approx((t - activation) / (1 - activation)))


@given(unit, unit)
def test_text_round_trip(p1, p2):
    for schedule in (Constant(), Bezier(round(p1, 3), round(p2, 3)), Relu(round(p1, 3) * 0.9)):
        parsed = parse_schedule(str(schedule))
        assert parsed(0.37) == pytest.approx(schedule(0.37), abs=1e-5)


@given(unit, unit, st.integers(0, 10))
def test_interpolation_stays_between_its_ends(start, end, step):
    value = interpolate(start, end, Bezier(), step, 10)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


@given(unit, unit)
def test_text_is_exact(p1, p2):
    for schedule in (Bezier(p1, p2), Relu(p1 * 0.9)):
        assert parse_schedule(str(schedule)) == schedule


WRITTEN = ["line", "bezier", "bezier()", "bezier(,)", "bezier(0.1)", "bezier(0.1,)", "bezier(,0.1)"]
WRITTEN += ["bezier(0,0,0)", "bezier(0.1,0.2,)", "bezier(0.1 0.2)", "bezier(0.1", "bezier(1_0,0)"]
WRITTEN += ["relu", "relu()", "relu(x)", "relu(0.1,0.2)", "relu(0.1,)", "relu(nan)", "relu(inf)"]
WRITTEN += ["bezier(nan,0)", "bezier(0,-inf)", "bezier(0,infinity)", "constant()", "constant(1)"]
WRITTEN += ["", " ", "(0.1)", "relu(0.1)x", "relu((0.1))", "Relu(0.1)"]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_of_another_form_is_refused_and_the_forms_are_named(text):
    with pytest.raises(ValueError) as error:
        parse_schedule(text)
    message = str(error.value)
    assert message.endswith(f"got {text!r}")
    assert "bezier(p1,p2)" in message and "relu(activation)" in message and "[0, 1)" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bezier(2,0)", "p1 must be in [0, 1], got 2"),
        ("bezier(0,-0.1)", "p2 must be in [0, 1], got -0.1"),
        ("relu(1)", "activation must be in [0, 1), got 1"),
        ("relu(1e400)", "activation must be in [0, 1], got inf"),
    ],
)
def test_numbers_out_of_range_are_named(text, words):
    with pytest.raises(ValueError) as error:
        parse_schedule(text)
    assert words in str(error.value) and text in str(error.value)


@pytest.mark.parametrize("text", [" bezier( 0.2 , .8 ) ", "bezier(2e-1,+0.80)", "relu(0.)"])
def test_numbers_may_be_written_in_any_way(text):
    assert parse_schedule(text) in (Bezier(0.2, 0.8), Relu(0.0))
