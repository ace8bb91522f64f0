"""What a search finds for its cost, beside greedy decoding, beams and best-of-n sampling.

For each prompt every way makes texts of the same length; the number of tokens that pass through
the model is about the same for all but greedy decoding. Printed are means over prompts:
log-probability per token of the best text minus that of greedy decoding (paired, 95% t-interval),
the tokens, and how many distinct texts a way offers.

    python scripts/search_quality.py --prompts 20

Texts are kept in the JSON-lines file given by --runs and not made again.
"""

from pathlib import Path
from typing import Annotated, Any

from tempo_mlx import Settings, batch_generate, generate, load, search

import numpy as np
import typer
from kept import Kept
from rich.console import Console
from rich.progress import track
from scipy import stats
from stock import logprob

PROMPTS = Path(__file__).with_name("prompts.txt")


def texts_of(
    way: str, model: Any, tokenizer: Any, prompt: str, tokens: int, budget: int
) -> tuple[list[list[int]], int]:
    """The texts that a way offers for a prompt, and the tokens that it computed."""
    n = len(tokenizer.encode(prompt))
    if way == "greedy":
        result = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=tokens)
        return [path.tokens for path in result.paths(1)], result.lattice.n_tokens
    if way.startswith("beam"):
        width = budget // tokens
        tree = {"visibility": "tree", "beam_width": width, "max_parallel": width}
        result = generate(model, tokenizer, prompt, threshold=1e-9, max_tokens=tokens, **tree)
        return [path.tokens for path in result.paths(width)], result.lattice.n_tokens
    if way.startswith("best of"):
        drawn = [
            Settings(threshold=1.0, max_parallel=1, sampling="gumbel", seed=seed, max_tokens=tokens)
            for seed in range(budget // tokens)
        ]
        batch = batch_generate(model, tokenizer, [prompt] * len(drawn), drawn)
        found = [result.paths(1)[0].tokens for result in batch.results]
        return found, sum(result.lattice.n_tokens for result in batch.results)
    rollouts = "rollout" in way
    depth = 4
    result = search(
        model,
        tokenizer,
        prompt,
        max_tokens=tokens,
        simulations=max(1, budget // tokens // (depth if rollouts else 1)),
        evaluation="rollout" if rollouts else "mean_logprob",
        depth=depth,
        leaves_per_batch=4,
    )
    return [result.tokens], result.forward_tokens - n


def main(
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
    prompts: Annotated[int, typer.Option(help="Prompts of scripts/prompts.txt, 2 to 100.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 20,
    budget: Annotated[int, typer.Option(help="Tokens through the model for each text.")] = 160,
    runs: Annotated[Path, typer.Option(help="File that keeps the texts.")] = Path("search.jsonl"),
) -> None:
    """Compare ways to spend the same number of forward tokens."""
    n = budget // tokens
    ways = ["greedy", f"beam {n}", f"best of {n} samples", "search", "search, rollouts"]
    chosen = PROMPTS.read_text().splitlines()[:prompts]
    kept = Kept(runs)
    language_model, tokenizer = load(model)
    setting = [model, tokens, budget]
    todo = [(way, text) for text in chosen for way in ways if not kept.find(setting, way, text)]
    for way, text in track(todo, "Searching", console=Console(stderr=True), disable=not todo):
        found, rows = texts_of(way, language_model, tokenizer, text, tokens, budget)
        prompt = tokenizer.encode(text)
        scores = [logprob(language_model, prompt, ids) for ids in found if ids]
        measured = {
            "logprob": max(scores),
            "rows": rows,
            "distinct": len({tuple(ids) for ids in found}),
            "length": len(found[int(np.argmax(scores))]),
        }
        kept.add(setting, way, text, measured)
    print(f"{len(chosen)} prompts x {tokens} tokens, budget {budget}, {model}")
    print("| way | nats per token over greedy | tokens computed | texts | tokens of the best |")
    print("|---|---|---|---|---|")
    base = np.array([kept.find(setting, "greedy", text)["logprob"] for text in chosen])
    for way in ways:
        taken = [kept.find(setting, way, text) for text in chosen]
        gain = np.array([each["logprob"] for each in taken]) - base
        half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
        cell = "0" if way == "greedy" else f"{gain.mean():+.3f} ± {half:.3f}"
        rows, distinct, length = (
            float(np.mean([each[name] for each in taken]))
            for name in ("rows", "distinct", "length")
        )
        print(f"| {way} | {cell} | {rows:.1f} | {distinct:.1f} | {length:.1f} |")


if __name__ == "__main__":
    typer.run(main)
