"""Conversion between text and token ids."""

import copy
import functools
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers.pre_tokenizers import ByteLevel

from ..arguments import check_text, shown
from ..errors import TempoError
from .chat import Chat, encode_chat
from .printable import spelled, unfinished

#: Tokenizers decode an incomplete character to this.
REPLACEMENT = "\ufffd"

#: A byte in SentencePiece vocabularies.
_BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")

if TYPE_CHECKING:
    from ..models import PlainModel, PositionedModel

#: A prompt: text, token ids, or chat messages for the model's template.
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


class Vocabulary:
    """The texts of tokens, and the tokens that end a text.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self.end_tokens: frozenset[int] = frozenset(tokenizer.eos_token_ids)
        # Decoded after an anchor, a token keeps its leading space.
        self._anchor: list[int] = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text: str = tokenizer.decode(self._anchor)

    def bytes_of(self, id: int) -> bytes:
        """UTF-8 of the token inside a sentence, including its leading space."""
        if id not in self._bytes:
            text = self._decoded([id])
            raw = self._raw(id) if REPLACEMENT in text else None
            self._bytes[id] = text.encode() if raw is None else raw
        return self._bytes[id]

    def text(self, id: int) -> str:
        """The token for display; incomplete characters are shown as bytes, ``⟨e4 bb⟩``."""
        if id not in self._texts:
            self._texts[id] = spelled(self.bytes_of(id))
        return self._texts[id]

    def beginning(self, texts: tuple[str, ...]) -> set[int]:
        """The tokens whose text begins with one of these."""
        starts = tuple(text.encode() for text in texts)
        return {id for id in range(len(self.tokenizer)) if self.bytes_of(id).startswith(starts)}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of consecutive tokens inside a sentence, including the leading space.

        An incomplete character at the end is left out.
        """
        # An incomplete character has at most 3 bytes, so 4 bytes are enough to see.
        last, n = b"", 0
        while n < len(ids) and len(last) < 4:
            n += 1
            last = self.bytes_of(ids[-n]) + last
        cut = unfinished(last)
        if not cut:
            return self._decoded(ids)
        held, n = b"", 0
        while len(held) < cut:
            n += 1
            held = self.bytes_of(ids[-n]) + held
        return self._decoded(ids[:-n]) + held[:-cut].decode(errors="replace")

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode([*self._anchor, *ids])
        if text.startswith(self._anchor_text):
            return text.removeprefix(self._anchor_text)
        return str(self.tokenizer.decode(list(ids)))

    def _raw(self, id: int) -> bytes | None:
        """The bytes of a token according to the vocabulary; None if it has none."""
        name = self.tokenizer.convert_ids_to_tokens(id)
        if isinstance(name, bytes):
            return name
        if not name:
            return None
        if match := _BYTE_FALLBACK.fullmatch(name):
            return bytes.fromhex(match[1])
        alphabet = _byte_level()
        return bytes(alphabet[c] for c in name) if alphabet.keys() >= set(name) else None


@functools.cache
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's encoder.py).

    Printable bytes stand for themselves. The others, in order, have the characters from 256 on.
    """
    alphabet = sorted(ByteLevel.alphabet())
    own = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(alphabet[len(own) :], others, strict=True))


def add_end_token(tokenizer: Any, token: str) -> None:
    """Treat another token as an end of text.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper, changed in place.
        token: as spelled in the vocabulary, or its id; see mlx-lm's ``add_eos_token``.

    Raises:
        TempoError: if the tokenizer has no such token. mlx-lm would use the unknown token or none.
    """
    vocabulary = tokenizer.get_vocab()
    try:
        id = int(token)
        known = id in vocabulary.values()
    except ValueError:
        known = token in vocabulary
    if not known:
        ids = tokenizer.encode(token, add_special_tokens=False)
        hint = f"; the text {shown(token)} is token {ids[0]}" if len(ids) == 1 else ""
        raise TempoError(
            "extra_eos_token must be a token as spelled in the model's vocabulary, or its id, got "
            f"{shown(token)}{hint}"
        )
    tokenizer.add_eos_token(token)


def without_end(tokenizer: Any) -> Any:
    """A copy of the tokenizer in which no token ends a text."""
    endless = copy.copy(tokenizer)
    endless.eos_token_ids = set()
    return endless


def require_tokenizer(tokenizer: Any) -> None:
    """Raise TempoError unless this is a tokenizer as :func:`tempo_mlx.load` returns it."""
    ends = getattr(tokenizer, "eos_token_ids", None)
    if not isinstance(ends, Collection) or not hasattr(tokenizer, "encode"):
        raise TempoError(
            "tokenizer must be mlx-lm's tokenizer wrapper, the second value that load returns, "
            f"got {type(tokenizer).__name__}"
        )


def encode_prompt(
    tokenizer: Any, prompt: Prompt, model: "PositionedModel | PlainModel"
) -> list[int]:
    """Token ids of a prompt.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt: text, at least one token id (in a list or an integer array), or chat messages; see
            :func:`.chat.encode_chat`.
        model: whose vocabulary and context the prompt must fit.

    Raises:
        TempoError: if the prompt is of another type, empty or too long for the model's context, has
            ids outside the model's vocabulary, or is refused by the chat template.
    """
    require_tokenizer(tokenizer)
    if isinstance(prompt, str):
        if not prompt:
            raise TempoError("prompt is empty; give at least one character")
        check_text("prompt", prompt)
        ids = encode_text(tokenizer, prompt)
    else:
        items = _items(prompt)
        chat = _begins_with_message(items)
        config = prompt.config if isinstance(prompt, Chat) else None
        ids = encode_chat(tokenizer, items, config) if chat else _ids(items)
    if not len(ids):
        raise TempoError("prompt is empty; give at least one token")
    size = model.vocabulary_size
    for id in ids:
        if not 0 <= id < size:
            raise TempoError(
                f"prompt has token id {shown(id)}, but the model's vocabulary is [0, {size})"
            )
    require_room(ids, model)
    return list(ids)


def require_room(ids: Sequence[int], model: "PositionedModel | PlainModel") -> None:
    """Raise TempoError if a prompt leaves no room for an answer in the model's context."""
    if model.context_length is not None and len(ids) >= model.context_length:
        raise TempoError(
            f"prompt has {len(ids)} tokens, but the model's context holds {model.context_length}, "
            "including at least one for the answer; shorten the prompt"
        )


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is chat messages."""
    return not isinstance(prompt, str) and _begins_with_message(_items(prompt))


def _begins_with_message(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], Mapping)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text. The tokenizer's initial tokens occur once, even if the text spells them."""
    before = begin_tokens(tokenizer)
    bare = list(tokenizer.encode(text, add_special_tokens=False)) if before else []
    return bare if before and bare[: len(before)] == before else list(tokenizer.encode(text))


def begin_tokens(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before every text, such as a BOS token."""
    whole, bare = (list(tokenizer.encode("a", add_special_tokens=on)) for on in (True, False))
    ends = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return whole[: next(ends, 0)]


def _items(prompt: Any) -> list[Any]:
    """The items of a prompt that is not text."""
    if hasattr(prompt, "tolist"):  # arrays of numpy and mlx
        prompt = prompt.tolist()
    if isinstance(prompt, Mapping):
        raise TempoError("prompt is one chat message; give a list of messages")
    if isinstance(prompt, (bytes, bytearray, memoryview)) or not isinstance(prompt, Sequence):
        raise TempoError(
            f"prompt must be text, token ids or chat messages, got {shown(prompt)}"
            + ("; decode it first" if isinstance(prompt, (bytes, bytearray)) else "")
        )
    return list(prompt)


def _ids(items: list[Any]) -> list[int]:
    ids = []
    for i, item in enumerate(items):
        if isinstance(item, (str, list, tuple)):
            raise TempoError(
                f"prompt is one prompt, got a list with {shown(item)}; for many prompts use "
                "batch_generate"
            )
        try:
            # Unlike int(), this refuses fractions.
            id = operator.index(item)
        except TypeError:
            id = None
        if id is None or isinstance(item, bool):
            raise TempoError(f"prompt[{i}] must be a token id, an integer, got {shown(item)}")
        ids.append(id)
    return ids
