"""Answers as OpenAI's interface has them."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..decode.result import GenerationResult
from ..text.vocabulary import Vocabulary
from .generation import TokenScore

#: Why a text ended, here and there.
FINISH = {"stop": "stop", "length": "length", "context": "length"}


def envelope(kind: str, name: str) -> dict[str, Any]:
    """What every answer begins with.

    Args:
        kind: "text_completion", "chat.completion" or "chat.completion.chunk".
        name: of the model.
    """
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """What a request took.

    Args:
        prompt_tokens, completion_tokens: of all prompts and of all texts.
        cached_tokens: of the prompts, those that were not read again.
    """
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def finish_reason(result: GenerationResult) -> str:
    return FINISH[result.finish_reason or "stop"]


def completion_logprobs(
    vocabulary: Vocabulary, scores: Sequence[TokenScore], offset: int = 0
) -> dict[str, Any]:
    """The ``logprobs`` of a completion.

    Args:
        vocabulary: spells tokens; parts of characters as ``⟨e4 bb⟩``.
        scores: of the tokens in order.
        offset: characters of the text before the first of them.
    """
    offsets, bytes_before = [], b""
    for score in scores:
        # A character begins with the byte that is no continuation.
        offsets.append(offset + sum((byte & 0xC0) != 0x80 for byte in bytes_before))
        bytes_before += vocabulary.bytes_of(score.id)
    return {
        "tokens": [vocabulary.text(score.id) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            None
            if score.logprob is None
            else {vocabulary.text(id): logprob for id, logprob in reversed(score.top)}
            for score in scores
        ],
        "text_offset": offsets,
    }


def chat_logprobs(vocabulary: Vocabulary, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """The ``logprobs`` of a chat completion."""

    def told(id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": vocabulary.text(id),
            "logprob": logprob,
            "bytes": list(vocabulary.bytes_of(id)),
        }

    return {
        "content": [
            told(score.id, score.logprob)
            | {"top_logprobs": [told(id, logprob) for id, logprob in score.top]}
            for score in scores
        ],
        "refusal": None,
    }


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
