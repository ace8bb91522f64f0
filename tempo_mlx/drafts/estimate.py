"""How often guesses come true."""

import numpy as np

#: Weight of what was seen before each new observation: about the last 30 count.
MEMORY = 0.97


class HitRates:
    """Shares of guesses that came true, by kind; before the first one a half.

    Args:
        kinds: how many kinds of guesses there are.
    """

    def __init__(self, kinds: int):
        # As if one of two guesses had come true.
        self._hits = np.ones(kinds)
        self._guesses = np.full(kinds, 2.0)

    def __getitem__(self, kind: int) -> float:
        return float(self._hits[kind] / self._guesses[kind])

    def learn(self, kind: int, hit: bool) -> None:
        """Take note of a guess."""
        self._hits[kind] = MEMORY * self._hits[kind] + hit
        self._guesses[kind] = MEMORY * self._guesses[kind] + 1
