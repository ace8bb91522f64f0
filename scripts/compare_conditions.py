"""Compare two visibilities on the same prompts: sizes of their sets, and how far they drift apart.

python scripts/compare_conditions.py --conditions isolated,visible
"""

import tempfile
from pathlib import Path
from typing import Annotated

from tempo_mlx import load
from tempo_mlx.experiments.session import Session
from tempo_mlx.experiments.suite import Suite
from tempo_mlx.experiments.tables import load_tables

import typer
from scipy import stats

PROMPTS = Path(__file__).with_name("prompts.txt")


def main(
    conditions: Annotated[str, typer.Option(help="Two visibilities.")] = "isolated,visible",
    modes: Annotated[str | None, typer.Option(hidden=True)] = None,
    prompts: Annotated[int, typer.Option(help="Prompts to use, at least 2.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Steps of each run.")] = 10,
    threshold: Annotated[float, typer.Option(help="Of the sets.")] = 0.1,
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
) -> None:
    if modes is not None:
        typer.echo("warning: --modes is now --conditions", err=True)
        conditions = modes
    suite = Suite.model_validate(
        {
            "name": "compare-conditions",
            "model": model,
            "prompts": {"prompts": PROMPTS.read_text().splitlines()[:prompts]},
            "settings": {"max_tokens": max_tokens, "threshold": threshold},
            "grid": {"visibility": conditions.split(",")},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        Session(suite, Path(folder), *load(model)).run()
        tables = load_tables(Path(folder))

    # A prompt is one observation: the mean size of its sets.
    runs = tables.runs.assign(size=tables.runs["n_tokens"] / tables.runs["n_steps"])
    first, second = conditions.split(",")
    sizes = runs.pivot(index="prompt_id", columns="condition", values="size")
    test = stats.ttest_rel(sizes[first], sizes[second])
    low, high = test.confidence_interval()
    print(
        f"tokens in a set: {first} {sizes[first].mean():.3f}, {second} {sizes[second].mean():.3f}"
    )
    difference = (sizes[first] - sizes[second]).mean()
    print(f"difference {difference:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]")
    print(f"step  KL({first}||{second})  KL({second}||{first})  nats, median over prompts")
    for step, kl in tables.kl.groupby("step")[["kl_ab", "kl_ba"]].median().iterrows():
        print(f"{step:4}  {kl['kl_ab']:.4f}  {kl['kl_ba']:.4f}")


if __name__ == "__main__":
    typer.run(main)
