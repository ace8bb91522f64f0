"""Branches of one prompt: in one sequence, in rows of their own, one after another.

Those of a hybrid model, too, whose recurrent layers keep a state for each branch.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import get_total_parameters

from ..arguments import check_count
from ..doctor.random_models import Letters, random_model
from ..generation import stream_generate
from ..models import PositionedModel
from ..text.vocabulary import without_end
from .setting import MOST_TOKENS, MOST_WIDTH, describe, prompt_of, require_room
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

TREE, REPLICATE = "tree, one sequence", "tree, rows of their own"
SEPARATE, STOCK = "separate runs", "mlx-lm, one batch"
HYBRID_TREE, HYBRID_STOCK = f"hybrid: {TREE}", f"hybrid: {STOCK}"
#: What the times of a variant are compared with.
TREE_OF = {HYBRID_TREE: HYBRID_TREE, HYBRID_STOCK: HYBRID_TREE}

#: A hybrid model whose layers take longer than the host, with random weights.
HYBRID = "qwen3_next"
WIDTHS = {
    "vocab_size": 2 * MOST_WIDTH,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}

MIN_OVER_SEPARATE, MIN_OVER_REPLICATE, MAX_BYTES = 4.0, 1.0, 0.5
#: Every token qualifies.
ANY = 1e-45


@dataclass(frozen=True)
class Taken:
    """One run: time from the first step to the last, and bytes of its caches at the end."""

    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class Measured:
    """All runs of one variant: seconds for the steps of all leaves, and over those of the tree of
    the same model."""

    name: str
    seconds: Spread
    over_tree: Spread
    cache_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_tree` found.

    Args:
        model: name of the model.
        leaves: branches.
        setting: where and how it was measured.
        measured: of each variant.
        hybrid: what the hybrid model is.
        hybrid_over_stock: time of its tree over that of mlx-lm's batch of as many rows.
    """

    model: str
    leaves: int
    setting: dict[str, Any]
    measured: list[Measured]
    hybrid: dict[str, Any]
    hybrid_over_stock: Spread

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        found = {each.name: each for each in self.measured}
        saved = found[TREE].cache_bytes / found[REPLICATE].cache_bytes
        return [
            Target(
                "time of separate runs / of the tree",
                ">=",
                MIN_OVER_SEPARATE,
                found[SEPARATE].over_tree.median,
            ),
            Target(
                "time of rows of their own / of the tree",
                ">=",
                MIN_OVER_REPLICATE,
                found[REPLICATE].over_tree.median,
            ),
            Target("cache of the tree / of rows of their own", "<=", MAX_BYTES, saved),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds."""
        return {
            "schema": SCHEMA,
            "bench": "tree",
            "model": self.model,
            "leaves": self.leaves,
            **self.setting,
            "runs": [asdict(each) for each in self.measured],
            "hybrid": {**self.hybrid, "over_stock": asdict(self.hybrid_over_stock)},
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_tree(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 256,
    leaves: int = 8,
    max_tokens: int = 32,
    rounds: int = 3,
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure ``leaves`` branches of one prompt, ``max_tokens`` steps each, by turns.

    The tree keeps that many leaves from its first step on. Separate runs and mlx-lm's batch decode
    greedily, as many texts of as many tokens. Times leave the prompt out. A hybrid model with
    random weights takes its turns, too, beside mlx-lm's batch of the same model.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns them.
        prompt_tokens: at least 1.
        leaves: at least 2.
        max_tokens: at least 4.
        rounds: runs of each variant, at least 1; one more warms up.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    check_count("leaves", leaves, 2, MOST_WIDTH)
    check_count("max_tokens", max_tokens, 4, MOST_TOKENS)
    positioned = PositionedModel.of(model)
    require_room(positioned, prompt_tokens, max_tokens)
    endless = without_end(tokenizer)
    prompt = prompt_of(tokenizer, prompt_tokens)
    tree = {
        "visibility": "tree",
        "threshold": ANY,
        "beam_width": leaves,
        "max_parallel": leaves,
        "max_tokens": max_tokens,
    }

    def separate() -> Taken:
        single = {"threshold": 1.0, "max_tokens": max_tokens}
        runs = [_ours(positioned, endless, prompt, single) for _ in range(leaves)]
        return Taken(sum(run.seconds for run in runs), sum(run.cache_bytes for run in runs))

    hybrid = random_model(HYBRID, **WIDTHS, max_position_embeddings=prompt_tokens + max_tokens)
    branching, letters = PositionedModel(hybrid), prompt_of(Letters(), prompt_tokens)
    variants: dict[str, Callable[[], Taken]] = {
        TREE: partial(_ours, positioned, endless, prompt, tree),
        REPLICATE: partial(_ours, positioned, endless, prompt, tree | {"branching": "replicate"}),
        SEPARATE: separate,
        STOCK: partial(_stock, positioned.model, prompt, leaves, max_tokens),
        HYBRID_TREE: partial(_ours, branching, Letters(), letters, tree),
        HYBRID_STOCK: partial(_stock, hybrid, letters, leaves, max_tokens),
    }
    runs = alternate(variants, rounds, progress)
    seconds = {name: [run.seconds for run in taken] for name, taken in runs.items()}
    return Report(
        model=model_name or positioned.name or "",
        leaves=leaves,
        setting=describe(positioned, prompt_tokens, max_tokens, rounds),
        measured=[
            Measured(
                name,
                Spread.of(seconds[name]),
                ratio(seconds[name], seconds[TREE_OF.get(name, TREE)]),
                taken[-1].cache_bytes,
            )
            for name, taken in runs.items()
        ],
        hybrid={
            "architecture": HYBRID,
            "parameters": get_total_parameters(hybrid),
            "state_bytes": branching.state_bytes,
        },
        hybrid_over_stock=ratio(seconds[HYBRID_TREE], seconds[HYBRID_STOCK]),
    )


def _ours(model: Any, tokenizer: Any, prompt: list[int], settings: dict[str, Any]) -> Taken:
    times, size = [], 0
    for response in stream_generate(model, tokenizer, prompt, **settings):
        times.append(time.perf_counter())
        size = response.cache_bytes
    return Taken(times[-1] - times[0], size)


def _stock(model: nn.Module, prompt: list[int], rows: int, max_tokens: int) -> Taken:
    generator = BatchGenerator(
        model, stop_tokens=[], completion_batch_size=rows, prefill_batch_size=rows
    )
    generator.insert([prompt] * rows, [max_tokens] * rows)
    before = mx.get_active_memory()
    times, held = [], 0
    while generator.next_generated():
        times.append(time.perf_counter())
        held = max(held, mx.get_active_memory() - before)
    generator.close()
    return Taken(float(np.ptp(times)), held)
