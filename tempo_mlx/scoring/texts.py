"""From a context and a word to the tokens whose probabilities score the word."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..arguments import shown
from ..errors import TempoError
from ..text.vocabulary import begin_tokens
from .prefix_tree import shared

#: What stands behind a word without a space.
CLOSING = (",", ".", "?", "!", ";", ":", "'", ")")

#: Texts whose tokens are remembered: beam searches ask for the same ones again and again.
KNOWN_TEXTS = 1 << 14


@dataclass(frozen=True)
class Candidate:
    """A word in its context, as tokens.

    Args:
        context: as it is scored, in the case that truecasing gave it.
        word: as it is scored.
        context_tokens: ids of the context, those that were kept of it; at least 1.
        tokens: ids of context and word together.
        start: where the word begins in ``tokens``: its first token, or the first that the context
            by itself does not have.
    """

    context: str
    word: str
    context_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    start: int


def joined(context: str, word: str) -> str:
    """Context and word with a space between them; none before punctuation or behind nothing."""
    return context + word if not context or word.startswith(CLOSING) else f"{context} {word}"


class Texts:
    """Makes candidates of contexts and words.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        truecase: text -> the same text, other letters in capitals; None changes nothing.
        max_context_tokens: tokens before the first scored one that are kept, the last ones; a
            token that the tokenizer puts before every text is always kept, and counts. None
            keeps all.
        context_length: positions that the model was made for; None where that is not known.
        vocabulary_size: token ids that the model has, [0, vocabulary_size); None if all are good.
    """

    def __init__(
        self,
        tokenizer: Any,
        truecase: Callable[[str], str] | None = None,
        max_context_tokens: int | None = None,
        context_length: int | None = None,
        vocabulary_size: int | None = None,
    ):
        self._tokenizer = tokenizer
        self._max_context_tokens, self._context_length = max_context_tokens, context_length
        self._vocabulary = range(sys.maxsize if vocabulary_size is None else vocabulary_size)
        self._encode = functools.lru_cache(maxsize=KNOWN_TEXTS)(self._encoded)
        self._truecase = functools.lru_cache(maxsize=KNOWN_TEXTS)(truecase) if truecase else None
        #: what the tokenizer puts before every text
        self.prefix = tuple(begin_tokens(tokenizer))
        names = ("bos_token_id", "eos_token_id")
        ids = *(_id(tokenizer, name) for name in names), *sorted(tokenizer.eos_token_ids)
        #: what stands for an empty context
        self.nothing = self.prefix or tuple(id for id in ids if id in self._vocabulary)[:1]

    def context(self, text: str) -> tuple[int, ...]:
        """Tokens of a context as it stands, at least 1.

        Raises:
            ValueError: if it is too long for the model.
        """
        tokens = self._tokens(self._cased(text.rstrip()))
        return self._kept(tokens, len(tokens))

    def candidate(self, context: str, word: str) -> Candidate:
        """A word in its context; blanks behind the context and around the word do not count.

        Raises:
            ValueError: if truecasing changed more than letters' case, or the text is too long.
        """
        context, word = context.rstrip(), word.strip()
        text = joined(context, word)
        cased = self._cased(text)
        context, word = cased[: len(context)], cased[len(text) - len(word) :]
        before = self._tokens(context)
        tokens = self._begun(cased) if context or self.prefix else before + self._encode(cased)
        start = shared(before, tokens)
        if start == 0:
            # Not even the context's first token stays: what stands before it is nothing.
            tokens = self._tokens("") + tokens
            start = len(tokens) - len(self._encode(cased))
        if start == len(tokens):
            raise TempoError(f"{shown(word)} adds no token to {shown(context)}")
        kept = self._kept(tokens, start)
        own = self._kept(before, len(before))
        first = start - (len(tokens) - len(kept))
        return Candidate(context, word, own, kept, first)

    def _tokens(self, context: str) -> tuple[int, ...]:
        if context:
            return self._begun(context)
        if not self.nothing:
            raise TempoError(
                "a context is empty, and the tokenizer has no token that begins or ends a text; "
                "give every context at least one word"
            )
        return self.nothing

    def _begun(self, text: str) -> tuple[int, ...]:
        """Tokens of a text behind the prefix, which it may begin with itself."""
        ids = self._encode(text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def _kept(self, tokens: tuple[int, ...], start: int) -> tuple[int, ...]:
        """The tokens, of those before ``start`` only the last ones that may be kept."""
        n = self._max_context_tokens
        if n is not None and start > n:
            own = max(0, n - len(self.prefix))
            tokens = self.prefix + tokens[start - own :]
        if self._context_length is not None and len(tokens) > self._context_length:
            raise TempoError(
                f"a context and its word have {len(tokens)} tokens, the model's context holds "
                f"{self._context_length}; set max_context_tokens"
            )
        if max(tokens) not in self._vocabulary:
            raise TempoError(
                f"a context or its word has token id {max(tokens)}, the model's vocabulary is "
                f"[0, {self._vocabulary.stop})"
            )
        return tokens

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _cased(self, text: str) -> str:
        if self._truecase is None or not text:
            return text
        cased = self._truecase(text)
        if not isinstance(cased, str) or len(cased) != len(text) or cased.lower() != text.lower():
            raise TempoError(
                f"truecase must change nothing but the case of letters, it made {shown(cased)} "
                f"of {shown(text)}"
            )
        return cased


def _id(tokenizer: Any, name: str) -> int | None:
    value = getattr(tokenizer, name, None)
    return value if isinstance(value, int) else None
