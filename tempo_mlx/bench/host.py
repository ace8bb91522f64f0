"""The cost of a step outside the model, measured with a model that computes almost nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..doctor.random_models import Letters, random_model
from ..generation import stream_generate
from .result import Result, Target, compared, finder
from .runs import ANY, NEARLY_ONE, SINGLE, STOCK, Run, sibling_name, timed
from .setting import Progress, Subject, prompt_of

LAYERS, WIDTH, VOCABULARY = 2, 64, 2048

#: Tokens in the wide sets.
SIBLINGS = 4

#: Targets: most milliseconds that a step takes beyond mlx-lm's.
MAX_SINGLE, MAX_WIDE = 0.2, 0.7

GROUP, STEP, BEYOND = "steps", "step", "beyond mlx-lm's"


@dataclass(frozen=True)
class Variant:
    """One way to make steps.

    Args:
        siblings: tokens in each step.
        settings: of our generation; None for mlx-lm's generation.
        most: target for the milliseconds beyond mlx-lm's step; None for no target.
    """

    siblings: int = 1
    settings: dict[str, Any] | None = None
    most: float | None = None


VARIANTS = {
    STOCK: Variant(),
    # Drafts pay where a pass costs more than the host: here it does not.
    SINGLE: Variant(settings={"threshold": 1.0, "draft": "none"}, most=MAX_SINGLE),
    sibling_name(1): Variant(
        settings={"threshold": NEARLY_ONE, "max_parallel": 2, "draft": "none"}
    ),
    **{
        f"{sibling_name(SIBLINGS)}, {visibility}": Variant(
            SIBLINGS,
            {"threshold": ANY, "max_parallel": SIBLINGS, "visibility": visibility, "draft": "none"},
            MAX_WIDE,
        )
        for visibility in ("recombined", "isolated")
    },
}


def bench_host(prompt_tokens: int, max_tokens: int, rounds: int, progress: Progress) -> Result:
    """Measure steps of mlx-lm, of ours at threshold 1 and of sets of fixed width, in alternation.

    The model is a llama with random weights. mlx-lm's steps end with the token on the host; ours
    also look up the token's text and record the step.

    Args:
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: steps of a run, at least 4.
        rounds: runs of each variant, at least 1; one more warms up.
        progress: reports what is measured.
    """
    model = random_model(
        "llama",
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=prompt_tokens + max_tokens,
    )
    name = f"random, {LAYERS} layers of width {WIDTH}, vocabulary of {VOCABULARY}"
    tokenizer = Letters(VOCABULARY)
    subject = Subject.of(model, tokenizer, name, rounds, progress)
    prompt = prompt_of(tokenizer, prompt_tokens)

    def steps(settings: dict[str, Any] | None) -> Iterator[list[int]]:
        if settings is None:
            for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
                yield [int(token)]
            return
        for response in stream_generate(
            subject.model, tokenizer, prompt, max_tokens=max_tokens, paths=0, **settings
        ):
            yield [token.id for token in response.step.tokens]

    def run(variant: Variant) -> Run:
        return timed(steps(variant.settings), variant.siblings)

    subject.expect(len(VARIANTS))
    runs = subject.alternate({name: partial(run, each) for name, each in VARIANTS.items()})
    seconds = {name: [each.step_seconds for each in taken] for name, taken in runs.items()}
    beyond = {name: differences(taken, seconds[STOCK]) for name, taken in seconds.items()}
    rows = [
        *compared(GROUP, STEP, "s", seconds, STOCK),
        *compared(GROUP, BEYOND, "s", beyond),
    ]
    found = finder(rows)
    targets = [
        Target(
            f"ms/step of {name} beyond mlx-lm's", "<=", each.most, 1e3 * found(name, BEYOND).median
        )
        for name, each in VARIANTS.items()
        if each.most is not None
    ]
    setting = subject.describe(prompt_tokens=prompt_tokens, max_tokens=max_tokens)
    return Result("host", subject.name, setting, rows, targets)


def differences(greater: list[float], less: list[float]) -> list[float]:
    """Differences of paired measurements."""
    return [a - b for a, b in zip(greater, less, strict=True)]
