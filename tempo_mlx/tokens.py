"""Between text and token ids."""

import copy
from collections.abc import Sequence
from typing import Any, cast

from .errors import TempoError


class Vocabulary:
    """Texts of tokens, and which tokens end a text.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self.end_tokens: frozenset[int] = frozenset(tokenizer.eos_token_ids)
        # Decoded behind an anchor, a token keeps the space that it begins with.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text: str = tokenizer.decode(self._anchor)

    def text(self, id: int) -> str:
        """The token's text as it stands inside a sentence, its leading space included."""
        if id not in self._texts:
            self._texts[id] = self.decode([id])
        return self._texts[id]

    def beginning(self, texts: tuple[str, ...]) -> set[int]:
        """The tokens whose text begins with one of these."""
        return {id for id in range(len(self._tokenizer)) if self.text(id).startswith(texts)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of consecutive tokens inside a sentence, the leading space included."""
        text: str = self._tokenizer.decode([*self._anchor, *ids])
        if text.startswith(self._anchor_text):
            return text.removeprefix(self._anchor_text)
        return str(self._tokenizer.decode(list(ids)))


def without_end(tokenizer: Any) -> Any:
    """The tokenizer, with no token that ends a text."""
    endless = copy.copy(tokenizer)
    endless.eos_token_ids = set()
    return endless


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[int] | Sequence[dict[str, Any]],
    context_length: int | None = None,
) -> list[int]:
    """Token ids of a prompt: text, ids as they are, or chat messages through the template.

    Raises:
        ValueError: if the prompt is empty, leaves the context no room, holds ids outside the
            vocabulary, or needs a chat template that the tokenizer has not got.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise TempoError("prompt is empty; give at least one character")
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    elif len(prompt) and isinstance(prompt[0], dict):
        if not getattr(tokenizer, "has_chat_template", True):
            raise TempoError("prompt is chat messages, but the model has no chat template")
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
    else:
        ids = [int(id) for id in cast(Sequence[int], prompt)]
        size = len(tokenizer)
        for id in ids:
            if not 0 <= id < size:
                raise TempoError(f"prompt has token id {id}, the vocabulary is [0, {size})")
    if not ids:
        raise TempoError("prompt is empty; give at least one token")
    if context_length is not None and len(ids) >= context_length:
        raise TempoError(
            f"prompt has {len(ids)} tokens, the model's context holds {context_length} and needs "
            "one for an answer; shorten the prompt"
        )
    return list(ids)
