"""What tests of the command line share."""

import sys

from tempo_mlx import cli
from tempo_mlx.experiments import analysis
from tests.tiny_folder import save_tiny_model

import mlx.core as mx
import pytest


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """On a CPU, mx.compile runs a C++ compiler, for longer than tiny models compute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


@pytest.fixture
def own_rules_only(monkeypatch):
    """Analyses leave out how sensitive they are to the rules of matching, half of their time."""
    monkeypatch.setattr(analysis, "OTHER_RULES", ())
