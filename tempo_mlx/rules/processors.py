"""Logits processors and filters, applied to each branch's distribution before the threshold.

These are mlx-lm's logits processors and the filters of its samplers. They process each row of a
step with the tokens of the text that it ends. The threshold, sets and draws use the processed
distribution; log-probabilities of texts remain those of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    make_logits_processors,
)

from .grammar import Grammar, compiled

#: (tokens of the text so far [L], logits [1, V]) -> logits [1, V], as in mlx-lm.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

#: log-probabilities [1, V] -> the drawn token, [1], as in mlx-lm.
Sampler = Callable[[mx.array], mx.array]

#: log-probabilities [N, V] -> the same with -inf for removed tokens.
Filter = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Xtc:
    """Exclude top choices: with some probability, remove all top choices but the least likely.

    Args:
        probability: of applying it to a row.
        threshold: least probability of a top choice, at most 0.5.
        special_tokens: ids that are never removed.
    """

    probability: float
    threshold: float
    special_tokens: tuple[int, ...] = ()

    def __call__(self, logprobs: mx.array, draws: np.ndarray) -> mx.array:
        """Filter log-probabilities [N, V]; ``draws`` are uniform in [0, 1), [N]."""
        # With probability 1, mlx-lm's function always applies. The draw is made here instead, so a
        # run depends only on its own seed.
        filtered = apply_xtc(logprobs, 1.0, self.threshold, list(self.special_tokens))
        return mx.where(mx.array(draws < self.probability)[:, None], filtered, logprobs)


@dataclass(frozen=True)
class Processors:
    """The processors and filters of one run, in order of application.

    Args:
        processors: see :data:`LogitsProcessor`.
        before, xtc, after: filters of the log-probabilities, in mlx-lm's order: top-p and min-p,
            XTC, top-k.
    """

    processors: tuple[LogitsProcessor, ...] = ()
    before: tuple[Filter, ...] = ()
    xtc: Xtc | None = None
    after: tuple[Filter, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.processors or self.before or self.xtc or self.after)

    @property
    def needs_draws(self) -> bool:
        return self.xtc is not None

    def __call__(
        self, logits: mx.array, texts: Sequence[Sequence[int]], draws: np.ndarray | None = None
    ) -> mx.array:
        """The processed logits [N, V]; -inf for removed tokens.

        Args:
            logits: the model's, [N, V], of any floating type.
            texts: for each row, the ids of the prompt and its text so far.
            draws: uniform in [0, 1), [N]; required if ``needs_draws``.
        """
        if self.processors:
            rows = []
            for i, text in enumerate(texts):
                row, tokens = logits[i : i + 1], mx.array(list(text))
                for processor in self.processors:
                    row = processor(tokens, row)
                rows.append(row)
            logits = mx.concatenate(rows)
        if self.before or self.xtc or self.after:
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for filter in self.before:
                logits = filter(logits)
            if self.xtc is not None:
                assert draws is not None
                logits = self.xtc(logits, draws)
            for filter in self.after:
                logits = filter(logits)
        return logits


def remaining(left: mx.array, p: mx.array) -> mx.array:
    """The model's probabilities p [N, V], with 0 for tokens that processing removed.

    Texts are scored by the model, but continue only with tokens that their row kept.
    """
    return mx.where(left > 0, p, 0.0)


def filters(
    top_p: float = 0.0, top_k: int = 0, min_p: float = 0.0, min_tokens_to_keep: int = 1
) -> tuple[tuple[Filter, ...], tuple[Filter, ...]]:
    """The filters before and after XTC. As in mlx-lm, 0 (or top-p 1) turns a filter off.

    Args:
        top_p: total probability of the most probable tokens that are kept.
        top_k: most tokens kept.
        min_p: least probability of a kept token, relative to the most probable one.
        min_tokens_to_keep: fewest tokens that min-p keeps.
    """
    before: list[Filter] = []
    if 0.0 < top_p < 1.0:
        before.append(partial(apply_top_p, top_p=top_p))
    if min_p > 0.0:
        before.append(lambda p: apply_min_p(p, min_p, min(min_tokens_to_keep, p.shape[-1])))
    after: list[Filter] = []
    if top_k > 0:
        # mlx-lm's function needs top_k < V.
        after.append(lambda p: apply_top_k(p, top_k) if top_k < p.shape[-1] else p)
    return tuple(before), tuple(after)


def processors_of(
    settings: Any, tokenizer: Any, prompt_length: int, vocabulary_size: int
) -> Processors:
    """The processors and filters that a run's settings ask for.

    Args:
        settings: of the run, a :class:`tempo_mlx.Settings`.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt_length: tokens of the run's prompt.
        vocabulary_size: V, the number of logits.

    Raises:
        TempoError: if a grammar cannot be used with the tokenizer.
    """
    processors: list[LogitsProcessor] = list(settings.logits_processors)
    processors += make_logits_processors(
        dict(settings.logit_bias or {}),
        settings.repetition_penalty,
        settings.repetition_context_size,
        settings.presence_penalty,
        settings.presence_context_size,
        settings.frequency_penalty,
        settings.frequency_context_size,
    )
    if grammar := compiled(settings.json_schema, settings.regex, settings.grammar):
        processors.append(Grammar(grammar, tokenizer, prompt_length, vocabulary_size))
    before, after = filters(
        settings.top_p, settings.top_k, settings.min_p, settings.min_tokens_to_keep
    )
    xtc = None
    if settings.xtc_probability > 0:
        # As in mlx_lm.generate, tokens that end a line or the text are never removed.
        kept = [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
        xtc = Xtc(settings.xtc_probability, settings.xtc_threshold, tuple(kept))
    return Processors(tuple(processors), before, xtc, after)
