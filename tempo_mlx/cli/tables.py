"""What the benches share on the command line: progress, tables, targets."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..bench.decode_report import Report
from ..bench.target import Target
from ..bench.timing import Spread
from ..errors import TempoError
from ..io.console import Console
from .outputs import Output, check_outputs, is_standard_output, json_where, say_written, write_json


def parse_widths(text: str, argument: str = "--siblings", least: int = 1) -> list[int]:
    """Widths from "1,2,4"; each once, in the order given.

    Raises:
        TempoError: if one is not an integer of at least ``least``.
    """
    try:
        widths = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        widths = []
    if not widths or min(widths) < least:
        raise TempoError(
            f"{argument} must be integers of at least {least} separated by commas, got {text!r}"
        )
    return widths


@contextmanager
def ticking(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; yields what to call before each of ``total`` things."""
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
        task = progress.add_task("", total=total)
        done = iter(range(total))

        def tick(what: str) -> None:
            progress.update(task, completed=next(done, total), description=what)

        yield tick


def wide_console(output: Path | None = None) -> Console:
    """The console of a bench's tables; it is quiet where the output takes their place."""
    return Console(highlight=False, quiet=is_standard_output(output))


def spread(value: Spread, digits: int) -> str:
    """Median and quartiles: "1.02 [1.01, 1.04]"."""
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def print_decoding(report: Report, console: Console) -> None:
    print_setting(report.model, report.setting, console)
    console.print(
        f"weights {report.weight_bytes / 1e6:.1f} MB; "
        f"copying an array: {report.copy_bandwidth / 1e9:.1f} GB/s"
    )
    table = Table()
    table.add_column("variant", no_wrap=True)
    for name in ("tokens/s", "steps/s", "ms/step", "weights GB/s", "of copy", "peak GB", "slots"):
        table.add_column(name, justify="right")
    table.add_column("ms over mlx-lm's", justify="right")
    table.add_column("ms over one sibling's", justify="right")
    for m in report.measured:
        table.add_row(
            m.name,
            f"{m.tokens_per_second.median:.1f}",
            f"{m.steps_per_second.median:.1f}",
            f"{m.step_seconds.median * 1e3:.2f}",
            f"{m.weight_bandwidth / 1e9:.1f}",
            f"{m.weight_bandwidth / report.copy_bandwidth:.0%}",
            f"{m.peak_bytes / 1e9:.3f}",
            str(m.slots),
            spread(m.time_to_stock, 3),
            spread(m.time_to_one, 3),
        )
    console.print(table)
    if report.long is not None:
        print_long(report.long.block, report.long.stock, report.long.ours, console)


def print_setting(model: str, setting: dict[str, Any], console: Console) -> None:
    """What was measured, on what, and how."""
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    sizes = [
        f"{setting[key]} {name}"
        for key, name in (
            ("prompt_tokens", "prompt tokens"),
            ("max_tokens", "steps"),
            ("rounds", "rounds"),
        )
        if key in setting
    ]
    console.print(
        f"{model} ({setting['architecture']}, {setting['dtype']}) on {setting['device']}\n"
        f"{versions}, BLAS {setting['blas']}\n"
        f"{', '.join(sizes)}; median [quartiles]"
    )


class AnyReport(Protocol):
    """What the reports of all benches have."""

    @property
    def targets(self) -> Sequence[Target]: ...

    def to_dict(self) -> dict[str, Any]: ...


def check_report(bench: str, output: Path | None, overwrite: bool) -> None:
    """Refuse an output that holds anything but an earlier report of the same bench."""
    ours = json_where(lambda data: data.get("bench") == bench and "targets" in data)
    check_outputs([Output("--output", output, ours)], {}, overwrite)


def conclude(report: AnyReport, console: Console, output: Path | None) -> None:
    """Print the measurements beside what they should be, and write them all."""
    print_targets(report.targets, console)
    if output is not None:
        write_json(output, report.to_dict())
        say_written(output, console)


def print_targets(wanted: Sequence[Target], console: Console) -> None:
    """Measurements beside what they should be."""
    targets = Table("target", "wanted", "found", "")
    for target in wanted:
        verdict = Text("met", "green") if target.met else Text("not met", "yellow")
        targets.add_row(
            target.name, f"{target.relation} {target.wanted:.2f}", f"{target.value:.3f}", verdict
        )
    console.print(targets)


def print_long(block: int, stock: list[float], ours: list[float], console: Console) -> None:
    table = Table("steps", title="ms/step as the cache grows")
    for name in ("mlx-lm", "threshold 1", "ratio"):
        table.add_column(name, justify="right")
    for i, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        table.add_row(
            f"{i * block + 1}-{(i + 1) * block}",
            f"{theirs * 1e3:.2f}",
            f"{mine * 1e3:.2f}",
            f"{mine / theirs:.3f}",
        )
    console.print(table)
