"""Scores of continuations as one would write them down: every text alone, through stock mlx-lm."""

import functools

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

NO_SPACE = ",.?!;:')"


class BruteScorer:
    """Runs every context with every word through the model by itself, and sums in float64."""

    def __init__(
        self,
        model,
        tokenizer,
        weight=1.0,
        word_insertion_bonus=0.0,
        truecase=None,
        max_context_tokens=None,
        trailing_space_correction=False,
    ):
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
        glue = "" if context == "" or word[0] in NO_SPACE else " "
        cased = self.truecase(context + glue + word)
        before = self.ids(cased[: len(context)]) or [self.tokenizer.bos_token_id]
        both = self.ids(cased)
        if context == "":
            both = [self.tokenizer.bos_token_id, *both]
        start = 0
        while start < len(before) and before[start] == both[start]:
            start += 1
        if start == 0:
            both, start = [self.tokenizer.bos_token_id, *both], 1
        head = both[:start] if self.kept is None else both[:start][-self.kept :]
        rows = self.log_p(head + both[start:])
        total = sum(rows[len(head) - 1 + i, id] for i, id in enumerate(both[start:]))
        if self.correct:
            total += self.ended(rows[-1])
            if context:
                alone = before if self.kept is None else before[-self.kept :]
                total -= self.ended(self.log_p(alone)[-1])
        return self.weight * total + self.bonus

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
            or self.tokenizer.decode([*anchor, id])[1:2] in (*NO_SPACE, *" \t\n\r\v\f")
            and self.tokenizer.decode([*anchor, id])[1:2] != ""
        ]
