"""Scores of candidate words, compared with three simpler ways to compute them with mlx-lm."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ..decode.scheduler import default_budget
from ..doctor.local_models import size as shown_bytes
from ..numerics import log_softmax_at
from ..scoring import ContinuationScorer
from ..text.vocabulary import encode_text
from .result import Result, Row, Target, compared, single
from .setting import Subject

OURS = "one trie"
ALONE = "every text alone"
PASSES = "context cached, a pass a word"
PADDED = "context cached, a padded batch"

#: Target: most memory held, relative to the budget.
MEMORY = 1.1

#: Target: speed-up of a second call whose contexts grew by one word.
GROWN = 3.0

#: Target: most time for a word with much memory held, relative to little. A pass should cost what
#: it reads, not what is held.
MAX_HELD = 1.05

GROUP, LATER = "contexts x words", "second call, a word later"
HELD, MANY = "one more word after a known context", "many contexts"
CALL, DIFFERENCE, FASTER = "call", "largest difference", "times faster"

#: Contexts in one call, if there are many; and number of texts, and words in each, of a call that
#: fills the memory.
IN_A_CALL, FILLING = 100, 20

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
    """Contexts with their candidates, and targets for our speed-up over two of the other ways."""

    name: str
    contexts: list[str]
    words: list[list[str]]
    over_alone: float | None
    over_passes: float | None

    def grown(self) -> "Workload":
        """The next call of a beam search: each context is extended by its first candidate."""
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
    """Exact scores of words after contexts, written simply with mlx-lm."""

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def _ids(self, context: str, word: str) -> tuple[list[int], list[int]]:
        before = encode_text(self.tokenizer, context)
        both = encode_text(self.tokenizer, f"{context} {word}")
        return before, both[len(before) :]

    def alone(self, contexts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """One pass for each context with each word."""
        return [
            [self._alone(*self._ids(context, word)) for word in words]
            for context, words in zip(contexts, candidates, strict=True)
        ]

    def _alone(self, before: list[int], word: list[int]) -> float:
        logits = self.model(mx.array([before + word]))[0, len(before) - 1 : -1]
        return float(_log_p(logits, word).sum())

    def passes(self, contexts: Sequence[str], candidates: Sequence[Sequence[str]]) -> Scores:
        """One pass for each context, and one for each word over the cached context."""
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
        """One pass for each context, and one batch of its words over copies of its cache."""
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


def bench_score(subject: Subject, contexts: int, max_kv_bytes: int, held: Sequence[int]) -> Result:
    """Time calls of the scorer and of simpler ways in alternation, and score many contexts.

    Args:
        subject: the model.
        contexts: number of contexts scored under ``max_kv_bytes``, at least 0.
        max_kv_bytes: memory limit for these contexts.
        held: bytes that a scorer holds while it reads one more word. Sizes that do not fit in
            memory together with the previous ones are left out. All are left out if the scorer
            holds nothing for this model.
    """
    works = workloads()
    # Scoring by full passes holds nothing.
    holds = ContinuationScorer(subject.model, subject.tokenizer).stats().method == "tree"
    room = default_budget() if holds else 0
    fitting = [size for i, size in enumerate(held) if sum(held[: i + 1]) <= room]
    calls = -(-contexts // IN_A_CALL)
    subject.expect(4 * len(works) + len(fitting), calls + len(fitting))
    rows, targets = [], []
    for work in works:
        found, wanted = _workload(subject, work)
        rows += found
        targets += wanted
    for call in rows:
        if call.measure == FASTER:
            name = f"{call.name}: first call / second, a word later"
            targets.append(Target(name, ">=", GROWN, call.median))
    if fitting:
        one_more = _one_more_word(subject, fitting)
        rows += one_more
        targets += [
            Target(f"a word with {row.name} / with {smallest}", "<=", MAX_HELD, each.median)
            for row in one_more[1:]
            for smallest, each in row.ratios.items()
        ]
    if contexts:
        largest, memory = _many(subject, contexts, max_kv_bytes)
        rows += memory
        name = f"{contexts:,} contexts: bytes held / max_kv_bytes"
        targets.append(Target(name, "<=", MEMORY, largest / max_kv_bytes))
    setting = subject.describe(max_kv_bytes=max_kv_bytes)
    return Result("score", subject.name, setting, rows, targets)


def _workload(subject: Subject, work: Workload) -> tuple[list[Row], list[Target]]:
    """Measure a workload in every way, and ours again one word later."""
    plain = Plain(subject.model.model, subject.tokenizer)
    calls: list[tuple[float, float, int, int]] = []

    def ours() -> tuple[float, Scores]:
        # The simple ways put nothing before a context.
        scorer = ContinuationScorer(subject.model, subject.tokenizer, start=None)
        seconds, scores = _timed(scorer.score_continuations, work)
        first = scorer.stats().tokens_computed
        again, _ = _timed(scorer.score_continuations, work.grown())
        calls.append((seconds, again, first, scorer.stats().tokens_computed - first))
        return seconds, scores

    variants: dict[str, Callable[[], tuple[float, Scores]]] = {
        OURS: ours,
        ALONE: partial(_timed, plain.alone, work),
        PASSES: partial(_timed, plain.passes, work),
        PADDED: partial(_timed, plain.padded, work),
    }
    runs = subject.alternate(variants, f"{work.name}: ")
    exact = np.concatenate(runs[ALONE][0][1])
    seconds = {name: [each for each, _ in taken] for name, taken in runs.items()}
    difference = {
        name: float(np.abs(np.concatenate(taken[0][1]) - exact).max())
        for name, taken in runs.items()
    }
    times = compared(GROUP, CALL, "s", seconds, OURS)
    wanted = {ALONE: work.over_alone, PASSES: work.over_passes}
    targets = [
        Target(f"{work.name}: time of {row.name} / of ours", ">=", least, row.ratios[OURS].median)
        for row in times
        if (least := wanted.get(row.name)) is not None
    ]
    kept = calls[1:]  # the first warmed up
    faster = [first / again for first, again, _, _ in kept]
    before, after = kept[-1][2:]
    rows = [
        replace(row, name=f"{work.name}: {row.name}")
        for row in [*times, *single(GROUP, DIFFERENCE, "nats", difference)]
    ]
    return [
        *rows,
        Row(LATER, work.name, FASTER, "", faster),
        Row(LATER, work.name, "tokens, first call", "", [float(before)]),
        Row(LATER, work.name, "tokens, second call", "", [float(after)]),
    ], targets


def _timed(score: Callable[..., Scores], work: Workload) -> tuple[float, Scores]:
    start = time.perf_counter()
    scores = score(work.contexts, work.words)
    return time.perf_counter() - start, scores


def _one_more_word(subject: Subject, held: Sequence[int]) -> list[Row]:
    """Time one more word after a known context, for each number of bytes held."""
    rng, vocabulary = random.Random(2), WORDS.split()
    words = vocabulary[:1]

    def filled(size: int) -> ContinuationScorer:
        subject.progress.tick(f"holding {shown_bytes(size)}")
        scorer = ContinuationScorer(subject.model, subject.tokenizer, max_kv_bytes=4 * size)
        while scorer.stats().bytes < size:
            texts = [" ".join(rng.choices(vocabulary, k=FILLING)) for _ in range(FILLING)]
            scorer.score_continuations(texts, [words] * len(texts))
        scorer.score_continuations([STORY], [words])
        return scorer

    def next_word(scorer: ContinuationScorer, numbers: Iterator[int]) -> float:
        # The number is new, so only its tokens are read.
        context = f"{STORY} {next(numbers)}"
        start = time.perf_counter()
        scorer.score_continuations([context], [words])
        return time.perf_counter() - start

    scorers = {f"{shown_bytes(size)} held": filled(size) for size in held}
    seconds = subject.alternate(
        {name: partial(next_word, each, count(1000)) for name, each in scorers.items()}
    )
    return compared(HELD, CALL, "s", seconds, next(iter(scorers)))


def _many(subject: Subject, contexts: int, max_kv_bytes: int) -> tuple[int, list[Row]]:
    """Score short unrelated contexts; returns the most bytes held, and the rows."""
    scorer = ContinuationScorer(subject.model, subject.tokenizer, max_kv_bytes=max_kv_bytes)
    rng, vocabulary = random.Random(1), WORDS.split()
    largest, start = 0, time.perf_counter()
    for done in range(0, contexts, IN_A_CALL):
        subject.progress.tick(f"{done:,} of {contexts:,} contexts")
        n = min(IN_A_CALL, contexts - done)
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 8))) for _ in range(n)]
        scorer.score_continuations(texts, [[rng.choice(vocabulary)] for _ in texts])
        largest = max(largest, scorer.stats().bytes)
    seconds = time.perf_counter() - start
    name = f"{contexts:,} contexts"
    measured: list[tuple[str, str, float]] = [
        ("time", "s", seconds),
        ("held at most", "bytes", largest),
        ("allowed", "bytes", max_kv_bytes),
        ("tokens dropped", "", scorer.stats().dropped),
    ]
    return largest, [Row(MANY, name, *each[:2], [each[2]]) for each in measured]
