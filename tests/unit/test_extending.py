"""docs/extending.md: its files and commands, as they stand there."""

import re
import shlex
from pathlib import Path
from textwrap import dedent

from tempo_mlx.experiments.tables import load_tables

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
LONGEST_EXAMPLE = 20


def blocks():
    return [dedent(found[0]).strip("\n") for found in BLOCK.finditer(PAGE.read_text("utf-8"))]


FILES = {
    block[2 : block.index("\n")]: block.split("\n\n$ ")[0]
    for block in blocks()
    if block.startswith("# ")
}
COMMANDS = [line[2:] for block in blocks() for line in block.splitlines() if line[:2] == "$ "]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The current folder, with the page's files in it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_shows_a_rule_of_each_family_in_few_lines():
    assert FILES.keys() == {"near.py", "watched.py", "sharp.py", "short.py", "suite.yaml"}
    assert all(len(text.splitlines()) <= LONGEST_EXAMPLE for text in FILES.values())
    assert len(COMMANDS) == 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(run, page, folder, command):
    pytest.importorskip("pydantic")
    program, *arguments = shlex.split(command)
    assert program == "tempo-mlx"
    if "suite.yaml" in arguments:
        suite = page / "suite.yaml"
        suite.write_text(f"{suite.read_text()}\nmodel: {folder}\n")
    else:
        arguments += ["--model", folder]
    code, out, err = run(*arguments)
    assert code == 0, err
    if "--verify" in arguments:
        assert float(re.search(r"largest difference (\S+) of", err)[1]) < 1e-3
    if "--explain" in arguments:
        assert "pruned" in out
    if "suite.yaml" in arguments:
        assert "8 of 8 runs are done" in out
        runs = load_tables(page / "runs").runs
        assert set(runs["visibility"]) == {"isolated", "Near(steps=4)"}
