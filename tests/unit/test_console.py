"""Tables are whole on terminals of every width, and in pipes."""

import io

from tempo_mlx.io.console import Console

import pytest
from rich.table import Table

NUMBERS = ["+0.002 [-0.001, +0.005]", "1.20e-06 ok", "123,456.78"]
PATH = "/home/somebody/.cache/huggingface/hub/models--somebody--something-135M-4bit/snapshots"


def table() -> Table:
    found = Table("measure of something", title="effects")
    for name in ("controlled, of all pairs", "difference", "tokens/s, whole run"):
        found.add_column(name, justify="right")
    found.add_column("where", overflow="fold")
    found.add_row("surprisal of the siblings", *NUMBERS, PATH)
    found.add_row("entropy", *NUMBERS, "")
    return found


def printed(width: int, terminal: bool, what: object) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    console.print(what)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_tables_fit_a_terminal_and_show_every_number_in_one_piece(width):
    lines = printed(width, True, table())
    assert max(map(len, lines)) <= width
    assert all(sum(number in line for line in lines) == 2 for number in NUMBERS)
    text = "".join(lines)
    assert "…" not in text
    for word in ("measure", "surprisal", "siblings", "whole"):
        assert word in text


def test_a_narrow_terminal_names_each_cell_of_a_row():
    lines = printed(60, True, table())
    assert sum("123,456.78" in line and "tokens/s, whole run" in line for line in lines) == 2


def test_paths_break_and_lose_nothing():
    lines = printed(60, True, table())
    assert PATH in "".join(line.split("│")[2].strip() for line in lines if "│" in line)


def test_a_pipe_gets_each_row_and_each_sentence_in_a_line():
    lines = printed(60, False, table())
    assert sum(all(number in line for number in NUMBERS) for line in lines) == 2
    assert any(PATH in line for line in lines)
    assert printed(60, False, "word " * 50) == ["word " * 50]
