"""Whole texts: what one is asked for, and what its score is made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import check_choice, shown
from ..errors import TempoError

#: Marks that may end a text.
MARKS = ".?!"

#: What a text's log-probability is divided by.
NORMALIZERS = ("words", "tokens")


@dataclass(frozen=True, eq=False)
class TextScore:
    """Log-probability of a text behind its context, in nats.

    Args:
        text: as it was scored, in the case that truecasing gave it.
        total: ``logprob``, divided by ``n_words`` or ``n_tokens`` (at least 1) if it was asked for.
        logprob: of all tokens of the text, and of its end if that was asked for.
        n_words: words between blanks.
        n_tokens: tokens of the text; the end counts as none.
        words: log-probability of each word, [n_words]. A token belongs to the word in which its
            first character lies that is no blank.
        tokens: log-probability of each token, [n_tokens].
        end: log P that the text ends here; None if it was not asked for.
        replaced: log-probability of the context's own tokens that the text has changed, which is
            taken off; 0 if it has changed none.
    """

    text: str
    total: float
    logprob: float
    n_words: int
    n_tokens: int
    words: np.ndarray
    tokens: np.ndarray
    end: float | None = None
    replaced: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON-ready data."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }


def check_end(end: Any) -> None:
    """Raise TempoError unless this says how a text may end."""
    if isinstance(end, bool) or (isinstance(end, str) and end and set(end) <= set(MARKS)):
        return
    raise TempoError(f'end must be True, False or marks of "{MARKS}", got {shown(end)}')


def check_normalizer(normalize: Any) -> None:
    """Raise TempoError unless this says what to divide by."""
    if normalize is not None:
        check_choice("normalize", normalize, NORMALIZERS)


def word_sums(text: str, pieces: list[bytes], logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities of the words of a text, [n words].

    Args:
        text: words between blanks.
        pieces: of each token its UTF-8, [n].
        logprobs: of each token, [n].
    """
    words = text.split()
    if not words:
        return np.zeros(0)
    # Counted without blanks, which tokenizers put where they like.
    starts = np.cumsum([0, *(len(_solid(piece)) for piece in pieces)])[:-1]
    ends = np.cumsum([len(word.encode()) for word in words])
    owner = np.minimum(np.searchsorted(ends, starts, side="right"), len(words) - 1)
    return np.bincount(owner, weights=logprobs, minlength=len(words))


def _solid(piece: bytes) -> bytes:
    """A token's bytes without blanks."""
    return b"".join(piece.split())
