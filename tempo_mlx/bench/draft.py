"""Plain decoding with drafts, compared with mlx-lm and with ours without drafts."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generation_stream

from ..decode.decoder import BatchDecoder
from ..decode.request import Request
from ..drafts import pass_costs
from ..generation import begin, steps_of
from ..settings import Settings
from ..text.vocabulary import without_end
from .draft_texts import KINDS, prompts_of
from .result import Result, Row, Target, ratio, single
from .runs import STOCK
from .setting import Subject

#: Ours, by the source of the drafts.
NONE, LOOKUP, RECYCLE = "no drafts", "lookup", "recycling"
SOURCES = {NONE: "none", LOOKUP: "lookup", RECYCLE: "recycle"}

#: Target for the speed relative to mlx-lm's, for each kind of text with the default source.
LEAST = {
    "prose": 1.05,
    "passage and question": 1.2,
    "copy or rewrite": 3.0,
    "code or table": 1.3,
}

#: Targets for the slowest prompt, and for ours without drafts, relative to mlx-lm.
WORST, PLAIN = 0.97, 1.0

COSTS = "a pass over several tokens"
SPEED, PASS, SAME = "speed", "tokens a pass", "prompts with the text of no drafts"
WORST_PROMPT = "slowest prompt over mlx-lm"


@dataclass(frozen=True)
class Run:
    """One generation: seconds of its steps, forward passes, and its tokens."""

    seconds: float
    passes: int
    tokens: list[int]


def bench_draft(subject: Subject, prompts: int, max_tokens: int) -> Result:
    """Generate from prompts of four kinds at threshold 1, in alternation.

    No run ends early: both sides treat end tokens as ordinary tokens. Times exclude the prompt.

    Args:
        subject: the model; its rounds do not matter, every prompt is one.
        prompts: of each kind, at least 1; the first one runs once more before, to warm up.
        max_tokens: tokens of each run, at least 2.
    """
    model, endless = subject.model, without_end(subject.tokenizer)
    cost = pass_costs(model)

    def stock(texts: Iterator[list[int]]) -> Run:
        return _timed(
            [r.token]
            for r in mlx_lm.stream_generate(
                model.model, endless, next(texts), max_tokens=max_tokens
            )
        )

    def ours(texts: Iterator[list[int]], draft: str) -> Run:
        settings = Settings(threshold=1.0, max_tokens=max_tokens, draft=draft)
        request = Request(begin(model, endless, next(texts), settings))
        decoder = BatchDecoder(model)
        run = _timed([t.id for t in r.step.tokens] for r in steps_of(request, decoder))
        return Run(run.seconds, decoder.passes, run.tokens)

    subject.expect(0, len(KINDS) * (prompts + 1) * (1 + len(SOURCES)))
    rows: list[Row] = []
    targets: list[Target] = []
    for kind in KINDS:
        ids = [subject.tokenizer.encode(text) for text in prompts_of(kind, prompts)]
        texts = [ids[0], *ids]
        variants: dict[str, Callable[[], Run]] = {
            STOCK: partial(stock, iter(texts)),
            **{name: partial(ours, iter(texts), draft) for name, draft in SOURCES.items()},
        }
        found, wanted = _kind(kind, subject.alternate_for(variants, prompts, f"{kind}: "))
        rows += found
        targets += wanted
    sizes = {f"{n} token{'s' if n > 1 else ''}": cost(n) for n in cost.sizes}
    rows += single(COSTS, "time over a pass of one", "", sizes)
    setting = subject.describe(prompts=prompts, max_tokens=max_tokens)
    return Result("draft", subject.name, setting, rows, targets)


def _kind(kind: str, runs: dict[str, list[Run]]) -> tuple[list[Row], list[Target]]:
    seconds = {name: [run.seconds for run in each] for name, each in runs.items()}
    rows, targets = [], []
    for name, each in runs.items():
        faster = ratio(seconds[STOCK], seconds[name])
        ratios = [a / b for a, b in zip(seconds[STOCK], seconds[name], strict=True)]
        variant = f"{kind}: {name}"
        speeds = [(len(run.tokens) - 1) / run.seconds for run in each]
        rows.append(Row(kind, variant, SPEED, "tokens/s", speeds))
        if name == STOCK:
            continue
        rows.append(Row(kind, variant, "times mlx-lm", "", ratios))
        rows.append(Row(kind, variant, PASS, "", [len(r.tokens) / r.passes for r in each]))
        same = sum(a.tokens == b.tokens for a, b in zip(each, runs[NONE], strict=True))
        rows.append(Row(kind, variant, SAME, "", [float(same)]))
        rows.append(Row(kind, variant, WORST_PROMPT, "", [min(ratios)]))
        if name == LOOKUP:
            targets.append(Target(f"{kind}: {LOOKUP} / mlx-lm", ">=", LEAST[kind], faster.median))
            targets.append(Target(f"{kind}: slowest prompt", ">=", WORST, min(ratios)))
        if name == NONE:
            targets.append(Target(f"{kind}: {NONE} / mlx-lm", ">=", PLAIN, faster.median))
    return rows, targets


def _timed(steps: Iterator[list[int]]) -> Run:
    """Time a generation from its first token to its last."""
    tokens = next(steps)
    start = time.perf_counter()
    for ids in steps:
        tokens = tokens + ids
    mx.synchronize(generation_stream)
    return Run(time.perf_counter() - start, 0, tokens)
