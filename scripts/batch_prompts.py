"""Do siblings that see each other make narrower sets? Many prompts, two modes, one batch.

python scripts/batch_prompts.py --prompts 20
"""

from pathlib import Path
from typing import Annotated

from tempo_mlx import Settings, batch_generate, load

import numpy as np
import typer
from scipy import stats

PROMPTS = Path(__file__).with_name("prompts.txt")


def main(
    prompts: Annotated[int, typer.Option(help="Prompts to use, at least 2.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Steps of each run.")] = 20,
    model: Annotated[str, typer.Option(help="Recipe, folder or Hub id.")] = "smollm2-135m",
) -> None:
    language_model, tokenizer = load(model)
    texts = PROMPTS.read_text().splitlines()[:prompts]

    # Both modes of a prompt share a batch, and the prompt is read once for both.
    modes = ("isolated", "visible")
    rows = [(text, mode) for text in texts for mode in modes]
    batch = batch_generate(
        language_model,
        tokenizer,
        [text for text, _ in rows],
        [Settings(visibility=mode, threshold=0.1, max_tokens=max_tokens) for _, mode in rows],
        verbose=True,
    )

    # A prompt is one observation: the mean size of its sets.
    sizes = np.array([r.lattice.n_tokens / len(r.lattice) for r in batch.results])
    isolated, visible = sizes.reshape(-1, 2).T
    test = stats.ttest_rel(isolated, visible)
    low, high = test.confidence_interval()
    print(f"tokens in a set: isolated {isolated.mean():.3f}, visible {visible.mean():.3f}")
    print(f"difference {np.mean(isolated - visible):+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]")
    status = batch.status
    print(f"{status.done} runs, {status.tokens} tokens in {status.seconds:.1f} s")


if __name__ == "__main__":
    typer.run(main)
