"""``tempo-mlx schedule``: the curve in the terminal, its values, its picture, bad input."""

import json
import sys

from tempo_mlx import cli
from tempo_mlx.cli.schedule import draw
from tempo_mlx.rules.schedules import Bezier, Constant, Relu, parse_schedule

import pytest


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


@pytest.mark.parametrize("text", ["bezier(0.2,0.8)", "relu(0.5)", "constant"])
def test_json_is_the_schedule_times_the_base(run, text):
    code, out, err = run("schedule", text, "--steps", 20, "--base", 0.4, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert (data["schedule"], data["steps"], data["base"]) == (text, 20, 0.4)
    assert [entry["step"] for entry in data["values"]] == list(range(21))
    curve = parse_schedule(text)
    for entry in data["values"]:
        assert entry["t"] == entry["step"] / 20
        assert entry["threshold"] == pytest.approx(0.4 * curve(entry["t"]))


def test_table_has_a_row_for_each_step(run):
    _, plain, _ = run("schedule", "relu(0.5)", "--steps", 4)
    code, out, _ = run("schedule", "relu(0.5)", "--steps", 4, "--values")
    assert code == 0 and out.startswith(plain)
    rows = [line.split() for line in out.removeprefix(plain).splitlines()]
    assert rows[0] == ["step", "t", "threshold"]
    assert [float(row[2]) for row in rows[1:]] == [0, 0, 0, 0.5, 1]


@pytest.mark.parametrize("width", [30, 80, 300])
def test_plot_is_as_wide_as_the_terminal_but_no_wider_than_is_readable(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = run("schedule", "bezier(0.2,0.8)", "--base", 0.25)
    widest = max(len(line) for line in out.splitlines()[1:])
    assert widest <= width and widest >= min(width, 100) - 1
    assert "0.25 │" in out and out.rstrip().endswith("50") and "\x1b" not in out


def test_terminals_without_unicode_get_plain_characters(run, monkeypatch):
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    _, out, _ = run("schedule", "bezier(0.2,0.8)")
    assert out.isascii() and "*" in out


@pytest.mark.parametrize("curve", [Constant(), Bezier(1, 0), Bezier(0, 0), Relu(0.9)])
@pytest.mark.parametrize("fine", [True, False])
def test_each_column_holds_the_curve(curve, fine):
    columns, rows = 40, 9
    lines = [line.ljust(columns) for line in draw(curve, columns, rows, fine)]
    assert len(lines) == rows
    for column in range(columns):
        marked = [row for row in range(rows) if lines[row][column] != " "]
        value = curve((column + 0.5) / columns)
        place = (1 - value) * (rows - 1)
        assert min(abs(row - place) for row in marked) <= 1.5
        # A curve has no gaps.
        assert marked == list(range(marked[0], marked[-1] + 1))


def test_plot_saves_a_picture(run, tmp_path):
    path = tmp_path / "curve.png"
    code, out, err = run("schedule", "bezier(0.2,0.8)", "--plot", path)
    assert code == 0 and path.read_bytes().startswith(b"\x89PNG")
    assert "curve.png" in err.replace("\n", "") and "threshold" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["line"], ["schedule", "line"]),
        (["bezier(2,0)"], ["p1", "[0, 1]", "2"]),
        (["relu(1)"], ["activation", "[0, 1)"]),
        (["constant", "--steps", "0"], ["--steps", "0"]),
        (["constant", "--base", "0"], ["--base", "(0, 1]"]),
        (["constant", "--base", "nan"], ["--base", "nan"]),
        (["constant", "--plot", "curve.gif"], ["--plot", "curve.gif", ".png"]),
        (["constant", "--plot", "no/such/curve.png"], ["--plot", "no/such/curve.png"]),
        ([], ["SCHEDULE"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, words):
    code, out, err = run("schedule", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_missing_matplotlib_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("schedule", "constant", "--plot", tmp_path / "curve.png")
    assert (code, out) == (2, "")
    line = "plots need Matplotlib: pip install 'tempo-mlx[plots]'"
    assert err == f"tempo-mlx: error: {line}\n"
