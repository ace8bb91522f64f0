"""Functions by the names and arguments that decoders call today, with the same numbers.

Each keeps the scorer of the last model and tokenizer, and so what was read before.
"""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from .scorer import ContinuationScorer, Word

_last: ContinuationScorer | None = None
_of: tuple[Any, Any] | None = None


def score_texts_batch(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    device: object = None,
    chunk_size: int = 256,
    length_normalize: bool = False,
) -> list[float]:
    """Log-probability of all tokens of each text behind the start, in nats.

    Args:
        model, tokenizer: as ``load`` returns them.
        texts: duplicates cost nothing.
        device, chunk_size: have no effect; mlx's default device computes, and passes are planned.
        length_normalize: divide by the number of tokens behind the start.
    """
    del device, chunk_size
    scores = _scorer(model, tokenizer).score_texts(
        texts, normalize="tokens" if length_normalize else None
    )
    return [each.total for each in scores]


def score_continuations(
    model: nn.Module,
    tokenizer: Any,
    contexts: Sequence[str],
    candidate_words: Sequence[Sequence[Word]],
) -> list[list[float]]:
    """Log-probabilities of words behind contexts; see :class:`.ContinuationScorer`."""
    return _scorer(model, tokenizer).score_continuations(contexts, candidate_words)


def rescore_with_gpt2(
    model: nn.Module, tokenizer: Any, hypotheses: Sequence[str], length_penalty: float
) -> list[float]:
    """Log-probability of all tokens behind the start, less a penalty for each, start included.

    Args:
        model, tokenizer: as ``load`` returns them.
        hypotheses: texts.
        length_penalty: nats for a token.
    """
    scorer = _scorer(model, tokenizer)
    start = scorer.start_length
    return [
        each.logprob - (each.n_tokens + start) * length_penalty
        for each in scorer.score_texts(hypotheses)
    ]


def _scorer(model: nn.Module, tokenizer: Any) -> ContinuationScorer:
    global _last, _of
    if _last is None or _of is None or _of[0] is not model or _of[1] is not tokenizer:
        _last, _of = ContinuationScorer(model, tokenizer), (model, tokenizer)
    return _last
