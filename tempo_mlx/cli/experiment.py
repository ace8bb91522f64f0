"""``tempo-mlx experiment``: suites of many runs, stored, analysed and reported."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..arguments import parse_bytes, shown
from ..errors import MissingExtraError, TempoError
from ..io.console import Console
from ..io.files import STANDARD_OUTPUT, write_atomically
from ..needs import Need, Needs
from ..text.printable import json_text
from ..weights import load
from .effects import require_effect
from .experiment_analysis import MISSING, analyze, plot, report
from .options import AdapterPath, Overwrite, output_file
from .outputs import Output, check_outputs, json_where

#: Packages of the extra ``experiments`` that runs of suites need.
NEEDED = ("pandas", "psutil", "pyarrow", "pydantic", "yaml")

#: Default folder of suites.
RUNS = Path("runs")

_HERE = Need("scheduler", absent=True)

#: Conditions under which options of `run` have an effect.
RUN_OPTIONS: Needs = {
    "runner": (_HERE,),
    "batch_size": (_HERE, Need("runner", ("batched",))),
    "max_kv_bytes": (_HERE, Need("runner", ("batched", "sequential"))),
    "adapter_path": (_HERE, Need("runner", ("batched", "sequential"))),
    "max_disk": (Need("capture", ("none",), absent=True),),
}

app = typer.Typer(
    name="experiment",
    help="Run suites of prompts, settings and seeds from one file, analyse them and write reports.",
    no_args_is_help=True,
)


def register(parent: typer.Typer) -> None:
    for command in (analyze, plot, report):
        app.command()(command)
    parent.add_typer(app)


def require_extra() -> None:
    """Raise MissingExtraError unless the packages that suites need are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(MISSING.format(", ".join(missing)))


@app.command("run")
def run(
    context: typer.Context,
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A suite's YAML file, or a built-in suite.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of the suite; finished runs in it are kept. Default: runs/ and the "
            "suite's name.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Recipe, folder or Hub id, instead of the suite's own model."),
    ] = None,
    adapter_path: AdapterPath = None,
    runner: Annotated[
        str,
        typer.Option(
            metavar="batched|sequential|workers=N",
            help="Run as rows of one batch, one after another, or in N processes that each load "
            "the model. The results are the same.",
        ),
    ] = "batched",
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT",
            help="Run on a Dask cluster instead. All machines need the extra cluster; give each "
            "worker one thread.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Rows of a batch, at least 1; with --runner batched.")
    ] = 64,
    max_kv_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for keys, values and states, such as 800MB; default: half of the memory.",
        ),
    ] = None,
    capture: Annotated[
        str | None,
        typer.Option(
            metavar="reductions|full|none",
            help="What to store besides the tokens, instead of the suite's captures: attention "
            "received, its entropy by head, the most probable tokens and divergences "
            "(reductions); attention matrices as well (full); or nothing (none).",
        ),
    ] = None,
    max_disk: Annotated[
        str, typer.Option(metavar="SIZE", help="Refuse to start if captures may take more.")
    ] = "10GB",
    cross_validate: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of the runs to repeat alone and compare in tokens, probabilities and "
            "captures, in [0, 1]. A mismatch fails the suite.",
        ),
    ] = 0.0,
) -> None:
    """Run a suite, or resume it.

    You can stop it at any time and rerun the same command to resume. Failed runs are retried. Exit
    code 1 if a run failed or a comparison found a mismatch.
    """
    require_extra()
    from ..experiments.session import RUNNERS, STARTING, Options, Session, Status
    from ..experiments.store import check_folder, free_bytes
    from ..experiments.suite import CAPTURES
    from ..experiments.suite_files import read_suite

    kind, _, count = runner.partition("=")
    counted = count.isdecimal() and len(count) < 10 if kind == "workers" else not count
    if kind not in RUNNERS or not counted or "=" in runner and not count:
        raise TempoError(
            f"--runner must be batched, sequential or workers=N with N at least 1, got "
            f"{shown(runner)}"
        )
    if capture is not None and capture not in CAPTURES:
        raise TempoError(f"--capture must be one of {', '.join(CAPTURES)}, got {capture!r}")
    options = Options(
        runner=kind,
        workers=int(count or 1),
        scheduler=scheduler,
        batch_size=batch_size,
        max_kv_bytes=parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None,
        cross_validate=cross_validate,
        max_disk=parse_bytes(max_disk, "--max-disk"),
    )
    given = {"model": model, "captures": capture}
    wanted = read_suite(suite).model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    require_effect(context, RUN_OPTIONS, {"capture": wanted.captures})
    if output == Path("-"):
        raise TempoError("--output - is standard output; name a folder")
    folder = output if output is not None else RUNS / wanted.name
    check_folder(folder)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    plan = wanted.expand()
    for note in plan.notes:
        notes.print(f"note: {note}", style="yellow")
    language_model, tokenizer = load(wanted.model, adapter_path=adapter_path)
    session = Session(wanted, folder, language_model, tokenizer, options)
    del language_model
    notes.print(
        f"{wanted.name}: {len(plan.runs)} runs, {options}, into {folder}; captures "
        f"{wanted.captures}, at most {session.capture_bytes / 1e6:.1f} MB",
        style="dim",
    )
    if session.capture_bytes > (free := free_bytes(folder)):
        notes.print(f"note: {free / 1e6:.1f} MB are free there", style="yellow")
    with Progress(
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("runs, {task.fields[told]}"),
        TimeRemainingColumn(),
        console=notes,
        disable=not notes.is_terminal,
    ) as progress:
        bar = progress.add_task("", total=len(plan.runs), told="")

        def tell(status: Status) -> None:
            if status.what == STARTING and status.done:
                notes.print(f"{status.done} of {status.total} runs are done already", style="dim")
            told = status.what + (f", {status.failed} failed" if status.failed else "")
            progress.update(bar, completed=status.done + status.failed, told=told)

        try:
            summary = session.run(tell)
        except KeyboardInterrupt:
            notes.print("stopped; rerun the same command to resume", style="yellow")
            raise
    out = Console(highlight=False, soft_wrap=True)
    out.print(
        f"{summary.done} of {summary.total} runs are done, {summary.made} now in "
        f"{summary.seconds:.1f} s; {folder} holds {summary.nbytes / 1e6:.1f} MB"
    )
    for run_id, error in summary.errors.items():
        out.print(f"failed: {run_id}: {error}", style="red")
    found = summary.validation
    if found is not None:
        largest = ", ".join(f"{name} {value:.2g}" for name, value in found.differences.items())
        out.print(
            f"{found.runs} runs repeated alone: largest differences {largest}; "
            f"tolerance {found.tolerance:g}, {len(found.mismatches)} mismatches"
        )
        for run_id, why in found.mismatches.items():
            out.print(f"mismatch: {run_id}: {why}", style="red")
    if summary.errors or (found is not None and found.mismatches):
        raise typer.Exit(1)


@app.command("status")
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a suite.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print only JSON.")] = False,
) -> None:
    """Show the progress of a suite: runs by state, failures, time left."""
    require_extra()
    from ..experiments.progress import read_progress
    from ..experiments.store import DONE, FAILED

    found = read_progress(folder)
    if as_json:
        typer.echo(json_text(found.to_dict(), indent=1))
        return
    out = Console(highlight=False, soft_wrap=True)
    told = ", ".join(f"{n} {state}" for state, n in found.counts.items() if n)
    out.print(f"{found.suite}: {found.total} runs, {told}")
    if found.counts[DONE] + found.counts[FAILED] < found.total:
        out.print("a command is running" if found.in_use else "no command is running")
        if found.seconds_left is not None:
            left = _duration(found.seconds_left)
            out.print(f"about {left} left at the pace of the latest command")
    for run_id, error in found.failures.items():
        out.print(f"failed: {run_id}: {error}", style="red")


@app.command("schema")
def schema(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", parser=output_file, help="Write it to this file."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print the JSON Schema of suite files, for editors that check YAML."""
    require_extra()
    from ..experiments.suite_files import json_schema

    found = json_schema()
    ours = json_where(lambda data: all(data.get(k) == found[k] for k in ("$schema", "title")))
    check_outputs([Output("--output", output, ours)], {}, overwrite)
    write_atomically(output or STANDARD_OUTPUT, json.dumps(found, indent=1) + "\n")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
