"""How often guesses come true."""

from collections.abc import Sequence

#: Weight of what was seen before each new observation: about the last 30 count.
MEMORY = 0.97


#: Guesses that count as made before the first one.
PRIOR = 4.0


class HitRates:
    """Shares of guesses that came true, by kind.

    Args:
        shares: of each kind, before anything is known of it.
    """

    def __init__(self, shares: Sequence[float]):
        # Lists: single numbers of an array take several times as long to read.
        self._hits = [PRIOR * share for share in shares]
        self._guesses = [PRIOR] * len(shares)

    def __getitem__(self, kind: int) -> float:
        return self._hits[kind] / self._guesses[kind]

    def learn(self, kind: int, hit: bool) -> None:
        """Take note of a guess."""
        self._hits[kind] = MEMORY * self._hits[kind] + hit
        self._guesses[kind] = MEMORY * self._guesses[kind] + 1
