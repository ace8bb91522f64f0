"""English truecasing: the case that words of lower-case text have in print."""

import re
from collections.abc import Callable
from functools import cache

from ..errors import TempoError

MISSING = "truecase='english' needs the truecase package: pip install 'tempo-mlx[truecase]'"

#: What stands before the second part of a word that the tokenizer splits, as in gon-na or do-n't.
INSIDE_WORD = re.compile(r"\w['\u2019]?\Z")


@cache
def english() -> Callable[[str], str]:
    """A function that gives English text the case it has in print: i met john -> I met John.

    It changes the case of letters and nothing else. Words that the package does not know, and the
    second parts of words such as gonna, stay as they are. A text counts as one sentence: its first
    word gets a capital, later sentences do not. A text of capitals only is first written in small
    letters: I'M AT MARY'S -> I'm at Mary's.

    The statistics are those of the truecase package (Lita et al., "tRuEcasIng", ACL 2003) for the
    words of NLTK's rule-based tokenizer; nothing is fetched. They load in seconds, once a process.

    Raises:
        ValueError: if the package is missing.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer  # type: ignore[import-untyped]
        from truecase import TrueCaser  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise TempoError(MISSING) from error
    caser, tokenizer = TrueCaser(), NLTKWordTokenizer()
    # The first of the forms that score alike wins, and sets have another order in each process.
    forms = {
        word: sorted(forms, key=str.swapcase) for word, forms in caser.word_casing_lookup.items()
    }
    caser.word_casing_lookup = forms

    def truecase(text: str) -> str:
        lower = text.lower()
        if text.isupper() and len(lower) == len(text):
            text = lower
        tokens = tokenizer.tokenize(text)
        parts, end = [], 0
        for token, cased in zip(tokens, caser.get_true_case_from_tokens(tokens), strict=True):
            lower = token.lower()
            if lower == token.upper():
                continue  # No letters with a case. Some of these, quotes, the tokenizer rewrites.
            # Only such tokens can lie before it, so that the first match is the token.
            start = text.index(token, end)
            changed = lower in forms and (len(cased), cased.lower()) == (len(token), lower)
            if not changed or INSIDE_WORD.search(text, max(0, start - 2), start):
                cased = token
            parts += [text[end:start], cased]
            end = start + len(token)
        return "".join(parts) + text[end:]

    return truecase
