"""Guesses by suffix: what followed when the text's last tokens occurred before.

Source: Saxena, "Prompt Lookup Decoding", 2023; Oliaro et al., "SuffixDecoding",
arXiv:2411.04975. Here every earlier occurrence is followed, so that a draft splits where their
continuations differ, and how often a match of some length goes on is learnt from the text itself,
its prompt included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .draft import Candidate
from .estimate import HitRates

#: Tokens that a suffix must share with an earlier place to count as a match.
SHORTEST = 2

#: Length from which longer matches are all alike.
LONGEST = 16

#: Share of matches that go on, by their length, before the text has shown its own: what
#: SmolLM2-135M did on the first 12 prompts of scripts/prompts.txt, 60 tokens each. Longer ones
#: hardly differ.
SHARES, MOST_SHARE = {SHORTEST: 0.4}, 0.7

#: Earlier places that are followed at most, the latest ones.
MOST_PLACES = 8


@dataclass(frozen=True)
class _Match:
    """An earlier place: the index of the token after it, and the tokens that agree before it."""

    next: int
    length: int


#: Matches, and the tokens that a draft has after the text.
_Place = tuple[tuple[_Match, ...], tuple[int, ...]]


class SuffixLookup:
    """Guesses what follows from earlier occurrences of the text's end.

    Args:
        tokens: ids of the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # by the last SHORTEST tokens
        self._matches: tuple[_Match, ...] = ()
        self._rates = HitRates([SHARES.get(n, MOST_SHARE) for n in range(LONGEST + 1)])
        for token in tokens:
            self.append(token)

    def append(self, token: int, alone: bool = True) -> None:
        guessed: set[int] = set()
        for match in self._matches:
            guess, kind = self._tokens[match.next], min(match.length, LONGEST)
            # As in candidates: of matches that agree the longest one counts.
            if guess not in guessed:
                guessed.add(guess)
                self._rates.learn(kind, alone and guess == token)
        going = self._following(self._matches, (), token)
        self._tokens.append(token)
        n = len(self._tokens)
        if n < SHORTEST:
            return
        ends = self._ends.setdefault(tuple(self._tokens[-SHORTEST:]), [])
        known = {match.next for match in going}
        found = [_Match(end, SHORTEST) for end in ends[-MOST_PLACES:][::-1] if end not in known]
        # Longest first, of equally long ones the latest.
        matches = sorted([*going, *found], key=lambda m: (-m.length, -m.next))
        self._matches = tuple(matches[:MOST_PLACES])
        ends.append(n)

    def begin(self) -> _Place:
        return self._matches, ()

    def candidates(self, place: _Place) -> list[Candidate]:
        matches, after = place
        found: dict[int, float] = {}
        left = 1.0
        for match in matches:
            token = self._at(match.next, after)
            if token not in found:
                found[token] = min(left, self._rates[min(match.length, LONGEST)])
                left -= found[token]
        return [
            Candidate(token, chance, (self._following(matches, after, token), (*after, token)))
            for token, chance in found.items()
        ]

    def _at(self, index: int, after: tuple[int, ...]) -> int:
        """A token of the text with what a draft has after it."""
        beyond = index - len(self._tokens)
        return self._tokens[index] if beyond < 0 else after[beyond]

    def _following(
        self, matches: tuple[_Match, ...], after: tuple[int, ...], token: int
    ) -> tuple[_Match, ...]:
        """The matches that go on with a token; each may run into the draft itself."""
        return tuple(
            _Match(match.next + 1, match.length + 1)
            for match in matches
            if self._at(match.next, after) == token
        )
