"""docs/from-mlx-lm.md names every option of mlx-lm, and none of ours that is not there."""

import re
from pathlib import Path

from tempo_mlx.cli import load_command

import mlx_lm
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "from-mlx-lm.md"
OURS = {"generate": "generate", "chat": "chat", "server": "serve"}
#: An option where a parser is given one.
OPTION = re.compile(r'add_argument\(\s*"(--[a-z-]+)"')


def section(command):
    text = PAGE.read_text(encoding="utf-8")
    return text.split(f"## mlx_lm.{command}\n")[1].split("\n## ")[0]


def rows(command):
    lines = section(command).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]


@pytest.mark.parametrize("command", ["generate", "chat", "server", "evaluate"])
def test_every_option_of_mlx_lm_is_named(command):
    # The evaluation cannot be imported without packages that nothing here needs.
    source = (Path(mlx_lm.__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    theirs = set(OPTION.findall(source))
    assert len(theirs) > 10
    named = {option for row in rows(command) for option in re.findall(r"`(--[a-z-]+)`", row[0])}
    assert named == theirs


@pytest.mark.parametrize("command", OURS)
def test_options_that_are_the_same_are_there(command):
    ours = {option for each in load_command(OURS[command]).params for option in each.opts}
    for theirs, here, _ in rows(command):
        options = re.findall(r"`(--[a-z-]+)`", theirs if here.startswith("the same") else here)
        assert set(options) <= ours, here
