"""``tempo-mlx evaluate`` says in one line what is wrong."""

from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_extra_is_named(run):
    code, _, errors = run("evaluate", "--tasks", "arc_easy")
    assert code == 2
    assert "pip install 'tempo-mlx[eval]'" in errors
