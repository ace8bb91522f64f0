"""Scores of candidate words, beside three plainer ways to compute them with mlx-lm."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ..arguments import check_count
from ..models import PositionedModel
from ..numerics import log_softmax_at
from ..scoring import ContinuationScorer
from ..text.vocabulary import encode_text
from .setting import MOST_TOKENS, describe
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

OURS = "one trie"
ALONE = "every text alone"
PASSES = "context cached, a pass a word"
PADDED = "context cached, a padded batch"

#: Largest share of the budget that may be held.
MEMORY = 1.1

#: Times faster that a call is whose contexts grew by one word.
GROWN = 3.0

STORY = """the old man walked slowly down to the river because he wanted to see whether the boats
had come back from the sea before the storm"""

#: Words of one to four tokens.
WORDS = """and the a of to in that it with as for was on are but what all were when we there can an
your which their said if do will each about how up out them then she many some so these would into
has more two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after words called just where most know yesterday
harbour fisherman lighthouse shouting whispered candlelight quietly neighbours grandmother's
unhurriedly gulls oarsmen mooring seagrass driftwood fishmonger shipwrecked barefoot"""

Scores = list[list[float]]


@dataclass(frozen=True)
class Workload:
    """Contexts and their candidates, and how much faster ours should be than two of the others."""

    name: str
    contexts: list[str]
    words: list[list[str]]
    over_alone: float | None
    over_passes: float | None

    def grown(self) -> "Workload":
        """The next call of a beam search: every context with its first candidate."""
        pairs = zip(self.contexts, self.words, strict=True)
        contexts = [f"{context} {words[0]}" for context, words in pairs]
        return Workload(f"{self.name}, a word later", contexts, self.words, None, None)


def workloads(seed: int = 0) -> list[Workload]:
    """Contexts of a beam search, unrelated ones, and a single one."""
    rng = random.Random(seed)
    story, vocabulary = STORY.split(), WORDS.split()

    def words(n: int, contexts: int) -> list[list[str]]:
        return [rng.sample(vocabulary, n) for _ in range(contexts)]

    def unrelated(n: int) -> list[str]:
        return [" ".join(rng.choices(vocabulary, k=rng.randint(14, 23))) for _ in range(n)]

    beams = [" ".join(story[:n]) for n in range(14, 24)]
    return [
        Workload("beam, 10 x 5", beams, words(5, 10), 25.0, 8.0),
        Workload("unrelated, 10 x 5", unrelated(10), words(5, 10), 6.0, 2.0),
        Workload("unrelated, 100 x 2", unrelated(100), words(2, 100), 3.0, 1.5),
        Workload("one context x 5", beams[-1:], words(5, 1), None, None),
    ]


class Plain:
    """What one would write with mlx-lm: exact scores of words behind contexts."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def _ids(self, context: str, word: str) -> tuple[list[int], list[int]]:
        before = encode_text(self.tokenizer, context)
        both = encode_text(self.tokenizer, f"{context} {word}")
        return before, both[len(before) :]

    def alone(self, contexts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """Every context with every word through the model by itself."""
        return [
            [self._alone(*self._ids(context, word)) for word in words]
            for context, words in zip(contexts, candidates, strict=True)
        ]

    def _alone(self, before: list[int], word: list[int]) -> float:
        logits = self.model(mx.array([before + word]))[0, len(before) - 1 : -1]
        return float(_log_p(logits, word).sum())

    def passes(self, contexts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """Every context once, and a pass over the cached context for every word."""
        scores = []
        for context, words in zip(contexts, candidates, strict=True):
            cache, last = self._read(context)
            own = []
            for word in words:
                _, ids = self._ids(context, word)
                logits = mx.concatenate([last, self.model(mx.array([ids]), cache=cache)[0, :-1]])
                own.append(float(_log_p(logits, ids).sum()))
                trim_prompt_cache(cache, len(ids))
            scores.append(own)
        return scores

    def padded(self, contexts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """Every context once, and one batch of its words over copies of its cache."""
        scores = []
        for context, words in zip(contexts, candidates, strict=True):
            cache, last = self._read(context)
            ids = [self._ids(context, word)[1] for word in words]
            width = max(map(len, ids))
            batch = [each.merge([each] * len(words)) for each in cache]
            padded = mx.array([own + [0] * (width - len(own)) for own in ids])
            logits = self.model(padded, cache=batch)
            rows = [mx.concatenate([last, logits[i, : len(own) - 1]]) for i, own in enumerate(ids)]
            found = [_log_p(row, own).sum() for row, own in zip(rows, ids, strict=True)]
            mx.eval(found)
            scores.append([float(each) for each in found])
        return scores

    def _read(self, context: str) -> tuple[list[Any], mx.array]:
        cache = make_prompt_cache(self.model)
        ids = encode_text(self.tokenizer, context)
        last = self.model(mx.array([ids]), cache=cache)[0, -1:]
        mx.eval(last, [each.state for each in cache])
        return cache, last


def _log_p(logits: mx.array, ids: list[int]) -> mx.array:
    """log p of each token in its row, [n]."""
    return log_softmax_at(logits.astype(mx.float32), mx.array(ids)[:, None])[:, 0]


@dataclass(frozen=True)
class Measured:
    """One way to score one workload.

    Args:
        seconds: of a call; ours begins with nothing.
        over_ours: time over ours.
        difference: largest one from the scores of every text alone, nats.
    """

    workload: str
    name: str
    seconds: Spread
    over_ours: Spread
    difference: float


@dataclass(frozen=True)
class Grown:
    """A second call, whose contexts grew by a word: times faster than the first, and its tokens."""

    workload: str
    faster: Spread
    first_tokens: int
    second_tokens: int


@dataclass(frozen=True)
class Memory:
    """Many contexts under a budget: what was held at most, in bytes, and how fast it went."""

    contexts: int
    max_kv_bytes: int
    largest: int
    dropped: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_score` found."""

    model: str
    setting: dict[str, Any]
    measured: list[Measured]
    grown: list[Grown]
    memory: Memory | None
    wanted: dict[str, tuple[float | None, float | None]]

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        targets = []
        for each in self.measured:
            over_alone, over_passes = self.wanted[each.workload]
            least = {ALONE: over_alone, PASSES: over_passes}.get(each.name)
            if least is not None:
                name = f"{each.workload}: time of {each.name} / of ours"
                targets.append(Target(name, ">=", least, each.over_ours.median))
        for call in self.grown:
            name = f"{call.workload}: first call / second, a word later"
            targets.append(Target(name, ">=", GROWN, call.faster.median))
        if self.memory is not None:
            name = f"{self.memory.contexts:,} contexts: bytes held / max_kv_bytes"
            value = self.memory.largest / self.memory.max_kv_bytes
            targets.append(Target(name, "<=", MEMORY, value))
        return targets

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1."""
        return {
            "schema": SCHEMA,
            "bench": "score",
            "model": self.model,
            **self.setting,
            "runs": [asdict(each) for each in self.measured],
            "second_calls": [asdict(each) for each in self.grown],
            "memory": asdict(self.memory) if self.memory else None,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def bench_score(
    model: nn.Module,
    tokenizer: Any,
    *,
    contexts: int = 10_000,
    max_kv_bytes: int = 100_000_000,
    rounds: int = 3,
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Time calls of the scorer and of plainer ones by turns, and hold many contexts.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns them.
        contexts: that are scored under ``max_kv_bytes``, at least 0.
        max_kv_bytes: of that part.
        rounds: runs of each variant, at least 1; one more warms up.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    check_count("contexts", contexts, 0, MOST_TOKENS)
    positioned = PositionedModel.of(model)
    plain = Plain(positioned.model, tokenizer)
    measured, grown = [], []
    for work in workloads():
        second: list[tuple[float, float, int, int]] = []

        def ours(
            work: Workload = work, second: list[tuple[float, float, int, int]] = second
        ) -> tuple[float, Scores]:
            # The plain ways put nothing before a context.
            scorer = ContinuationScorer(positioned, tokenizer, start=None)
            seconds, scores = _timed(scorer.score_continuations, work)
            first = scorer.stats().tokens_computed
            again, _ = _timed(scorer.score_continuations, work.grown())
            second.append((seconds, again, first, scorer.stats().tokens_computed - first))
            return seconds, scores

        variants: dict[str, Callable[[], tuple[float, Scores]]] = {
            OURS: ours,
            ALONE: partial(_timed, plain.alone, work),
            PASSES: partial(_timed, plain.passes, work),
            PADDED: partial(_timed, plain.padded, work),
        }
        told = None if progress is None else _within(progress, work.name)
        runs = alternate(variants, rounds, told)
        taken = {name: run[0] for name, run in runs.items()}
        times = {name: [seconds for seconds, _ in run] for name, run in runs.items()}
        exact = np.concatenate(taken[ALONE][1])
        for name, (_, scores) in taken.items():
            difference = float(np.abs(np.concatenate(scores) - exact).max())
            over = ratio(times[name], times[OURS])
            measured.append(Measured(work.name, name, Spread.of(times[name]), over, difference))
        kept = second[1:]  # the first warmed up
        faster = ratio([first for first, *_ in kept], [again for _, again, *_ in kept])
        grown.append(Grown(work.name, faster, *kept[-1][2:]))
    memory = None
    if contexts:
        memory = _many(positioned, tokenizer, contexts, max_kv_bytes, progress)
    return Report(
        model=model_name or positioned.name or "",
        setting=describe(positioned, None, None, rounds),
        measured=measured,
        grown=grown,
        memory=memory,
        wanted={work.name: (work.over_alone, work.over_passes) for work in workloads()},
    )


def _within(progress: Callable[[str], None], workload: str) -> Callable[[str], None]:
    return lambda name: progress(f"{workload}: {name}")


def _timed(score: Callable[..., Scores], work: Workload) -> tuple[float, Scores]:
    start = time.perf_counter()
    scores = score(work.contexts, work.words)
    return time.perf_counter() - start, scores


def _many(
    model: PositionedModel,
    tokenizer: Any,
    contexts: int,
    max_kv_bytes: int,
    progress: Callable[[str], None] | None,
) -> Memory:
    """Score short unrelated contexts, 100 in a call."""
    scorer = ContinuationScorer(model, tokenizer, max_kv_bytes=max_kv_bytes)
    rng, vocabulary = random.Random(1), WORDS.split()
    largest, start = 0, time.perf_counter()
    for done in range(0, contexts, 100):
        if progress is not None:
            progress(f"{done:,} of {contexts:,} contexts")
        n = min(100, contexts - done)
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 8))) for _ in range(n)]
        scorer.score_continuations(texts, [[rng.choice(vocabulary)] for _ in texts])
        largest = max(largest, scorer.stats().bytes)
    seconds = time.perf_counter() - start
    return Memory(contexts, max_kv_bytes, largest, scorer.stats().dropped, seconds)
