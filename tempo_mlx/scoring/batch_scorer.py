"""Texts read from their beginnings, for models that cannot hold branches in one sequence."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ..errors import TempoError
from ..models.backbone import Backbone
from .requests import ScoreRequest, ScoringStats, TokenLogprobs
from .vocabulary_rows import Rows, VocabularyRows

#: What :attr:`.ScoringStats.method` calls it.
FULL_PASSES = "full passes"


class BatchScorer:
    """Reads every text from its beginning, in batches that are padded behind their ends.

    Args:
        model: a language model as ``mlx_lm.load`` returns it.
        chunk_size: tokens of a forward pass, padding included; a longer text goes alone.
        sets: see :class:`~.prefix_tree_scorer.PrefixTreeScorer`.
    """

    def __init__(self, model: nn.Module, chunk_size: int, sets: Sequence[Sequence[int]]):
        self.model = model
        self.stats = ScoringStats(FULL_PASSES)
        self._chunk_size = chunk_size
        self._backbone: Backbone | None = None
        with suppress(TempoError):
            self._backbone = Backbone(model)
        whole = self._backbone is not None and self._divides(self._backbone)
        self._backbone = self._backbone if whole else None
        logits = self._backbone.logits if self._backbone else lambda rows: rows
        self._vocabulary = VocabularyRows(logits, sets, self.stats)

    def reset(self) -> None:
        """Nothing is held."""

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TokenLogprobs]:
        answers: dict[int, TokenLogprobs] = {}
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
                found = self._vocabulary.answer(asked, _rows_of(output), [])
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
        if self._backbone is None:
            logits: mx.array = self.model(tokens, cache=cache)
            return logits
        with self._backbone.return_hidden() as hook:
            self.model(tokens, cache=cache)
            hidden: mx.array = hook.taken
        return hidden

    def _divides(self, backbone: Backbone) -> bool:
        with backbone.return_hidden() as hook:
            logits = self.model(mx.zeros((1, 2), mx.int32))
            hidden = hook.taken
        return backbone.divide(logits, hidden)


def _rows_of(output: mx.array) -> Rows:
    """Looks up rows of an array [n, D]."""
    return lambda rows: output[mx.array(rows.astype(np.int32))]
