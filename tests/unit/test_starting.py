"""What happens before the first command runs: little is imported, and Ctrl-C ends it in a line."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Sends itself SIGINT when a module is imported, as if Ctrl-C were pressed in that moment.
INTERRUPTED = """
import importlib, runpy, signal, sys

def heard(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        signal.raise_signal(signal.SIGINT)

# A shell's background jobs ignore SIGINT, and so do their children unless they set it.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["tempo-mlx", "--help"]
sys.addaudithook(heard)
{start}
"""
SCRIPT = "importlib.import_module({module!r}).{function}()"
MODULE = "runpy.run_module('tempo_mlx', run_name='__main__')"


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def starts():
    """How the console script and ``python -m`` begin."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["tempo-mlx"].split(":")
    return [SCRIPT.format(module=module, function=function), MODULE]


@pytest.mark.parametrize("module", ["typer", "numpy", "mlx.core", "mlx_lm", "rich.progress"])
def test_an_interrupt_while_modules_are_imported_is_a_line(module):
    for start in starts():
        found = python(INTERRUPTED.format(module=module, start=start))
        assert (found.returncode, found.stdout) == (130, ""), found.stderr
        assert found.stderr == "tempo-mlx: error: interrupted\n"


def test_an_interrupt_that_the_shell_ignores_stays_ignored():
    ignoring = INTERRUPTED.replace("default_int_handler", "SIG_IGN")
    found = python(ignoring.format(module="mlx_lm", start=MODULE))
    assert found.returncode == 0 and "Usage" in found.stdout, found.stderr


def test_the_package_imports_a_module_when_a_name_of_it_is_used():
    code = """
import sys, tempo_mlx
assert not {"mlx", "mlx.core", "numpy", "typer"} & set(sys.modules)
assert set(tempo_mlx.__all__) < set(dir(tempo_mlx))
import tempo_mlx.search.settings
from tempo_mlx import *
import tempo_mlx.search.text
for name in tempo_mlx.__all__:
    assert callable(globals()[name]) and globals()[name] is getattr(tempo_mlx, name), name
assert tempo_mlx.search is sys.modules["tempo_mlx.search"].search
assert tempo_mlx.models is sys.modules["tempo_mlx.models"]
assert not hasattr(tempo_mlx, "no_such_name") and not hasattr(tempo_mlx, "__wrapped__")
"""
    found = python(code)
    assert found.returncode == 0, found.stderr
