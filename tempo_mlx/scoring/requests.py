"""What is asked of texts, and what the answers have cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class ScoreRequest:
    """What to ask of one text.

    Args:
        tokens: ids of the text, at least 1.
        start: ask for log p of the tokens from here on, at least 1.
        after: ask for the sets of tokens that may follow the text, too.
        greedy: ask whether these tokens are the most probable ones, too.
    """

    tokens: tuple[int, ...]
    start: int
    after: bool = False
    greedy: bool = False

    @property
    def asks(self) -> bool:
        """Whether anything is asked: an empty text has no tokens."""
        return self.after or self.start < len(self.tokens)

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that have to be read: the last is only looked up, unless ``after``."""
        return self.tokens if self.after else self.tokens[:-1]


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """What was asked of one text, in nats.

    Args:
        logprobs: log p of each token from the question's ``start`` on.
        after: log p of each set of tokens after the text, [K]; None where it was not asked for.
        greedy: whether each of these tokens is the most probable one in its place, [n]; None where
            it was not asked for.
    """

    logprobs: np.ndarray
    after: np.ndarray | None = None
    greedy: np.ndarray | None = None


@dataclass
class ScoringStats:
    """What scoring has cost so far.

    Args:
        method: "tree" (one trie of tokens, kept across calls) or "full passes" (every text from
            its beginning, for models that cannot hold branches in one sequence state).
        passes: forward passes through the layers.
        tokens_computed: tokens that went through the layers.
        tokens_reused: tokens that every text by itself would have taken besides.
        rows: tokens that went through the vocabulary layer.
        slots: tokens that are held.
        dropped: tokens that were held and had to make room.
        states: recurrent states that are held, each of one of these tokens.
        bytes: of all that is held, room for more included.
    """

    method: str
    passes: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    rows: int = 0
    slots: int = 0
    dropped: int = 0
    states: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The statistics as JSON-ready data."""
        return asdict(self)


class Reader(Protocol):
    """Answers questions about texts."""

    stats: ScoringStats

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TokenLogprobs]:
        """The answers, in order."""

    def reset(self) -> None:
        """Let go of all that is held."""
