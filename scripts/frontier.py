"""What a text costs and how good it is: greedy decoding, beams, trees, recombined and merged sets.

For each prompt every mode makes its best text. Printed are means over prompts: log-probability
per token minus that of greedy decoding (paired, 95% t-interval), and rows computed. All prompts
of a mode share a batch.

    python scripts/frontier.py --prompts 40 --plot frontier.svg

Texts are kept in the JSON-lines file given by --runs and not made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tempo_mlx import Settings, load, stream_batch_generate
from tempo_mlx.cli.options import Overwrite
from tempo_mlx.cli.outputs import Output, check_outputs, picture
from tempo_mlx.generation import Failure
from tempo_mlx.plots import check_plot
from tempo_mlx.plots.figure import COMPARED, GREY, look, save
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Constant

import numpy as np
import typer
from kept import Kept
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from scipy import stats
from stock import logprob

PROMPTS = Path(__file__).with_name("prompts.txt")

#: What the picture is called in its metadata.
KIND = "frontier"

#: No token is less probable.
ANY = 1e-9


@dataclass(frozen=True)
class Mode:
    """A way to make a text: its name, the family it is drawn with, and its settings."""

    name: str
    family: str
    settings: Settings


def modes(tokens: int) -> list[Mode]:
    """Greedy, beams, trees and sets, from cheap to dear."""

    def beam(width: int) -> Mode:
        settings = Settings(
            visibility="tree",
            threshold=ANY,
            beam_width=width,
            max_parallel=width,
            max_tokens=tokens,
        )
        return Mode(f"beam {width}", "beam", settings)

    def tree(threshold: float, leaves: int, margin: float) -> Mode:
        settings = Settings(
            visibility="tree",
            threshold=threshold,
            beam_width=leaves,
            beam_margin=margin,
            max_tokens=tokens,
        )
        return Mode(f"tree {threshold}, {leaves} leaves, margin {margin}", "tree", settings)

    def sets(visibility: str, threshold: float, pruning: Pruning | None = None) -> Mode:
        settings = Settings(
            visibility=visibility, threshold=threshold, pruning=pruning, max_tokens=tokens
        )
        name = f"{visibility} {threshold}"
        if pruning is None:
            return Mode(name, visibility, settings)
        return Mode(f"{name}, posterior pruning", "merged, pruned", settings)

    posterior = Pruning(schedule=Constant())
    return [
        Mode("greedy", "greedy", Settings(threshold=1.0, max_tokens=tokens)),
        *(beam(width) for width in (2, 4, 8)),
        *(tree(0.1, 8, margin) for margin in (1.0, 2.0, 4.0)),
        *(sets("recombined", threshold) for threshold in (0.2, 0.1, 0.05)),
        *(sets("isolated", threshold, posterior) for threshold in (0.2, 0.1, 0.05)),
    ]


def main(
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
    prompts: Annotated[int, typer.Option(help="Prompts of scripts/prompts.txt, 2 to 100.")] = 40,
    tokens: Annotated[int, typer.Option(help="Steps of each run.")] = 20,
    runs: Annotated[Path, typer.Option(help="File that keeps the texts.")] = Path("frontier.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Draw quality against rows computed.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare the quality of texts and the rows that they cost."""
    texts = PROMPTS.read_text().splitlines()[:prompts]
    if plot is not None:
        check_plot(plot)
    check_outputs([Output("--plot", plot, picture(KIND))], {"--runs": runs}, overwrite)
    kept = Kept(runs)
    language_model, tokenizer = load(model)
    setting, chosen = [model, tokens], modes(tokens)
    for mode in track(chosen, "Decoding", console=Console(stderr=True)):
        todo = [text for text in texts if not kept.find(setting, mode.name, text)]
        outcomes = stream_batch_generate(language_model, tokenizer, todo, mode.settings, paths=1)
        for i, result in outcomes:
            if isinstance(result, Failure):
                raise SystemExit(result.error)
            path, lattice = result.paths(1)[0], result.lattice
            measured = {
                "logprob": logprob(language_model, lattice.prompt_tokens, path.tokens),
                "tokens": len(path.tokens),
                "rows": lattice.n_tokens,
            }
            kept.add(setting, mode.name, todo[i], measured)

    print(f"{len(texts)} prompts x {tokens} steps, {model}")
    print("| mode | nats per token over greedy | rows computed | tokens |")
    print("|---|---|---|---|")
    points = []
    base = np.array([kept.find(setting, "greedy", text)["logprob"] for text in texts])
    for mode in chosen:
        taken = [kept.find(setting, mode.name, text) for text in texts]
        gain = np.array([each["logprob"] for each in taken]) - base
        rows = float(np.mean([each["rows"] for each in taken]))
        length = float(np.mean([each["tokens"] for each in taken]))
        half = float(stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain))
        points.append((mode, rows, float(gain.mean()), half))
        cell = "0" if mode.name == "greedy" else f"{gain.mean():+.3f} ± {half:.3f}"
        print(f"| {mode.name} | {cell} | {rows:.1f} | {length:.1f} |")
    if plot is not None:
        draw(points, plot)


def draw(points: list[tuple[Mode, float, float, float]], path: Path) -> None:
    """Quality against rows computed, a line for each family."""
    with look():
        save(frontier_figure(points), path, KIND)


def frontier_figure(points: list[tuple[Mode, float, float, float]]) -> Figure:
    """The figure that :func:`draw` saves."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COMPARED)
    for family in dict.fromkeys(mode.family for mode, *_ in points):
        own = sorted(point[1:] for point in points if point[0].family == family)
        rows, gains, halves = zip(*own, strict=True)
        axes.errorbar(rows, gains, halves, marker="o", capsize=3, label=family)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks([20, 40, 80, 160], labels=["20", "40", "80", "160"])
    axes.minorticks_off()
    axes.set_xlabel("rows computed for a text")
    axes.set_ylabel("nats per token over greedy decoding")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    typer.run(main)
