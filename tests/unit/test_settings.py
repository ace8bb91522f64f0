"""Settings say what is wrong with them: argument, value, range."""

from tempo_mlx.models import PositionedModel
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Bezier
from tempo_mlx.settings import Settings, given
from tests.tiny_models import tiny_model

import pytest


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"threshold": 0.0}, ["threshold", "0", "(0, 1]"]),
        ({"threshold": 1.5}, ["threshold", "1.5", "(0, 1]"]),
        ({"threshold": float("nan")}, ["threshold", "nan"]),
        ({"max_parallel": 0}, ["max_parallel", "0", "at least 1"]),
        ({"max_tokens": 0}, ["max_tokens", "0", "at least 1"]),
        ({"max_tokens": 2.5}, ["max_tokens", "2.5", "integer"]),
        ({"temp": 0.0}, ["temp", "0", "above 0", "threshold 1"]),
        ({"visibility": "all"}, ["visibility", "all", "isolated"]),
        ({"combine": "sum"}, ["combine", "sum", "mixture"]),
        ({"sampling": "top"}, ["sampling", "top", "gumbel"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"stop": "text"}, ["stop", "tuple"]),
        ({"final_threshold": 0.5}, ["final_threshold", "schedule"]),
        ({"schedule": Bezier()}, ["final_threshold"]),
        ({"prefill_step_size": 0}, ["prefill_step_size", "0"]),
    ],
)
def test_value_out_of_range_is_named(given, names):
    with pytest.raises(ValueError) as error:
        Settings(**given)
    for name in names:
        assert name in str(error.value)


def test_unknown_setting_is_named():
    with pytest.raises(TypeError, match="'treshold'"):
        given(None, {"treshold": 0.1}, Settings)


def test_seed_without_sampling_is_reported_as_useless():
    assert "no effect" in Settings(seed=1).notes()[0]
    assert not Settings(seed=1, sampling="gumbel").notes()


def test_a_sampling_run_always_has_a_seed_on_record():
    model = PositionedModel.of(tiny_model("llama"))
    assert Settings(sampling="gumbel").resolved(model).seed is not None
    assert Settings(sampling="gumbel", seed=7).resolved(model).seed == 7
    assert Settings().resolved(model).seed is None


def test_every_setting_is_in_the_dictionary():
    assert set(Settings().to_dict()) == set(Settings.__dataclass_fields__)


def test_leaves_without_a_tree_are_reported_as_useless():
    assert "beam_width" in Settings(beam_width=3).notes()[0]
    assert not Settings(beam_width=3, beam_margin=1.0, visibility="tree").notes()


@pytest.mark.parametrize(
    ("chosen", "visibility"),
    [
        ({}, "recombined"),
        ({"temp": 0.7}, "isolated"),
        ({"weighting": "prior"}, "isolated"),
        ({"pruning": Pruning()}, "isolated"),
        ({"pruning": Pruning(), "visibility": "visible"}, "visible"),
        ({"branching": "replicate"}, "tree"),
    ],
)
def test_visibility_that_nobody_chose_is_the_best_that_goes_with_the_rest(chosen, visibility):
    settings = Settings(**chosen)
    assert settings.visibility == chosen.get("visibility")
    resolved = settings.resolved(PositionedModel.of(tiny_model("llama")))
    assert resolved.visibility == settings.to_dict()["visibility"] == visibility
