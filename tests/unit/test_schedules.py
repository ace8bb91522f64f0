"""Schedules against their formulas and properties."""

from tempo_mlx.schedules import Bezier, Constant, Relu, interpolate, parse_schedule

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


@pytest.mark.parametrize(
    "text", ["", "line", "bezier(2,0)", "bezier(0,0,0)", "relu(1)", "relu(x)", "bezier(0.1"]
)
def test_bad_text_is_refused(text):
    with pytest.raises(ValueError, match="schedule"):
        parse_schedule(text)
