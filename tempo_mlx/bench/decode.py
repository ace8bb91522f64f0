"""Decoding speed and memory: mlx-lm, ours at threshold 1, and sets of a forced width."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.nn as nn
import mlx_lm

from ..arguments import check_count, shown
from ..errors import TempoError
from ..generation import stream_generate
from ..models import PositionedModel
from ..text.vocabulary import without_end
from .decode_report import SINGLE, STOCK, Measured, Report, sibling_name
from .runs import ANY, LONG_BLOCKS, NEARLY_ONE, WARM_UP, Run, long_run, timed
from .setting import (
    MOST_TOKENS,
    MOST_WIDTH,
    describe,
    prompt_of,
    require_room,
    visibility_of_sets,
    weight_bytes,
)
from .timing import Spread, alternate, copy_bandwidth, ratio


def bench_decode(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 64,
    max_tokens: int = 24,
    rounds: int = 7,
    siblings: Sequence[int] = (1, 2, 4, 8, 16),
    long_steps: int = 0,
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure mlx-lm, ours at threshold 1 and ours with sets of a forced width, by turns.

    Nothing ends a run early: end tokens count as ordinary ones on both sides.

    Args:
        model: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns it.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt_tokens: length of the prompt, at least 1.
        max_tokens: steps of a run, above 3.
        rounds: runs of each variant, at least 1; one more warms up.
        siblings: widths of the forced sets, each at least 1.
        long_steps: also decode this many steps at threshold 1 and by mlx-lm; 0 does not.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range, or runs that the model's context cannot hold.
    """
    positioned = PositionedModel.of(model)
    check_count("max_tokens", max_tokens, WARM_UP + 2, MOST_TOKENS)
    if not siblings or min(siblings) < 1:
        raise TempoError(f"siblings must be at least 1, got {shown(list(siblings))}")
    check_count("siblings", max(siblings), most=MOST_WIDTH)
    if long_steps and long_steps < 2 * LONG_BLOCKS:
        raise TempoError(f"long_steps must be 0 or at least {2 * LONG_BLOCKS}, got {long_steps}")
    require_room(positioned, prompt_tokens, max(max_tokens, long_steps))
    prompt = prompt_of(tokenizer, prompt_tokens)
    endless = without_end(tokenizer)
    visibility = visibility_of_sets(positioned)

    def stock(steps: int) -> Iterator[list[int]]:
        for response in mlx_lm.stream_generate(positioned.model, endless, prompt, max_tokens=steps):
            yield [response.token]

    def ours(steps: int, threshold: float, width: int) -> Iterator[list[int]]:
        for response in stream_generate(
            positioned,
            endless,
            prompt,
            max_tokens=steps,
            threshold=threshold,
            max_parallel=width,
            visibility=visibility,
            paths=0,
        ):
            yield [token.id for token in response.step.tokens]

    widths = {STOCK: 1, SINGLE: 1} | {sibling_name(n): n for n in siblings}

    def runner(name: str) -> Callable[[], Run]:
        width = widths[name]
        if name == STOCK:
            return lambda: timed(stock(max_tokens), 1)
        if name == SINGLE:
            return lambda: timed(ours(max_tokens, 1.0, 1), 1)
        if width == 1:
            return lambda: timed(ours(max_tokens, NEARLY_ONE, 2), 1)
        return lambda: timed(ours(max_tokens, ANY, width), width)

    runs = alternate({name: runner(name) for name in widths}, rounds, progress)
    seconds = {name: [run.step_seconds for run in runs[name]] for name in runs}
    one = sibling_name(1) if 1 in siblings else SINGLE
    n_bytes = weight_bytes(positioned.model)
    measured = [
        Measured(
            name=name,
            siblings=width,
            step_seconds=Spread.of(seconds[name]),
            weight_bandwidth=n_bytes / Spread.of(seconds[name]).median,
            peak_bytes=max(run.peak_bytes for run in runs[name]),
            slots=prompt_tokens + runs[name][0].tokens.size,
            time_to_stock=ratio(seconds[name], seconds[STOCK]),
            time_to_one=ratio(seconds[name], seconds[one]),
        )
        for name, width in widths.items()
    ]
    long = None
    if long_steps:
        sides = {STOCK: stock(long_steps), SINGLE: ours(long_steps, 1.0, 1)}
        long = long_run(sides, long_steps, progress)
    return Report(
        model=model_name or positioned.name or "",
        setting={
            **describe(positioned, prompt_tokens, max_tokens, rounds),
            "visibility": visibility,
        },
        weight_bytes=n_bytes,
        copy_bandwidth=copy_bandwidth(),
        measured=measured,
        long=long,
    )
