"""Command-line output shared by the benches: progress, tables, targets."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from ..arguments import check_count
from ..bench.result import Result, Row, Spread, Target
from ..bench.setting import Progress as Told
from ..bench.setting import Subject
from ..errors import TempoError
from ..io.console import Console
from ..weights import load
from .outputs import Output, check_outputs, is_standard_output, json_where, say_written, write_json

#: Unit of a measurement -> units for display and their sizes, largest first.
SCALES = {
    "s": (("s", 1.0), ("ms", 1e-3)),
    "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
    "bytes/s": (("GB/s", 1e9), ("MB/s", 1e6)),
}

#: Significant digits of a measurement.
DIGITS = 4


def numbers(text: str, argument: str, least: int, most: int) -> list[int]:
    """Parse integers in [least, most] such as "1,2,4", without duplicates, in the given order.

    Raises:
        TempoError: if the text is anything else.
    """
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise TempoError(
            f"{argument} must be integers of at least {least} separated by commas, got {text!r}"
        )
    check_count(argument, max(found), least, most)
    return found


class Bar(Told):
    """A progress bar."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task = progress, task
        self._done = 0

    def expect(self, ticks: int) -> None:
        self._progress.update(self._task, total=ticks)

    def tick(self, what: str) -> None:
        self._progress.update(self._task, completed=self._done, description=what)
        self._done += 1


@contextmanager
def ticking() -> Iterator[Told]:
    """A progress bar; shown only on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, progress.add_task("", total=None))


def check_result(bench: str, output: Path | None, overwrite: bool) -> None:
    """Refuse to replace a file that is not an earlier result of the same bench."""
    ours = json_where(lambda data: data.get("bench") == bench and "targets" in data)
    check_outputs([Output("--output", output, ours)], {}, overwrite)


def measure_model(
    bench: str,
    model: str,
    rounds: int,
    output: Path | None,
    overwrite: bool,
    run: Callable[[Subject], Result],
    dtype: mx.Dtype | None = None,
) -> None:
    """Load a model, cast its weights to ``dtype`` if given, measure it, and show the result."""
    check_result(bench, output, overwrite)
    language_model, tokenizer = load(model)
    if dtype is not None:
        language_model.set_dtype(dtype)
    with ticking() as progress:
        result = run(Subject.of(language_model, tokenizer, model, rounds, progress))
    conclude(result, output)


def conclude(result: Result, output: Path | None) -> None:
    """Print the result and write it to the output; if that is standard output, print only JSON."""
    console = Console(highlight=False, quiet=is_standard_output(output))
    setting = result.setting
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    names = {"prompt_tokens": "prompt tokens", "max_tokens": "steps", "rounds": "rounds"}
    sizes = ", ".join(f"{setting[key]} {name}" for key, name in names.items() if key in setting)
    console.print(
        f"{result.model} ({setting['architecture']}, {setting['dtype']}) on {setting['device']}\n"
        f"{versions}, BLAS {setting['blas']}\n"
        f"{sizes}; median [quartiles]"
    )
    for group in dict.fromkeys(row.group for row in result.rows):
        console.print(table_of([row for row in result.rows if row.group == group]))
    console.print(targets_of(result.targets))
    if output is not None:
        write_json(output, result.to_dict())
        say_written(output, console)


def table_of(rows: Sequence[Row]) -> Table:
    """A table of one group, with a row for each variant and a column for each measure and ratio."""
    cells: dict[str, dict[str, str]] = {row.name: {} for row in rows}
    columns: dict[str, None] = {}
    for measure in dict.fromkeys(row.measure for row in rows):
        same = [row for row in rows if row.measure == measure]
        unit, scale = unit_of(same)
        header = f"{measure}, {unit}" if unit else measure
        for row in same:
            found = {header: shown(row.spread, scale)}
            found |= {f"{measure} over {of}": shown(each) for of, each in row.ratios.items()}
            cells[row.name] |= found
            columns |= dict.fromkeys(found)
    table = Table("variant", title=rows[0].group)
    for column in columns:
        table.add_column(column, justify="right")
    for name, line in cells.items():
        table.add_row(name, *(line.get(column, "") for column in columns))
    return table


def unit_of(rows: Sequence[Row]) -> tuple[str, float]:
    """The unit for displaying measurements, and its size in their unit."""
    largest = max(abs(row.median) for row in rows)
    scales = SCALES.get(rows[0].unit, ((rows[0].unit, 1.0),))
    return next((each for each in scales if largest >= each[1]), scales[-1])


def shown(value: Spread, scale: float = 1.0) -> str:
    """Median and quartiles, "1.02 [1.01, 1.04]"; the median alone if all are the same."""
    median, low, high = (digits(each / scale) for each in (value.median, value.low, value.high))
    return median if value.low == value.high else f"{median} [{low}, {high}]"


def digits(number: float) -> str:
    """A number with :data:`DIGITS` significant digits and thousands separators."""
    if not math.isfinite(number):
        return str(number)
    if number == int(number) or abs(number) >= 10**DIGITS:
        return f"{number:,.0f}"
    if abs(number) < 1e-3:
        return f"{number:.1e}"
    return f"{number:,.{DIGITS - 1 - math.floor(math.log10(abs(number)))}f}"


def targets_of(wanted: Sequence[Target]) -> Table:
    """A table of targets and measured values."""
    table = Table("target", "wanted", "found", "")
    for target in wanted:
        verdict = Text("met", "green") if target.met else Text("not met", "yellow")
        table.add_row(
            target.name, f"{target.relation} {target.wanted:.2f}", f"{target.value:.3f}", verdict
        )
    return table
