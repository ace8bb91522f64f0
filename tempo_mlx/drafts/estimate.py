"""How often guesses come true."""

from collections.abc import Sequence

import numpy as np

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
        self._hits = PRIOR * np.array(shares, float)
        self._guesses = np.full(len(shares), PRIOR)

    def __getitem__(self, kind: int) -> float:
        return float(self._hits[kind] / self._guesses[kind])

    def learn(self, kind: int, hit: bool) -> None:
        """Take note of a guess."""
        self._hits[kind] = MEMORY * self._hits[kind] + hit
        self._guesses[kind] = MEMORY * self._guesses[kind] + 1
