"""Texts as branches of one trie, in a pool of slots."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..decoder import CacheBudgetError
from ..models import PositionedModel
from .passes import Segment, passes, visible
from .questions import Answer, Question, ScoringStats
from .trie import TokenTrie, shared
from .vocabulary_rows import VocabularyRows


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
        self._vocabulary = VocabularyRows(model.logits, sets, self.stats)
        self._trie = TokenTrie(limit)
        self.reset()

    def reset(self) -> None:
        """Let go of all slots."""
        self._trie.clear()
        self._pool = self.model.make_pool(self._limit)
        self._note()

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        # Texts that share a beginning stand side by side.
        waiting = sorted(range(len(questions)), key=lambda i: questions[i].read)[::-1]
        with mx.stream(generation_stream), self._whole():
            while waiting:
                part, segments = self._take(questions, waiting)
                for slots, rows in passes(segments, self._chunk_size):
                    self._read(slots, rows)
                asked = [(questions[i], path) for i, path in part]
                found = self._vocabulary.answer(asked, self._pool.hidden, self._pool.state)
                answers |= zip((i for i, _ in part), found, strict=True)
                self._note()
        return [answers[i] for i in range(len(questions))]

    def _take(
        self, questions: Sequence[Question], waiting: list[int]
    ) -> tuple[list[tuple[int, list[int]]], list["Segment"]]:
        """Take questions off the list until a pass is full; their paths, and what is to be read."""
        self._trie.clock += 1
        part: list[tuple[int, list[int]]] = []
        segments: list[Segment] = []
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
                segments.append(Segment(slots, len(path), shared(before, path)))
                new += n
                before = path
        return part, segments

    def _read(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """One forward pass over new slots, each in one of the rows 0 .. B - 1."""
        trie, pool = self._trie, self._pool
        pool.grow(trie.size)
        seen, mask = visible(trie.chains(slots), rows)
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
