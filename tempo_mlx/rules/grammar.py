"""Grammars that restrict which tokens may follow each branch.

They are llguidance's: a JSON schema, a regular expression, or a grammar in its Lark-like language.
:class:`Grammar` is a logits processor for mlx-lm's interface.
"""

import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import TempoError
from .table import JsonObject, LongText, Text, setting

#: Most matchers kept, so that a branch can continue from its parent's.
KEPT = 1024


#: Panel of these settings in the command line's help.
GRAMMARS = "Grammars"


def json_schema_setting() -> Any:
    """The setting ``json_schema``."""
    help = "A JSON schema that every text follows."
    return setting(None, JsonObject(), help, panel=GRAMMARS)


def regex_setting() -> Any:
    """The setting ``regex``."""
    help = "A regular expression that every text matches as a whole."
    return setting(None, Text(), help, panel=GRAMMARS)


def lark_setting() -> Any:
    """The setting ``grammar``."""
    help = (
        "A grammar that every text follows, in llguidance's Lark-like language; its rule start "
        "matches the whole text."
    )
    return setting(None, LongText(), help, panel=GRAMMARS)


class MissingGrammarError(TempoError):
    """llguidance is not installed."""


def require_llguidance() -> None:
    """Raise MissingGrammarError unless grammars can be used."""
    if find_spec("llguidance") is None:
        raise MissingGrammarError("grammars need llguidance: pip install 'tempo-mlx[grammar]'")


def compiled(
    json_schema: Mapping[str, Any] | None = None, regex: str | None = None, lark: str | None = None
) -> str | None:
    """The given grammar in llguidance's internal form; None if none is given.

    Args:
        json_schema: for the whole text.
        regex: for the whole text, in the syntax of Rust's ``regex``.
        lark: a grammar in llguidance's language, whose rule ``start`` matches the whole text.

    Raises:
        TempoError: if more than one is given, or the grammar is invalid.
        MissingGrammarError: if llguidance is not installed.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": lark}
    named = [(name, value) for name, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        raise TempoError(f"give only one of json_schema, regex and grammar, got {len(named)}")
    require_llguidance()
    from llguidance import LLMatcher

    name, value = named[0]
    written = value if isinstance(value, str) else json.dumps(value)
    make: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }
    text: str = make[name](written)
    wrong: str = LLMatcher.validate_grammar(text, None)
    if wrong:
        reason = " ".join(wrong.split())
        raise TempoError(f"{name} cannot be used: {reason}")
    return text


@functools.lru_cache(maxsize=2)
def _tokens_of(tokenizer: Any, n_tokens: int) -> Any:
    """llguidance's version of mlx-lm's tokenizer, for n_tokens logits; cached, as it is slow."""
    from llguidance import hf

    try:
        return hf.from_tokenizer(
            tokenizer._tokenizer, n_vocab=n_tokens, eos_token=sorted(tokenizer.eos_token_ids)
        )
    except (AttributeError, ValueError) as error:
        raise TempoError(
            "grammars need a fast Hugging Face tokenizer (tokenizer.json), and this model has none"
        ) from error


class Grammar:
    """A logits processor that removes tokens with which a text would break a grammar.

    Args:
        grammar: as returned by :func:`compiled`.
        tokenizer: mlx-lm's tokenizer wrapper.
        prompt_length: tokens of the prompt, which the grammar does not cover.
        vocabulary_size: V; None takes it from the first logits.

    Raises:
        TempoError: if the tokenizer or the grammar cannot be used. Without ``vocabulary_size``, the
            first call raises it.
    """

    def __init__(
        self, grammar: str, tokenizer: Any, prompt_length: int, vocabulary_size: int | None = None
    ):
        self._grammar = grammar
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        if vocabulary_size is not None:
            self._matchers[()] = self._begin(vocabulary_size)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V], with -inf for tokens that the grammar forbids after ``tokens``."""
        n_tokens = logits.shape[-1]
        text = tuple(np.array(tokens[self._prompt_length :]).tolist())
        matcher = self._matcher(text, n_tokens)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=n_tokens).astype(bool)
        return mx.where(mx.array(allowed), logits, mx.array(-mx.inf, logits.dtype))

    def _matcher(self, text: tuple[int, ...], n_tokens: int) -> Any:
        """The matcher's state after a text."""
        known = len(text)
        while known and text[:known] not in self._matchers:
            known -= 1
        matcher = self._matchers.get(text[:known]) or self._begin(n_tokens)
        if known < len(text):
            matcher = matcher.deep_copy()
            for token in text[known:]:
                if not matcher.consume_token(token):
                    raise TempoError(f"the grammar does not allow token {token} of the text")
        self._matchers[text] = matcher
        self._matchers.move_to_end(text)
        if len(self._matchers) > KEPT:
            self._matchers.popitem(last=False)
        return matcher

    def _begin(self, n_tokens: int) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(_tokens_of(self._tokenizer, n_tokens), self._grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise TempoError(f"the grammar cannot be used: {reason}")
        return matcher
