"""Branches of one prompt: in one sequence, in one row for each, and one after another.

Also for a hybrid model, whose recurrent layers keep a state for each branch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import get_total_parameters

from ..doctor.random_models import Letters, random_model
from ..generation import stream_generate
from ..models import PositionedModel
from ..text.vocabulary import without_end
from .result import Result, Row, Target, compared, finder, single
from .setting import MOST_WIDTH, Subject, prompt_of

TREE, REPLICATE = "tree, one sequence", "tree, a row for each branch"
SEPARATE, STOCK = "separate runs", "mlx-lm, one batch"
HYBRID_TREE, HYBRID_STOCK = f"hybrid: {TREE}", f"hybrid: {STOCK}"

TIME, CACHE = "time", "cache"
MODEL, STATES = "hybrid model", "states of a branch"

#: A hybrid model with random weights, large enough that layers take longer than the host.
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
#: A threshold that every token reaches.
ANY = 1e-45


@dataclass(frozen=True)
class Taken:
    """One run: seconds from the first step to the last, and bytes of its caches at the end."""

    seconds: float
    cache_bytes: int


def bench_tree(subject: Subject, prompt_tokens: int, leaves: int, max_tokens: int) -> Result:
    """Measure ``leaves`` branches of one prompt, ``max_tokens`` steps each, in alternation.

    The tree has this many leaves from its first step on. Separate runs and mlx-lm's batch decode
    the same number of texts and tokens greedily. Times exclude the prompt. A hybrid model with
    random weights is also measured, and compared with mlx-lm's batch of the same model.

    Args:
        subject: the model.
        prompt_tokens: at least 1.
        leaves: at least 2.
        max_tokens: at least 4.

    Raises:
        TempoError: if the runs do not fit into the model's context.
    """
    subject.require_room(prompt_tokens, max_tokens)
    model, endless = subject.model, without_end(subject.tokenizer)
    prompt = prompt_of(subject.tokenizer, prompt_tokens)
    tree = {
        "visibility": "tree",
        "threshold": ANY,
        "beam_width": leaves,
        "max_parallel": leaves,
        "max_tokens": max_tokens,
        "draft": "none",
    }

    def separate() -> Taken:
        alone = {"threshold": 1.0, "max_tokens": max_tokens, "draft": "none"}
        runs = [_ours(model, endless, prompt, alone) for _ in range(leaves)]
        return Taken(sum(run.seconds for run in runs), sum(run.cache_bytes for run in runs))

    hybrid = random_model(HYBRID, **WIDTHS, max_position_embeddings=prompt_tokens + max_tokens)
    branching, letters = PositionedModel(hybrid), prompt_of(Letters(), prompt_tokens)
    variants: dict[str, Callable[[], Taken]] = {
        TREE: partial(_ours, model, endless, prompt, tree),
        REPLICATE: partial(_ours, model, endless, prompt, tree | {"branching": "replicate"}),
        SEPARATE: separate,
        STOCK: partial(_stock, model.model, prompt, leaves, max_tokens),
        HYBRID_TREE: partial(_ours, branching, Letters(), letters, tree),
        HYBRID_STOCK: partial(_stock, hybrid, letters, leaves, max_tokens),
    }
    subject.expect(len(variants))
    runs = subject.alternate(variants)
    rows = []
    for group, names, baselines in (
        (f"{leaves} branches, prompt left out", (TREE, REPLICATE, SEPARATE, STOCK), (TREE,)),
        (
            f"{leaves} branches of {HYBRID} with random weights",
            (HYBRID_TREE, HYBRID_STOCK),
            (HYBRID_TREE, HYBRID_STOCK),
        ),
    ):
        seconds = {name: [run.seconds for run in runs[name]] for name in names}
        caches = {name: float(runs[name][-1].cache_bytes) for name in names}
        rows += compared(group, TIME, "s", seconds, *baselines)
        rows += single(group, CACHE, "bytes", caches)
    rows.append(Row(MODEL, HYBRID, "parameters", "", [float(get_total_parameters(hybrid))]))
    rows.append(Row(MODEL, HYBRID, STATES, "bytes", [float(branching.state_bytes)]))
    found = finder(rows)
    targets = [
        Target(f"time of {what} / of the tree", ">=", least, found(name, TIME).ratios[TREE].median)
        for name, what, least in (
            (SEPARATE, "separate runs", MIN_OVER_SEPARATE),
            (REPLICATE, "a row for each branch", MIN_OVER_REPLICATE),
        )
    ]
    saved = found(TREE, CACHE).median / found(REPLICATE, CACHE).median
    targets.append(Target("cache of the tree / with a row for each branch", "<=", MAX_BYTES, saved))
    setting = subject.describe(prompt_tokens=prompt_tokens, leaves=leaves, max_tokens=max_tokens)
    return Result("tree", subject.name, setting, rows, targets)


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
