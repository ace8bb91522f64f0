"""From a context and a word to the tokens whose probabilities score the word."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import shown
from ..errors import TempoError
from ..text.vocabulary import begin_tokens
from .joining import Joining
from .prefix_tree import shared

#: Texts whose tokens are remembered: beam searches ask for the same ones again and again.
KNOWN_TEXTS = 1 << 14


#: The start of a text that the model's recipe names, or its tokenizer.
OWN_START = "auto"

#: A token or several, by id or as text; None for none.
Start = int | str | Sequence[int] | None


@dataclass(frozen=True)
class Candidate:
    """A word in its context, as tokens.

    Args:
        context: as it is scored, in the case that truecasing gave it.
        word: as it is scored; may be several words, or none.
        context_tokens: ids of the context behind the start, those that were kept of it.
        tokens: ids of context and word together, behind the start.
        start: where the word begins in ``tokens``: its first token, or the first that the context
            by itself does not have.
        replaced: as ``tokens``, but up to ``start`` only and then those of the context by itself
            that the word has changed; empty if it has changed none.
    """

    context: str
    word: str
    context_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    start: int
    replaced: tuple[int, ...] = ()


class Texts:
    """Makes candidates of contexts and words.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        truecase: text -> the same text, other letters in capitals; None changes nothing.
        max_context_tokens: tokens before the first scored one that are kept, the last ones; the
            start is always kept, and counts. None keeps all.
        context_length: positions that the model was made for; None where that is not known.
        vocabulary_size: token ids that the model has, [0, vocabulary_size); None if all are good.
        start: stands before every text, once: a text that begins with it gets no other.
        joining: how context and word become one text.
    """

    def __init__(
        self,
        tokenizer: Any,
        truecase: Callable[[str], str] | None = None,
        max_context_tokens: int | None = None,
        context_length: int | None = None,
        vocabulary_size: int | None = None,
        start: tuple[int, ...] = (),
        joining: Joining = Joining(),  # noqa: B008 - frozen
    ):
        self._tokenizer = tokenizer
        self._max_context_tokens, self._context_length = max_context_tokens, context_length
        self._vocabulary = range(sys.maxsize if vocabulary_size is None else vocabulary_size)
        self._encode = functools.lru_cache(maxsize=KNOWN_TEXTS)(self._encoded)
        self._truecase = functools.lru_cache(maxsize=KNOWN_TEXTS)(truecase) if truecase else None
        self.start, self.joining = start, joining

    def context(self, text: str) -> tuple[int, ...]:
        """Tokens of a context as it stands, at least 1.

        Raises:
            ValueError: if it is too long for the model, or empty and there is no start.
        """
        context, _ = self.joining.trimmed(text, "")
        tokens = self._begun(self._cased(context))
        if not tokens:
            raise TempoError(
                "a context is empty and nothing stands before it; give a start, or every context "
                "at least one word"
            )
        return self._kept(tokens, len(tokens))

    def candidate(self, context: str, word: str) -> Candidate:
        """A word in its context; without the blanks that do not count.

        Raises:
            ValueError: if truecasing changed more than letters' case, the text is too long, or no
                token stands before the first scored one.
        """
        context, word = self.joining.trimmed(context, word)
        text = context + self.joining.between(context, word) + word
        cased = self._cased(text)
        context, word = cased[: len(context)], cased[len(text) - len(word) :]
        before, tokens = self._begun(context), self._begun(cased)
        start = shared(before, tokens)
        if start == 0:
            raise TempoError(
                f"no token stands before {shown(cased)}; give a start, or a context whose first "
                "token stays what it is"
            )
        kept = self._kept(tokens, start)
        first = start - (len(tokens) - len(kept))
        replaced = kept[:first] + before[start:] if start < len(before) else ()
        own = self._kept(before, len(before))
        return Candidate(context, word, own, kept, first, replaced)

    def text(self, context: str, text: str) -> Candidate:
        """As :meth:`candidate`, for a text of any number of words."""
        if not self.joining.trimmed(context, text)[1]:
            tokens = self.context(context)
            return Candidate(self._cased(context), "", tokens, tokens, len(tokens))
        return self.candidate(context, text)

    def ended(self, candidate: Candidate, marks: str) -> list[Candidate]:
        """A text followed by each of these marks; none if it is empty or ends with one already."""
        text = candidate.context + self.joining.between(candidate.context, candidate.word)
        text += candidate.word
        if not candidate.word or text[-1] in marks:
            return []
        whole, own = self._begun(text), candidate.tokens
        cut = len(whole) - len(own)  # tokens of the context that were not kept
        found = []
        for mark in marks:
            marked = self._begun(text + mark)
            start = max(1, shared(whole, marked) - cut)
            tokens = self._fitting(own[:start] + marked[start + cut :])
            replaced = own if start < len(own) else ()
            found.append(Candidate(text, mark, own, tokens, start, replaced))
        return found

    def _begun(self, text: str) -> tuple[int, ...]:
        """Tokens of a text behind the start, which it may begin with itself."""
        ids = self._encode(text) if text else ()
        return ids if ids[: len(self.start)] == self.start else self.start + ids

    def _kept(self, tokens: tuple[int, ...], start: int) -> tuple[int, ...]:
        """The tokens, of those before ``start`` only the last ones that may be kept."""
        n = self._max_context_tokens
        if n is not None and start > n:
            own = max(0, n - len(self.start))
            tokens = self.start + tokens[start - own :]
        return self._fitting(tokens)

    def _fitting(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens; TempoError if the model cannot read them."""
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


def start_tokens(tokenizer: Any, start: Start, own: str | None, vocabulary: int) -> tuple[int, ...]:
    """The tokens that stand before every text.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        start: ids, a text, or None; "auto" for the model's own: what its recipe says, else what
            its tokenizer puts before every text, else its BOS token, else the one that ends a text.
        own: what the recipe says, as a text; None if there is none.
        vocabulary: token ids of the model, [0, vocabulary).

    Raises:
        TempoError: for an id that the model does not have, or a text of no token.
    """
    if start is None:
        return ()
    if start == OWN_START:
        if own is None:
            names = ("bos_token_id", "eos_token_id")
            ids = [getattr(tokenizer, name, None) for name in names]
            ids += sorted(tokenizer.eos_token_ids)
            known = [id for id in ids if isinstance(id, int) and 0 <= id < vocabulary]
            return tuple(begin_tokens(tokenizer)) or tuple(known[:1])
        start = own
    if isinstance(start, str):
        found = tokenizer.encode(start, add_special_tokens=False)
    else:
        found = list(start) if isinstance(start, Sequence) else [start]
    whole = all(type(id) is int and 0 <= id < vocabulary for id in found)
    if not found or isinstance(start, bool) or not whole:
        raise TempoError(
            f"start must be a text, token ids in [0, {vocabulary}), or None, got {shown(start)}"
        )
    return tuple(found)
