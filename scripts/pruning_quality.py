"""What pruning rules do to the best text of a lattice, beside greedy decoding.

For each prompt every rule makes a lattice; its best path is rescored exactly. Printed are means
over prompts with 95% t-intervals: log-probability per token of the best path minus that of greedy
decoding (paired), the same for the chain that needs no rescoring, paths left, rows computed and
slots held. All rules but the default one keep the same share of the tokens in sets of several.

    python scripts/pruning_quality.py --prompts 20

Runs are kept in the JSON-lines file given by --runs and not made again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tempo_mlx import generate, load
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Constant

import numpy as np
import typer
from kept import Kept
from rich.console import Console
from rich.progress import track
from scipy import stats
from stock import logprob

PROMPTS = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Mode:
    """One way to decode: a name, and fields of Settings."""

    name: str
    settings: dict[str, Any]


def modes(threshold: float, keep_rate: float) -> list[Mode]:
    """Greedy, no pruning, every rule at one keep rate, the default rule, and weightings."""

    def quota(rule: str) -> Pruning:
        return Pruning(rule=rule, decision="quota", keep_rate=keep_rate)

    relative = Pruning(rule="posterior", schedule=Constant())
    plain = {"threshold": threshold, "visibility": "isolated"}
    return [
        Mode("greedy", {"threshold": 1.0}),
        Mode("none", plain),
        *(
            Mode(f"{rule}, quota", plain | {"pruning": quota(rule), "seed": 0})
            for rule in ("attention", "posterior", "probability", "random")
        ),
        Mode("posterior, relative", plain | {"pruning": relative}),
        Mode(
            "posterior, relative, repair",
            plain | {"pruning": Pruning(schedule=Constant(), repair="recompute")},
        ),
        Mode("none, prior weights", plain | {"weighting": "prior"}),
        Mode("none, posterior weights", plain | {"weighting": "posterior"}),
        Mode("posterior, prior weights", plain | {"pruning": relative, "weighting": "prior"}),
        Mode(
            "posterior, posterior weights", plain | {"pruning": relative, "weighting": "posterior"}
        ),
    ]


def measure(model: Any, tokenizer: Any, prompt: str, tokens: int, mode: Mode) -> dict[str, float]:
    """One run: quality of its best path and of its chain, and what it cost."""
    result = generate(model, tokenizer, prompt, max_tokens=tokens, **mode.settings)
    lattice = result.lattice
    sizes = [len(step.tokens) for step in lattice.steps if step.tokens]
    live = [len(step.live) for step in lattice.steps if step.tokens]
    several = sum(n for n in sizes if n > 1)
    path, chain = result.paths(1)[0], result.chain()
    return {
        "path": logprob(model, lattice.prompt_tokens, path.tokens),
        "chain": logprob(model, lattice.prompt_tokens, chain.tokens),
        "steps": len(sizes),
        "paths": float(np.log10(np.array(live, float)).sum()),
        "rows": sum(sizes),
        "slots": sum(live),
        "kept": (several - (sum(sizes) - sum(live))) / several if several else 1.0,
    }


def interval(values: np.ndarray) -> str:
    """Mean and half width of its 95% t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{values.mean():+.3f} ± {half:.3f}"


def main(
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
    prompts: Annotated[int, typer.Option(help="Prompts of scripts/prompts.txt, 2 to 100.")] = 20,
    tokens: Annotated[int, typer.Option(help="Steps of each run.")] = 20,
    threshold: Annotated[float, typer.Option(help="Selection threshold.")] = 0.1,
    keep_rate: Annotated[float, typer.Option(help="Share of set tokens that quotas keep.")] = 0.5,
    runs: Annotated[Path, typer.Option(help="File that keeps the runs.")] = Path("pruning.jsonl"),
    only: Annotated[str, typer.Option(help="Only modes whose name contains this.")] = "",
) -> None:
    """Compare pruning rules on the best text of their lattices."""
    texts = PROMPTS.read_text().splitlines()[:prompts]
    kept = Kept(runs)
    language_model, tokenizer = load(model)

    def setting(mode: str) -> list[Any]:
        """What a run depends on besides its mode and prompt."""
        return [model, tokens, threshold, keep_rate if "quota" in mode else None]

    def found(mode: str, prompt: str) -> dict[str, float] | None:
        return kept.find(setting(mode), mode, prompt)

    chosen = [m for m in modes(threshold, keep_rate) if only in m.name or m.name == "greedy"]
    todo = [(mode, text) for text in texts for mode in chosen if not found(mode.name, text)]
    for mode, text in track(todo, "Decoding", console=Console(stderr=True), disable=not todo):
        measured = measure(language_model, tokenizer, text, tokens, mode)
        kept.add(setting(mode.name), mode.name, text, measured)

    print(f"{len(texts)} prompts x {tokens} tokens, threshold {threshold}, {model}")
    print("| mode | best path - greedy | chain - greedy | log10 paths | rows | slots | kept |")
    print("|---|---|---|---|---|---|---|")
    for mode in chosen:
        columns = {
            name: np.array([found(mode.name, text)[name] for text in texts])
            for name in ("path", "chain", "paths", "rows", "slots", "kept")
        }
        base = np.array([found("greedy", text)["path"] for text in texts])
        same = mode.name == "greedy"
        cells = [
            "0" if same else interval(columns["path"] - base),
            "0" if same else interval(columns["chain"] - base),
            *(f"{columns[name].mean():.2f}" for name in ("paths", "rows", "slots", "kept")),
        ]
        print(f"| {mode.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
