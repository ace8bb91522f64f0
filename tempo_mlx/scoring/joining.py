"""How a text and what follows it are joined: with a blank between them or without one."""

import re
from dataclasses import dataclass

from ..arguments import check_text, shown
from ..errors import TempoError

#: What stands behind a word without a blank.
CLOSING = ",.?!;:)]}%…。，、？！；：）"

#: What closes a quotation without a blank, or opens one, or stands for letters that are left out.
#: Words that begin with one of these are glued only if they have no letter or digit.
QUOTES = "'’\"”"

#: What the next word stands behind without a blank.
OPENING = "([{“‘¿¡（"

#: Second parts of words, as treebanks split them: It 's, I 'm, we 'll, does n't. Words that only
#: begin with an apostrophe, 'cause and 'em, are words of their own.
CLITIC = re.compile(r"(['’](s|m|d|ll|re|ve|t)|n['’]t)(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Joining:
    """The rule by which a text and the next word become one text.

    Args:
        separator: what stands between words: " ", or "" for Chinese, Japanese and Thai, and for
            contexts that bring their own blank.
        keep_blanks: whether blanks behind a context and around a word count. Otherwise they are
            taken off, and the separator stands there.

    Raises:
        TempoError: for a separator that is no text.
    """

    separator: str = " "
    keep_blanks: bool = False

    def __post_init__(self) -> None:
        check_text("separator", self.separator)
        if not isinstance(self.keep_blanks, bool):
            raise TempoError(f"keep_blanks must be True or False, got {shown(self.keep_blanks)}")

    def trimmed(self, context: str, word: str) -> tuple[str, str]:
        """Context and word without the blanks that do not count."""
        return (context, word) if self.keep_blanks else (context.rstrip(), word.strip())

    def between(self, context: str, word: str) -> str:
        """What stands between a context and a word, both trimmed."""
        glued = not context or not word or closes(word) or opens(context)
        blank = context[-1:].isspace() or word[:1].isspace()
        return "" if glued or blank else self.separator

    def join(self, context: str, word: str) -> str:
        """Context and word as one text."""
        context, word = self.trimmed(context, word)
        return context + self.between(context, word) + word


def closes(word: str) -> bool:
    """Whether a word stands behind another one without a blank."""
    if word[0] in QUOTES and not any(map(str.isalnum, word)):
        return True
    return word[0] in CLOSING or CLITIC.match(word) is not None


def opens(context: str) -> bool:
    """Whether the word behind a context follows without a blank."""
    return context[-1] in OPENING
