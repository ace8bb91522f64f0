"""What a step costs beside the model: steps of a model that has next to nothing to compute."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from ..arguments import check_count
from ..doctor.random_models import Letters, random_model
from ..generation import stream_generate
from ..models import PositionedModel
from .decode_report import SINGLE, STOCK, sibling_name
from .runs import ANY, NEARLY_ONE, WARM_UP, Run, timed
from .setting import MOST_TOKENS, describe, prompt_of
from .target import Target
from .timing import Spread, alternate, difference, ratio

SCHEMA = 1

LAYERS, WIDTH, VOCABULARY = 2, 64, 2048

#: Tokens of the wide sets.
SIBLINGS = 4
WIDE = sibling_name(SIBLINGS)

#: Milliseconds that a step may take beyond mlx-lm's.
MAX_SINGLE, MAX_WIDE = 0.2, 0.7


@dataclass(frozen=True)
class Variant:
    """One way to make steps.

    Args:
        name: what the report calls it.
        siblings: tokens of each step.
        settings: of our generation; None is mlx-lm's.
        most: milliseconds that a step may take beyond mlx-lm's; None sets no target.
    """

    name: str
    siblings: int = 1
    settings: dict[str, Any] | None = None
    most: float | None = None


VARIANTS = (
    Variant(STOCK),
    Variant(SINGLE, settings={"threshold": 1.0}, most=MAX_SINGLE),
    Variant(sibling_name(1), settings={"threshold": NEARLY_ONE, "max_parallel": 2}),
    *(
        Variant(
            f"{WIDE}, {visibility}",
            SIBLINGS,
            {"threshold": ANY, "max_parallel": SIBLINGS, "visibility": visibility},
            MAX_WIDE,
        )
        for visibility in ("recombined", "isolated")
    ),
)


@dataclass(frozen=True)
class Measured:
    """What all runs of one variant say.

    Args:
        name: of the variant.
        siblings: tokens of each step.
        step_seconds: time of a step; the median of a run's steps, spread over the rounds.
        time_to_stock, over_stock: time of a step over that of mlx-lm, and seconds beyond it.
    """

    name: str
    siblings: int
    step_seconds: Spread
    time_to_stock: Spread
    over_stock: Spread


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_host` found."""

    model: str
    setting: dict[str, Any]
    measured: list[Measured]

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        return [
            Target(
                f"ms/step of {each.name} beyond mlx-lm's",
                "<=",
                variant.most,
                each.over_stock.median * 1e3,
            )
            for variant, each in zip(VARIANTS, self.measured, strict=True)
            if variant.most is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds, those of the targets in ms."""
        return {
            "schema": SCHEMA,
            "bench": "host",
            "model": self.model,
            **self.setting,
            "runs": [asdict(each) for each in self.measured],
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_host(
    *,
    prompt_tokens: int = 64,
    max_tokens: int = 64,
    rounds: int = 15,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure steps of mlx-lm, of ours at threshold 1 and of forced sets, by turns.

    The model is a llama with random weights. mlx-lm's steps end with the token on the host; ours
    also find the token's text and record the step.

    Args:
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: steps of a run, above 3.
        rounds: runs of each variant, at least 1; one more warms up.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    check_count("prompt_tokens", prompt_tokens, most=MOST_TOKENS)
    check_count("max_tokens", max_tokens, WARM_UP + 2, MOST_TOKENS)
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
    positioned, tokenizer = PositionedModel.of(model), Letters(VOCABULARY)
    prompt = prompt_of(tokenizer, prompt_tokens)

    def steps(settings: dict[str, Any] | None) -> Iterator[list[int]]:
        if settings is None:
            for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
                yield [int(token)]
            return
        for response in stream_generate(
            positioned, tokenizer, prompt, max_tokens=max_tokens, paths=0, **settings
        ):
            yield [token.id for token in response.step.tokens]

    def runner(variant: Variant) -> Callable[[], Run]:
        return lambda: timed(steps(variant.settings), variant.siblings)

    runs = alternate({variant.name: runner(variant) for variant in VARIANTS}, rounds, progress)
    seconds = {name: [run.step_seconds for run in taken] for name, taken in runs.items()}
    return Report(
        model=f"random, {LAYERS} layers of width {WIDTH}, vocabulary of {VOCABULARY}",
        setting=describe(positioned, prompt_tokens, max_tokens, rounds),
        measured=[
            Measured(
                name=variant.name,
                siblings=variant.siblings,
                step_seconds=Spread.of(seconds[variant.name]),
                time_to_stock=ratio(seconds[variant.name], seconds[STOCK]),
                over_stock=difference(seconds[variant.name], seconds[STOCK]),
            )
            for variant in VARIANTS
        ],
    )
