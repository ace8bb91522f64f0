"""Scores of continuations as one would write them down: every text alone, through stock mlx-lm."""

import functools

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

NO_SPACE = ",.?!;:)]}%…。，、？！；：）"
QUOTES = "'’\"”"
CLITICS = ("'s", "'m", "'t", "'d", "'ll", "'re", "'ve", "n't")


class BruteScorer:
    """Runs every context with every word through the model by itself, and sums in float64.

    ``start`` is the id of what stands before every context.
    """

    def __init__(
        self,
        model,
        tokenizer,
        weight=1.0,
        word_insertion_bonus=0.0,
        truecase=None,
        max_context_tokens=None,
        trailing_space_correction=False,
        start=None,
    ):
        self.start = tokenizer.bos_token_id if start is None else start
        self.model, self.tokenizer = model, tokenizer
        self.weight, self.bonus = weight, word_insertion_bonus
        self.truecase = truecase or (lambda text: text)
        self.kept = max_context_tokens
        self.correct = trailing_space_correction
        self.score = functools.cache(self._score)

    def score_continuations(self, contexts, candidate_words):
        return [
            [self.score(context, word) for word in words]
            for context, words in zip(contexts, candidate_words, strict=True)
        ]

    def _score(self, context, word):
        glued = context == "" or word[0] in NO_SPACE or word.replace("’", "'") in CLITICS
        glued = glued or (word[0] in QUOTES and not any(c.isalnum() for c in word))
        cased = self.truecase(context + ("" if glued else " ") + word)
        before = [self.start, *self.ids(cased[: len(context)])]
        both = [self.start, *self.ids(cased)]
        start = 0
        while start < len(before) and before[start] == both[start]:
            start += 1
        head = self.cut(both[:start])
        total = self.sum(head, both[start:]) - self.sum(head, before[start:])
        if self.correct:
            total += self.ended(self.log_p(head + both[start:])[-1])
            if context:
                total -= self.ended(self.log_p(self.cut(before))[-1])
        return self.weight * total + self.bonus

    def cut(self, ids):
        """The start and the last ones, ``max_context_tokens`` in all."""
        if self.kept is None or len(ids) <= self.kept:
            return ids
        return [ids[0], *ids[len(ids) - self.kept + 1 :]]

    def sum(self, head, ids):
        """Log p of ids behind others."""
        if not ids:
            return 0.0
        rows = self.log_p(head + ids)
        return sum(rows[len(head) - 1 + i, id] for i, id in enumerate(ids))

    def ids(self, text):
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def log_p(self, ids):
        """[tokens, V], float64."""
        cache = make_prompt_cache(self.model)
        logits = np.array(
            self.model(mx.array([ids]), cache=cache)[0].astype(mx.float32), np.float64
        )
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def ended(self, log_p):
        return np.logaddexp.reduce(log_p[self.ending])

    @functools.cached_property
    def ending(self):
        """Tokens at which a word ends."""
        anchor = self.ids("a")
        return [
            id
            for id in range(len(self.tokenizer))
            if id in self.tokenizer.eos_token_ids
            or self.tokenizer.decode([*anchor, id])[1:2] in (*NO_SPACE, *QUOTES, *" \t\n\r\v\f")
            and self.tokenizer.decode([*anchor, id])[1:2] != ""
        ]
