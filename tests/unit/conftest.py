"""What tests with tiny models share."""

from pathlib import Path

from tempo_mlx.experiments import analysis
from tests.tiny_folder import save_tiny_model

import pytest
from pandas import DataFrame

#: Modules that start processes, analyse suites of experiments or compare hundreds of runs.
THOROUGH = """
    batching bench blas cli_experiment cli_generate cli_outputs cli_prompts doctor
    experiment_analysis experiment_report experiment_runners experiment_store recipes scoring
    search_text stopping truecase
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    modules = {f"test_{name}" for name in THOROUGH.split()}
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem in modules:
            item.add_marker("thorough")


@pytest.fixture(scope="module", autouse=True)
def never_compiled(uncompiled):
    """All models here are tiny."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def without_checks(monkeypatch):
    """Analyses leave out other rules of matching and mixed models, most of their time."""
    monkeypatch.setattr(analysis, "OTHER_RULES", ())
    no_models = analysis.models(DataFrame(columns=["condition"]), [])
    monkeypatch.setattr(analysis, "models", lambda seen, pairs: no_models)
