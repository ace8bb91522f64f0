"""How are siblings attended to? The built-in suite, its analysis, pictures and report.

python scripts/run_parallel_attention.py --output runs/parallel-attention
"""

from pathlib import Path
from typing import Annotated

from tempo_mlx import load
from tempo_mlx.cli.experiment_analysis import analyze, plot, report
from tempo_mlx.experiments.session import Options, Session
from tempo_mlx.experiments.suite_files import read_suite

import typer


def main(
    output: Annotated[Path, typer.Option(help="Folder; what is there is not done again.")] = Path(
        "runs/parallel-attention"
    ),
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
    suite: Annotated[str, typer.Option(help="Suite file or built-in suite.")] = (
        "parallel-attention"
    ),
) -> None:
    chosen = read_suite(suite).model_copy(update={"model": model})
    session = Session(chosen, output, *load(model), Options(cross_validate=0.1))
    for note in session.plan.notes:
        print(f"note: {note}")
    summary = session.run(lambda status: print(f"{status.done}/{status.total} {status.what}"))
    print(f"{summary.done} of {summary.total} runs are done, {summary.made} now")
    if summary.errors or (summary.validation and summary.validation.mismatches):
        raise SystemExit(f"failed: {summary.errors or summary.validation}")

    for command in (analyze, plot, report):
        command(output)


if __name__ == "__main__":
    typer.run(main)
