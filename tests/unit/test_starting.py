"""What happens before the first command runs: little is imported, and Ctrl-C ends it in a line."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from tempo_mlx.cli import COMMANDS, load_command

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
sys.argv = ["tempo-mlx", "generate", "--help"]
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


def test_the_help_imports_no_command():
    code = """
import sys
from tempo_mlx import cli
try:
    sys.argv = ["tempo-mlx", "--help"]
    cli.main()
except SystemExit as end:
    assert end.code == 0
assert not {"mlx.core", "mlx_lm", "transformers", "numpy"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("tempo_mlx.cli.")]
"""
    found = python(code)
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_says_what_a_command_says_of_itself(name):
    own = " ".join(load_command(name).help.split())
    assert own.startswith(COMMANDS[name])


def test_versions_are_printed():
    found = python(
        "import sys; sys.argv[1:] = ['--version']; from tempo_mlx import cli; cli.main()"
    )
    assert found.returncode == 0
    assert f"tempo-mlx {metadata.version('tempo-mlx')}" in found.stdout
    assert f"mlx-lm {metadata.version('mlx-lm')}" in found.stdout
