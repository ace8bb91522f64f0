"""``tempo-mlx schedule``: the curve of a schedule, in the terminal and as a picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..arguments import check_count, check_range
from ..io.console import Console
from ..needs import Need
from ..plots import check_plot, plot_schedule
from ..rules.schedules import parse_schedule
from .effects import require_effect
from .options import Overwrite
from .outputs import Output, check_outputs, picture, say_written

#: Rows of the curve in the terminal, an odd number, so one row is at half the base.
ROWS = 13

#: Most steps of a run, each of which is a line of the table.
MOST_STEPS = 100_000

#: Fewest and most columns of the curve; more are not easier to read.
FEWEST_COLUMNS, MOST_COLUMNS = 10, 100

#: Bits of the dots of a Braille character, [row][column], over U+2800.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def register(app: typer.Typer) -> None:
    app.command("schedule")(schedule)


def schedule(
    context: typer.Context,
    schedule: Annotated[
        str,
        typer.Argument(
            metavar="SCHEDULE",
            help="constant, bezier(p1,p2) with p1, p2 in [0, 1], or relu(activation) with "
            "activation in [0, 1). Quote it: the shell reads parentheses.",
        ),
    ],
    steps: Annotated[
        int,
        typer.Option("--steps", "-n", help=f"Steps of the run, in [1, {MOST_STEPS}]."),
    ] = 50,
    base: Annotated[
        float,
        typer.Option(metavar="THRESHOLD", help="Threshold where the curve is 1, in (0, 1]."),
    ] = 1.0,
    values: Annotated[
        bool, typer.Option("--values", help="Print the threshold of every step as a table.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Save the curve as a picture: .png, .svg or .pdf. Needs Matplotlib."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print only the values, as JSON.")
    ] = False,
) -> None:
    """Show how a schedule moves a threshold over a run.

    The threshold at a step is base x f(t) with t = step / steps. Steps count from 0, so a run ends
    one step before t = 1, which is the last value shown.
    """
    require_effect(context, {"values": (Need("as_json", absent=True),)})
    curve = parse_schedule(schedule)
    check_count("--steps", steps, most=MOST_STEPS)
    check_range("--base", base, 0.0, 1.0, low_open=True)
    if plot is not None:
        check_plot(plot)
    check_outputs([Output("--plot", plot, picture("schedule"))], {}, overwrite)
    found = [(step, step / steps, base * curve(step / steps)) for step in range(steps + 1)]
    if as_json:
        entries = [{"step": step, "t": t, "threshold": value} for step, t, value in found]
        data = {"schedule": str(curve), "steps": steps, "base": base, "values": entries}
        typer.echo(json.dumps(data, indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(Text(f"threshold = {base:g} x {curve}", style="bold"))
        print_curve(curve, steps, base, console)
        if values:
            console.print(table(found))
    if plot is not None:
        plot_schedule(curve, steps, base, plot)
        say_written(plot, Console(stderr=True, highlight=False, soft_wrap=True))


def print_curve(curve: Callable[[float], float], steps: int, base: float, console: Console) -> None:
    """Print the curve with axes, as wide as the console."""
    fine = "utf" in console.encoding.lower()
    corner, level, upright = "└─│" if fine else "+-|"
    marks = {0: f"{base:g}", ROWS // 2: f"{base / 2:g}", ROWS - 1: "0"}
    margin = max(len(mark) for mark in marks.values())
    room = console.width - margin - 2
    columns = max(FEWEST_COLUMNS, min(MOST_COLUMNS, room))
    for row, line in enumerate(draw(curve, columns, ROWS, fine)):
        axis = f"{marks.get(row, ''):>{margin}} {upright}"
        console.print(Text.assemble((axis, "dim"), (line, "cyan")))
    console.print(Text(f"{'':{margin}} {corner}{level * columns}", style="dim"))
    end = str(steps)
    ticks = f"0{'step':^{columns - 1 - len(end)}}{end}"
    console.print(Text(f"{'':{margin}}  {ticks}", style="dim"))


def draw(curve: Callable[[float], float], columns: int, rows: int, fine: bool) -> list[str]:
    """The curve as lines of characters, the topmost first.

    Args:
        curve: values in [0, 1] over [0, 1].
        columns, rows: characters.
        fine: eight dots to a character, in Braille; otherwise one asterisk.
    """
    across, down = (2, 4) if fine else (1, 1)
    width, height = columns * across, rows * down
    levels = [round(curve(x / (width - 1)) * (height - 1)) for x in range(width)]
    cells = [[0] * columns for _ in range(rows)]
    for x, level in enumerate(levels):
        before = levels[max(0, x - 1)]
        # In steep parts, dots above or below connect it to the previous column.
        for y in range(min(level, before + 1), max(level, before - 1) + 1):
            row, dot = divmod(height - 1 - y, down)
            cells[row][x // across] |= DOTS[dot][x % across]
    return ["".join(character(bits, fine) for bits in line).rstrip() for line in cells]


def character(dots: int, fine: bool) -> str:
    if not dots:
        return " "
    return chr(0x2800 + dots) if fine else "*"


def table(values: list[tuple[int, float, float]]) -> Table:
    """Steps, moments and thresholds."""
    found = Table(box=None)
    for name in ("step", "t", "threshold"):
        found.add_column(name, justify="right")
    for step, t, value in values:
        found.add_row(str(step), f"{t:.3f}", f"{value:.4f}")
    return found
