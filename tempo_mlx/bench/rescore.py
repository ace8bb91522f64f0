"""Hypotheses of a decoder, beside the padded batch that one would write with mlx-lm."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..numerics import log_softmax_at
from ..scoring import ContinuationScorer
from .result import Result, Row, Target, compared, ratio, single
from .score import STORY, WORDS
from .setting import Subject

OURS = "one trie"
PADDED = "padded batch"

GROUP, CALLS, DIFFERENCE = "calls of a decoder", "all calls", "largest difference"

#: Seconds, and a score of each text.
Timed = tuple[float, np.ndarray]

#: Times faster than the padded batch: of a beam's calls, of lists one by one, of lists at once.
STREAM, ONE_BY_ONE, AT_ONCE = 5.0, 2.0, 3.0

#: Rows of a padded batch, as decoders have it.
BATCH_ROWS = 256

#: Words that sound alike.
CONFUSABLE = {
    "to": ("too", "two"),
    "see": ("sea", "c"),
    "sea": ("see", "seat"),
    "boats": ("boat", "votes"),
    "had": ("has", "have"),
    "come": ("came", "calm"),
    "river": ("rivers", "driver"),
    "walked": ("walk", "talked"),
    "storm": ("storms", "stone"),
    "wanted": ("wants", "waited"),
}


@dataclass(frozen=True)
class Job:
    """Calls of a decoder.

    Args:
        name: what they are like.
        calls: texts of each call.
        least: times faster that ours should be than the padded batch.
    """

    name: str
    calls: Sequence[Sequence[str]]
    least: float


def jobs(beams: int = 24, hypotheses: int = 100, lists: int = 3, seed: int = 0) -> list[Job]:
    """A beam search whose texts grow, and n-best lists.

    Args:
        beams: texts of each call of the beam search, at least 1.
        hypotheses: of a list, at least 1.
        lists: of them, at least 1.
        seed: of what is confused with what.
    """
    rng = random.Random(seed)
    story = STORY.split()
    living, calls = [""], []
    for word in story:
        longer = [f"{t} {w}".strip() for t in living for w in (word, *CONFUSABLE.get(word, ()))]
        living = longer if len(longer) <= beams else [longer[0], *rng.sample(longer[1:], beams - 1)]
        calls.append(living)

    def nbest() -> list[str]:
        said = rng.choices(WORDS.split(), k=rng.randint(8, 14))
        found = {" ".join(said): None}
        while len(found) < hypotheses:
            other = list(said)
            for _ in range(rng.randint(1, 3)):
                other[rng.randrange(len(other))] = rng.choice(WORDS.split())
            found[" ".join(other)] = None
        return list(found)

    many = [nbest() for _ in range(lists)]
    return [
        Job(f"beam of {beams}, {len(calls)} calls, each a word longer", calls, STREAM),
        Job(f"{lists} lists of {hypotheses}, one a call", many, ONE_BY_ONE),
        Job(f"{lists} lists of {hypotheses}, all in one call", [sum(many, [])], AT_ONCE),
    ]


def padded_batch(model: nn.Module, tokenizer: Any, texts: Sequence[str], start: int) -> list[float]:
    """Log-probability of each text behind a start, in batches that are padded on the right."""
    scores = []
    for first in range(0, len(texts), BATCH_ROWS):
        ids = [
            [start, *tokenizer.encode(text, add_special_tokens=False)]
            for text in texts[first : first + BATCH_ROWS]
        ]
        width = max(map(len, ids))
        padded = mx.array([own + [0] * (width - len(own)) for own in ids])
        logits = model(padded[:, :-1]).astype(mx.float32)
        found = np.array(log_softmax_at(logits, padded[:, 1:, None])[..., 0], np.float64)
        scores += [float(row[: len(own) - 1].sum()) for row, own in zip(found, ids, strict=True)]
    return scores


def bench_rescore(subject: Subject, beams: int, hypotheses: int, lists: int) -> Result:
    """Time a decoder's calls, ours and a padded batch by turns.

    Args:
        subject: the model.
        beams, hypotheses, lists: see :func:`jobs`.
    """
    work = jobs(beams, hypotheses, lists)
    subject.expect(2 * len(work))
    rows, targets = [], []
    for job in work:
        found, over_ours = _job(subject, job)
        rows += found
        name = f"{job.name}: time of {PADDED} / of ours"
        targets.append(Target(name, ">=", job.least, over_ours))
    return Result("rescore", subject.name, subject.describe(), rows, targets)


def _job(subject: Subject, job: Job) -> tuple[list[Row], float]:
    """All calls of a job in both ways, ours beginning with nothing; padded batch over ours."""
    start = min(subject.tokenizer.eos_token_ids)

    def ours() -> Timed:
        scorer = ContinuationScorer(subject.model, subject.tokenizer, start=start)
        return _timed(lambda texts: [each.total for each in scorer.score_texts(texts)], job)

    def padded() -> Timed:
        model = subject.model.model
        return _timed(partial(padded_batch, model, subject.tokenizer, start=start), job)

    runs = subject.alternate({OURS: ours, PADDED: padded}, f"{job.name}: ")
    exact = runs[PADDED][0][1]
    seconds = {name: [each for each, _ in taken] for name, taken in runs.items()}
    difference = {name: float(np.abs(taken[0][1] - exact).max()) for name, taken in runs.items()}
    times = compared(GROUP, CALLS, "s", seconds, OURS)
    rows = [
        replace(row, name=f"{job.name}: {row.name}")
        for row in [*times, *single(GROUP, DIFFERENCE, "nats", difference)]
    ]
    return rows, ratio(seconds[PADDED], seconds[OURS]).median


def _timed(score: Callable[[Sequence[str]], list[float]], job: Job) -> Timed:
    start = time.perf_counter()
    scores = [score(texts) for texts in job.calls]
    return time.perf_counter() - start, np.concatenate(scores)
