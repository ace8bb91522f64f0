"""Log-probabilities of the ends of many texts, read as one trie of tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ..combining import log_p_at
from ..decoder import CacheBudgetError
from ..models import PositionedModel
from ..models.halves import Halves
from ..selection import require_finite
from .trie import TokenTrie, shared

#: Tokens whose logits exist at the same time.
HEAD_ROWS = 128

#: Pairs of tokens and slots up to which it does not matter how many of them see each other.
SMALL_AREA = 4096

#: How much larger the attention of texts in one row may be than that of each alone.
SHARED_AREA = 1.5

#: How much of a batch's attention may be padding, as a multiple of what is not.
PADDED_AREA = 4


@dataclass(frozen=True)
class Question:
    """What to ask of one text.

    Args:
        tokens: ids of the text, at least 1.
        start: ask for log p of the tokens from here on, at least 1.
        after: ask for the sets of tokens that may follow the text, too.
    """

    tokens: tuple[int, ...]
    start: int
    after: bool = False

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that have to be read: the last is only looked up, unless ``after``."""
        return self.tokens if self.after else self.tokens[:-1]


@dataclass(frozen=True)
class Answer:
    """What was asked of one text, in nats.

    Args:
        logprobs: log p of each token from the question's ``start`` on.
        after: log p of each set of tokens behind the text, [K]; None where it was not asked for.
    """

    logprobs: np.ndarray
    after: np.ndarray | None = None


@dataclass
class ScoringStats:
    """What scoring has cost so far.

    Args:
        method: "tree" (one trie of tokens, kept across calls) or "full passes" (every text from
            its beginning, for models that cannot hold branches in one sequence state).
        passes: forward passes through the layers.
        tokens_computed: tokens that went through the layers.
        tokens_reused: tokens that every text by itself would have taken besides.
        rows: tokens that went through the vocabulary layer.
        slots: tokens that are held.
        dropped: tokens that were held and had to make room.
        bytes: of all that is held, room for more included.
    """

    method: str
    passes: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    rows: int = 0
    slots: int = 0
    dropped: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON-ready data."""
        return asdict(self)


class Reader(Protocol):
    """Answers questions about texts."""

    stats: ScoringStats

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers, in order."""

    def reset(self) -> None:
        """Let go of all that is held."""


class TreeReader:
    """Reads texts as branches of one trie, in a pool of slots that is kept across calls.

    What texts share is read once. The tokens that are new go through the layers in one pass, in
    rows of texts that share much; each sees the slots of its own text. Only tokens whose next
    token is asked about go through the vocabulary layer.

    Args:
        model: reads the tokens.
        max_kv_bytes: bytes that the pool may take.
        chunk_size: tokens of a forward pass.
        sets: K sets of token ids that a text may be asked about.
    """

    def __init__(
        self,
        model: PositionedModel,
        max_kv_bytes: int,
        chunk_size: int,
        sets: Sequence[Sequence[int]],
    ):
        slot_bytes = model.slot_bytes + model.hidden_bytes
        limit = max_kv_bytes // slot_bytes
        if limit < 1:
            raise CacheBudgetError(
                f"max_kv_bytes must be at least {slot_bytes:,}, the bytes of one token, "
                f"got {max_kv_bytes:,}"
            )
        self.model = model
        self.stats = ScoringStats("tree")
        self._slot_bytes, self._limit = slot_bytes, limit
        self._chunk_size = chunk_size
        self._vocabulary = _VocabularyRows(model.logits, sets, self.stats)
        self.reset()

    def reset(self) -> None:
        self._trie = TokenTrie(self._limit)
        self._pool = self.model.make_pool(self._limit)
        self._note()

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        # Texts that share a beginning stand side by side.
        waiting = sorted(range(len(questions)), key=lambda i: questions[i].read)[::-1]
        with mx.stream(generation_stream), self._whole():
            while waiting:
                part, segments = self._take(questions, waiting)
                for slots, rows in _passes(segments, self._chunk_size):
                    self._read(slots, rows)
                asked = [(questions[i], path) for i, path in part]
                found = self._vocabulary.answer(asked, self._pool.hidden, self._pool.state)
                answers |= zip((i for i, _ in part), found, strict=True)
                self._note()
        return [answers[i] for i in range(len(questions))]

    def _take(
        self, questions: Sequence[Question], waiting: list[int]
    ) -> tuple[list[tuple[int, list[int]]], list["_Segment"]]:
        """Take questions off the list until a pass is full; their paths, and what is to be read."""
        self._trie.clock += 1
        part: list[tuple[int, list[int]]] = []
        segments: list[_Segment] = []
        new = 0
        before: list[int] = []
        while waiting:
            tokens = questions[waiting[-1]].read
            known = self._trie.find(tokens)
            n = len(tokens) - len(known)
            if part and new + n > self._chunk_size:
                break
            slots = self._trie.extend(known, tokens[len(known) :])
            if slots is None and part:
                break
            if slots is None:
                raise CacheBudgetError(
                    f"a text of {len(tokens)} tokens needs {len(tokens) * self._slot_bytes:,} "
                    f"bytes, max_kv_bytes allows {self._limit * self._slot_bytes:,}; raise it, or "
                    "set max_context_tokens"
                )
            path = known + slots
            part.append((waiting.pop(), path))
            self.stats.tokens_reused += len(known)
            if slots:
                segments.append(_Segment(slots, len(path), shared(before, path)))
                new += n
                before = path
        return part, segments

    def _read(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """One forward pass over new slots, each in one of the rows 0 .. B - 1."""
        trie, pool = self._trie, self._pool
        pool.grow(trie.size)
        seen, mask = _visible(trie.chains(slots), rows)
        pool.plan(slots, seen)
        hidden = self.model(
            mx.array(trie.token[slots].astype(np.int32))[None],
            trie.depth[slots][None],
            mx.array(mask)[None, None],
            pool,
            rows=rows,
            layers_only=True,
        )
        pool.keep_hidden(hidden[0])
        mx.async_eval(pool.state)
        self.stats.passes += 1
        self.stats.tokens_computed += len(slots)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails half-way leaves slots that were never written: they are all dropped."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def _note(self) -> None:
        self.stats.slots, self.stats.dropped = len(self._trie), self._trie.dropped
        self.stats.bytes = self._pool.nbytes


@dataclass(frozen=True)
class _Segment:
    """New slots of one text: they follow each other, behind slots that were there.

    ``length`` counts the text's slots, ``shared`` those that the segment before has, too.
    """

    slots: list[int]
    length: int
    shared: int


def _passes(segments: list[_Segment], chunk_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide new slots into forward passes, and each pass into rows.

    Texts share a row while that makes their attention, of T tokens on S slots, not much larger
    than it is for each alone.

    Yields:
        slots [N] and their rows [N], row by row.
    """
    rows: list[tuple[list[int], int]] = []  # slots, and how many they see
    alone = 0
    for segment in segments:
        area = len(segment.slots) * segment.length
        if rows:
            slots, sees = rows[-1]
            sees += segment.length - segment.shared
            together = (len(slots) + len(segment.slots)) * sees
            if together <= max(SMALL_AREA, SHARED_AREA * (alone + area)):
                rows[-1] = slots + segment.slots, sees
                alone += area
                continue
        rows.append((list(segment.slots), segment.length))
        alone = area
    batch: list[tuple[list[int], int]] = []
    for slots, sees in rows:
        for start in range(0, len(slots), chunk_size):
            row = slots[start : start + chunk_size], sees
            if batch and not _fit([*batch, row], chunk_size):
                yield _side_by_side(batch)
                batch = []
            batch.append(row)
    if batch:
        yield _side_by_side(batch)


def _fit(batch: list[tuple[list[int], int]], chunk_size: int) -> bool:
    """Whether rows go together: not too many tokens, not too much padding."""
    widths = [len(slots) for slots, _ in batch]
    area = sum(len(slots) * sees for slots, sees in batch)
    padded = len(batch) * max(widths) * max(sees for _, sees in batch)
    return sum(widths) <= chunk_size and padded <= max(16 * SMALL_AREA, PADDED_AREA * area)


def _side_by_side(batch: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    slots = np.concatenate([np.array(slots, np.int64) for slots, _ in batch])
    return slots, np.repeat(np.arange(len(batch)), [len(slots) for slots, _ in batch])


def _visible(chains: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each row has to hold, and what each of its tokens sees of that.

    Args:
        chains: the slots that each token sees, [N, longest], -1 where there is no more.
        rows: the row of each token, [N].

    Returns:
        slots of each row, [B, S]; where a row has fewer it names one of them again. And the mask
        [N, S], True where a token sees the slot at that place of its row.
    """
    N, B, P = len(rows), int(rows.max()) + 1, int(chains.max()) + 1
    token, _ = present = np.nonzero(chains >= 0)
    named, place = np.unique(rows[token] * P + chains[present], return_inverse=True)
    row, slot = named // P, named % P
    first = np.searchsorted(row, np.arange(B))
    S = int(np.bincount(row).max())
    seen = np.repeat(slot[first][:, None], S, axis=1)
    seen[row, np.arange(len(named)) - first[row]] = slot
    mask = np.zeros((N, S), bool)
    mask[token, place - first[rows[token]]] = True
    return seen, mask


class FullPasses:
    """Reads every text from its beginning, in batches that are padded behind their ends.

    Args:
        model: a language model as ``mlx_lm.load`` returns it.
        chunk_size: tokens of a forward pass, padding included; a longer text goes alone.
        sets: as of :class:`TreeReader`.
    """

    def __init__(self, model: nn.Module, chunk_size: int, sets: Sequence[Sequence[int]]):
        self.model = model
        self.stats = ScoringStats("full passes")
        self._chunk_size = chunk_size
        self._halves: Halves | None = None
        with suppress(ValueError):
            self._halves = Halves(model)
        whole = self._halves is not None and self._divides(self._halves)
        self._halves = self._halves if whole else None
        logits = self._halves.logits if self._halves else lambda rows: rows
        self._vocabulary = _VocabularyRows(logits, sets, self.stats)

    def reset(self) -> None:
        """Nothing is held."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        order = sorted(range(len(questions)), key=lambda i: questions[i].read)
        with mx.stream(generation_stream):
            for batch in self._batches([(i, questions[i].read) for i in order]):
                texts = [text for text, _ in batch]
                width = max(map(len, texts))
                padded = [[*text, *[0] * (width - len(text))] for text in texts]
                output = self._output(mx.array(padded)).reshape(len(texts) * width, -1)
                asked = [
                    (questions[i], [row * width + at for at in range(len(questions[i].read))])
                    for row, (_, own) in enumerate(batch)
                    for i in own
                ]
                found = self._vocabulary.answer(
                    asked, lambda rows, output=output: output[mx.array(rows.astype(np.int32))], []
                )
                answers |= zip((i for _, own in batch for i in own), found, strict=True)
                self.stats.passes += 1
                computed = sum(map(len, texts))
                self.stats.tokens_computed += computed
                self.stats.tokens_reused += sum(len(path) for _, path in asked) - computed
        return [answers[i] for i in range(len(questions))]

    def _batches(
        self, texts: list[tuple[int, tuple[int, ...]]]
    ) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Sorted texts, those that begin another one read with it; with who asked for them."""
        batch: list[tuple[tuple[int, ...], list[int]]] = []
        for i, text in texts:
            if batch and text[: len(batch[-1][0])] == batch[-1][0]:
                batch[-1] = text, [*batch[-1][1], i]
                continue
            width = max([len(text), *(len(other) for other, _ in batch)])
            if batch and width * (len(batch) + 1) > self._chunk_size:
                yield batch
                batch = []
            batch.append((text, [i]))
        if batch:
            yield batch

    def _output(self, tokens: mx.array) -> mx.array:
        """What the vocabulary layer reads, [B, T, D], or logits where it cannot be run alone."""
        cache = make_prompt_cache(self.model)
        if self._halves is None:
            return self.model(tokens, cache=cache)
        with self._halves.layers_only() as tap:
            self.model(tokens, cache=cache)
            return tap.taken

    def _divides(self, halves: Halves) -> bool:
        with halves.layers_only() as tap:
            logits = self.model(mx.zeros((1, 2), mx.int32))
            hidden = tap.taken
        return halves.divide(logits, hidden)


class _VocabularyRows:
    """The vocabulary layer, for the tokens whose next token is asked about.

    Args:
        logits: what it makes of outputs of the layers, [1, R, D] -> [1, R, V].
        sets: as of :class:`TreeReader`.
        stats: counts its rows.
    """

    def __init__(self, logits: Any, sets: Sequence[Sequence[int]], stats: ScoringStats):
        self._logits, self._stats = logits, stats
        self._ids = sets
        self._sets: mx.array | None = None  # 1 for each token of a set, [V, K]

    def answer(
        self, asked: list[tuple[Question, list[int]]], hidden: Any, state: list[mx.array]
    ) -> list[Answer]:
        """Answer questions about texts that were read.

        Args:
            asked: each question with the places of its tokens, [read].
            hidden: places [R] -> outputs of the layers [R, D].
            state: arrays to evaluate with the first answers.
        """
        # Every token asked about: the place that it follows, its id, and whose it is.
        places = [np.array(path[q.start - 1 : len(q.tokens) - 1], np.int64) for q, path in asked]
        ids = [np.array(q.tokens[q.start :], np.int64) for q, _ in asked]
        ends = np.array([path[-1] for q, path in asked if q.after], np.int64)
        rows, at = np.unique(np.concatenate([*places, ends]), return_inverse=True)
        n_tokens = len(at) - len(ends)
        logprobs, after = self._look_up(
            rows, at[:n_tokens], np.concatenate(ids), len(ends) > 0, hidden, state
        )
        require_finite(logprobs)
        answers, following = [], iter(at[n_tokens:])
        bounds = np.cumsum([0, *map(len, ids)])
        for (question, _), start, stop in zip(asked, bounds, bounds[1:], strict=False):
            behind = after[next(following)] if question.after else None
            answers.append(Answer(logprobs[start:stop], behind))
        return answers

    def _look_up(
        self,
        rows: np.ndarray,
        at: np.ndarray,
        ids: np.ndarray,
        after: bool,
        hidden: Any,
        state: list[mx.array],
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p [n] of ids in rows[at], and of the sets in each row [R, K]."""
        logprobs = np.zeros(len(at))
        sets = np.zeros((len(rows), len(self._ids)))
        for start in range(0, len(rows), HEAD_ROWS):
            chunk = rows[start : start + HEAD_ROWS]
            own = np.flatnonzero((at >= start) & (at < start + HEAD_ROWS))
            logits = self._logits(hidden(chunk)[None])[0].astype(mx.float32)
            found, masses = log_p_at(
                logits,
                mx.array((at[own] - start).astype(np.int32)),
                mx.array(ids[own].astype(np.int32)),
                self._members(logits.shape[-1]) if after else None,
            )
            mx.eval(found, *([] if masses is None else [masses]), *state)
            state = []
            logprobs[own] = np.array(found)
            if masses is not None:
                sets[start : start + HEAD_ROWS] = np.array(masses)
        self._stats.rows += len(rows)
        return logprobs, sets

    def _members(self, V: int) -> mx.array:
        if self._sets is None:
            members = np.zeros((V, len(self._ids)), np.float32)
            for column, ids in enumerate(self._ids):
                members[list(ids), column] = 1
            self._sets = mx.array(members)
        return self._sets
