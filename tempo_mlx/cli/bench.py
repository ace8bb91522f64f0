"""``tempo-mlx bench``: speed and memory, measured here."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bench.decode import Report, bench_decode
from ..bench.timing import Spread
from ..files import check_writable, write_atomically
from ..models import load

#: Steps that --long decodes.
LONG_STEPS = 2000

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on this machine. Variants take turns in one process; the "
    "tables show medians and quartiles. Targets are printed, never enforced.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.add_typer(bench)


@bench.callback()
def group() -> None:
    """Keeps `decode` a command of its own where it is the only one."""


@bench.command("decode")
def decode(
    model: Annotated[
        str, typer.Option(help="Recipe name, folder in mlx-lm layout, or Hugging Face Hub id.")
    ] = "smollm2-135m",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", help="Tokens of the prompt, at least 1.")
    ] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "--steps",
            "-m",
            help="Steps of each run, at least 4. A step of N siblings adds N slots to the cache, "
            "so that attention costs more the longer a run is.",
        ),
    ] = 24,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            "--num-trials",
            "-n",
            help="Runs of each variant that count, at least 1; a first round warms up.",
        ),
    ] = 7,
    siblings: Annotated[
        str,
        typer.Option(help="Widths of the forced sets, at least 1 each, separated by commas."),
    ] = "1,2,4,8,16",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(DTYPES),
            help="Cast the weights; of a quantised model, what is not packed in bits. "
            "Default: as they are stored.",
        ),
    ] = None,
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help=f"Also decode {LONG_STEPS} steps on both sides and print the time per step in ten "
            "blocks: a rise beyond mlx-lm's is not attention over more slots.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the measurements as JSON.")
    ] = None,
) -> None:
    """Decoding speed of mlx-lm, of ours at threshold 1, and of forced sets of N siblings.

    Forced means that every step keeps exactly N tokens, whatever their probabilities. "1 sibling"
    are sets of one that the loop finds as it finds every set; at threshold 1 it knows beforehand
    that there is one, and starts the next pass early. Bandwidth is the weights' bytes over the
    time of a step, beside that of a plain copy of an array (read and written bytes).
    """
    widths = parse_widths(siblings)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if output is not None:
        check_writable("--output", output)
    language_model, tokenizer = load(model)
    if dtype is not None:
        language_model.set_dtype(DTYPES[dtype])
    blocks = 2 * 10 if long else 0
    with ticking((rounds + 1) * (2 + len(widths)) + blocks) as tick:
        report = bench_decode(
            language_model,
            tokenizer,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            rounds=rounds,
            siblings=widths,
            long_steps=LONG_STEPS if long else 0,
            model_name=model,
            progress=tick,
        )
    console = Console(highlight=False)
    print_report(report, console)
    if output is not None:
        write_atomically(output, json.dumps(report.to_dict(), indent=1) + "\n")
        console.print(f"written: {output}", style="dim")


def parse_widths(text: str) -> list[int]:
    """Widths from "1,2,4"; each once, in the order given.

    Raises:
        ValueError: if one is no integer of at least 1.
    """
    try:
        widths = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        widths = []
    if not widths or min(widths) < 1:
        raise ValueError(
            f"--siblings must be integers of at least 1 separated by commas, got {text!r}"
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


def spread(value: Spread, digits: int) -> str:
    """Median and quartiles: "1.02 [1.01, 1.04]"."""
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def print_report(report: Report, console: Console) -> None:
    setting = report.setting
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    console.print(
        f"{report.model} ({setting['architecture']}, {setting['dtype']}, weights "
        f"{report.weight_bytes / 1e6:.1f} MB) on {setting['device']}\n"
        f"{versions}, BLAS {setting['blas']}\n"
        f"{setting['prompt_tokens']} prompt tokens, {setting['max_tokens']} steps, "
        f"{setting['rounds']} rounds; median [quartiles]; "
        f"copying an array: {report.copy_bandwidth / 1e9:.1f} GB/s"
    )
    table = Table()
    table.add_column("variant", no_wrap=True)
    for name in ("tokens/s", "steps/s", "ms/step", "weights GB/s", "of copy", "peak GB", "slots"):
        table.add_column(name, justify="right")
    table.add_column("ms/step over mlx-lm's", justify="right", no_wrap=True)
    table.add_column("over threshold 1's", justify="right", no_wrap=True)
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
            spread(m.time_to_single, 3),
        )
    console.print(table)
    if report.long is not None:
        print_long(report.long.block, report.long.stock, report.long.ours, console)
    targets = Table("target", "wanted", "found", "")
    for target in report.targets:
        verdict = "[green]met[/green]" if target.met else "[yellow]not met[/yellow]"
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
