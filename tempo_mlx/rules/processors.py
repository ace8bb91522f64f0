"""What changes a branch's distribution before the threshold is applied.

mlx-lm's logits processors and the filters of its samplers, for each row of a step with the tokens
of the text that the row ends. The threshold, sets and draws go by the distribution that they
leave; log-probabilities of texts stay the model's own.
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

#: (tokens of the text so far [L], logits [1, V]) -> logits [1, V], as mlx-lm's functions take one.
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

#: log-probabilities [1, V] -> the token that is drawn, [1], as mlx-lm's functions take one.
Sampler = Callable[[mx.array], mx.array]

#: log-probabilities [N, V] -> the same with -inf for tokens that are removed.
Filter = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Xtc:
    """Excludes top choices: where it is drawn, every likely token but the least likely goes.

    Args:
        probability: that it is applied to a row.
        threshold: probability from which a token is a top choice, at most 0.5.
        special_tokens: ids that are never removed.
    """

    probability: float
    threshold: float
    special_tokens: tuple[int, ...] = ()

    def __call__(self, logprobs: mx.array, draws: np.ndarray) -> mx.array:
        """Filter log-probabilities [N, V]; ``draws`` are uniform in [0, 1), [N]."""
        # With probability 1 mlx-lm's function always applies: whether it does is drawn here, so
        # that a run depends on its own seed and on nothing else.
        filtered = apply_xtc(logprobs, 1.0, self.threshold, list(self.special_tokens))
        return mx.where(mx.array(draws < self.probability)[:, None], filtered, logprobs)


@dataclass(frozen=True)
class Processors:
    """What one run's distributions go through, in this order.

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
        """The logits [N, V] of the distributions that are left; -inf where a token is removed.

        Args:
            logits: the model's, [N, V], of any floating type.
            texts: of each row the ids of prompt and text up to it.
            draws: uniform in [0, 1), [N], where ``needs_draws``.
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
    """The model's own probabilities p [N, V] of what processing left, [N, V]; else 0.

    Texts are scored by the model, and continue only with tokens that their own row kept.
    """
    return mx.where(left > 0, p, 0.0)


def filters(
    top_p: float = 0.0, top_k: int = 0, min_p: float = 0.0, min_tokens_to_keep: int = 1
) -> tuple[tuple[Filter, ...], tuple[Filter, ...]]:
    """The filters before and after XTC; 0 (top-p also 1) leaves one out, as in mlx-lm.

    Args:
        top_p: probability that the most probable tokens together have to reach.
        top_k: tokens that are left at most.
        min_p: least probability of a token, times the most probable one's.
        min_tokens_to_keep: tokens that min-p leaves at least.
    """
    before: list[Filter] = []
    if 0.0 < top_p < 1.0:
        before.append(partial(apply_top_p, top_p=top_p))
    if min_p > 0.0:
        before.append(lambda p: apply_min_p(p, min_p, min(min_tokens_to_keep, p.shape[-1])))
    after: list[Filter] = []
    if top_k > 0:
        # All of a small vocabulary: mlx-lm's function wants fewer.
        after.append(lambda p: apply_top_k(p, top_k) if top_k < p.shape[-1] else p)
    return tuple(before), tuple(after)


def processors_of(
    settings: Any, tokenizer: Any, prompt_length: int, vocabulary_size: int
) -> Processors:
    """What the distributions of a run go through.

    Args:
        settings: of the run, a :class:`tempo_mlx.Settings`.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt_length: tokens of the run's prompt.
        vocabulary_size: V, the logits of the model.

    Raises:
        TempoError: for a grammar that cannot be used with the tokenizer.
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
        # As mlx_lm.generate: what ends a line or the text stays possible.
        kept = [*tokenizer.encode("\n", add_special_tokens=False), *tokenizer.eos_token_ids]
        xtc = Xtc(settings.xtc_probability, settings.xtc_threshold, tuple(kept))
    return Processors(tuple(processors), before, xtc, after)
