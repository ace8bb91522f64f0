"""``tempo-mlx doctor``: what is installed, what is missing, and whether every mode is exact."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..doctor.checks import (
    ATTENTION_TOLERANCE,
    FORMS,
    TOLERANCE,
    Check,
    request_full_precision,
    run_checks,
)
from ..doctor.report import Finding, examine
from ..io.console import Console
from ..needs import Need
from .effects import require_effect

#: Version of --json's output.
SCHEMA = 1


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    context: typer.Context,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check on this device, in about a minute, that every mode is exact in fp32, fp16, "
            "bf16 and 4 bits. Exit code 1 if one is not.",
        ),
    ] = False,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="With --check: also check models that are slow on this device.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Report versions, device and speed, and what is missing.

    Instructions for fixing what is missing follow the table. With --check, runs are compared with
    an uncached replay, with stock mlx-lm and with NumPy.
    """
    require_effect(context, {"everything": (Need("check"),)})
    if check:
        # The setting must precede the first product of the process.
        request_full_precision()
    console = Console(highlight=False)
    findings = examine()
    if not as_json:
        print_findings(findings, console)
    checks = list(with_progress(everything)) if check else []
    if as_json:
        print(json.dumps(to_dict(findings, checks, check), indent=1))
    elif check:
        print_checks(checks, console)
    if any(one.failed for one in checks):
        raise typer.Exit(1)


def with_progress(everything: bool) -> list[Check]:
    """Run the checks, with a bar on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("checking {task.description:30}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        # The number of checks depends on the device and is not known in advance.
        task = progress.add_task("", total=None)

        def tell(what: str) -> None:
            progress.update(task, description=what)

        return list(run_checks(everything, tell))


def to_dict(findings: Sequence[Finding], checks: Sequence[Check], checked: bool) -> dict[str, Any]:
    """The output of --json."""
    return {
        "schema": SCHEMA,
        "findings": [asdict(finding) for finding in findings],
        "missing": [finding.topic for finding in findings if finding.missing],
        "checks": [check_to_dict(one) for one in checks] if checked else None,
    }


def check_to_dict(check: Check) -> dict[str, Any]:
    difference = check.difference
    # JSON has no NaN; the verdict and the note show the failure.
    if difference is not None and not isfinite(difference):
        difference = None
    return {**asdict(check), "difference": difference, "verdict": check.verdict}


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.topic, Text(finding.value, "yellow" if finding.missing else ""))
    console.print(table)
    missing = [finding for finding in findings if finding.missing]
    for finding in missing:
        console.print(f"{finding.topic}: {finding.remedy}", style="yellow")
    if not missing:
        console.print("Nothing is missing.", style="green")


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Print one table for each model, with oracles as rows and precisions as columns."""
    for name in dict.fromkeys(check.model for check in checks):
        mine = [check for check in checks if check.model == name]
        forms = [form for form in FORMS if any(check.form == form for check in mine)]
        table = Table(title=name, title_justify="left")
        table.add_column("largest difference")
        for form in forms:
            table.add_column(form, justify="right", no_wrap=True)
        found = {(check.oracle, check.form): check for check in mine}
        for oracle in dict.fromkeys(check.oracle for check in mine):
            cells = [found.get((oracle, form)) for form in forms]
            table.add_row(oracle, *(cell_of(cell) for cell in cells))
        if forms:
            console.print(table)
    for check in checks:
        if check.failed or check.difference is None or "differ" in check.note:
            console.print(f"{check.model} {check.form}, {check.oracle}: {check.note}")
    limits = ", ".join(f"{limit:g} in {str(dtype)[9:]}" for dtype, limit in TOLERANCE.items())
    console.print(
        f"Logits may differ by {limits}, in standard deviations of the model's logits; "
        f"attention weights by {ATTENTION_TOLERANCE:g}.",
        style="dim",
    )
    n_failed = sum(check.failed for check in checks)
    n_run = sum(check.tolerance is not None and check.difference is not None for check in checks)
    if n_failed:
        console.print(f"{n_failed} of {n_run} checks FAILED", style="bold red")
    else:
        console.print(f"{n_run} checks ok", style="bold green")


def cell_of(check: Check | None) -> Text:
    if check is None:
        return Text()
    if check.difference is None:
        return Text("skipped")
    difference = f"{check.difference:.1e}" if check.difference else "0"
    cell = Text(difference)
    if style := {"ok": "green", "FAIL": "bold red"}.get(check.verdict):
        cell.append(f" {check.verdict}", style)
    return cell
