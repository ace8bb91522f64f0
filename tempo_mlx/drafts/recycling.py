"""Guesses from tokens that were computed and thrown away: what last followed each token.

Source: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling", arXiv:2408.08696. Their tree has a fixed shape; here its shape follows from
how often each rank was right so far.
"""

from collections.abc import Sequence

import numpy as np

from .draft import Candidate
from .estimate import HitRates

#: Share of the time that the followers of a token came, by rank, before a text has shown its own:
#: what SmolLM2-135M did on the first 12 prompts of scripts/prompts.txt, 60 tokens each.
SHARES = (0.4, 0.07, 0.05, 0.05)

#: Followers that are kept for each token.
FOLLOWERS = len(SHARES)

#: A token whose followers are not known.
UNKNOWN = -1


class FollowerTable:
    """The most probable followers of each token where it was read last, [V, FOLLOWERS] ids.

    Texts that are generated together share one.
    """

    def __init__(self, vocabulary_size: int):
        self.followers = np.full((vocabulary_size, FOLLOWERS), UNKNOWN, np.int32)
        self._rates = HitRates(SHARES)

    def note(self, token: int, followers: np.ndarray) -> None:
        """Keep what a pass made of a token: ids that may follow, most probable first, [K]."""
        k = min(FOLLOWERS, len(followers))
        self.followers[token, :k] = followers[:k]

    def learn(self, guesses: list[int], token: int, alone: bool) -> None:
        """Take note of which of a token's followers came, alone or as the first of several."""
        for rank, guess in enumerate(guesses):
            if guess != UNKNOWN:
                self._rates.learn(rank, alone and guess == token)

    def candidates(self, token: int) -> list[Candidate]:
        """The followers of a token, with the share of the time that their rank was right."""
        left, found = 1.0, []
        for rank, follower in enumerate(self.followers[token].tolist()):
            if follower != UNKNOWN:
                chance = min(left, self._rates[rank])
                left -= chance
                found.append(Candidate(follower, chance, follower))
        return found


class TokenRecycling:
    """Guesses by the followers of a text's last token.

    Args:
        table: of what follows; filled by whoever computes rows.
        tokens: ids of the text so far, at least one.
    """

    def __init__(self, table: FollowerTable, tokens: Sequence[int]):
        self._table = table
        self._read(int(tokens[-1]))

    def _read(self, token: int) -> None:
        self._last = token
        # As they were before the token's own row replaces them.
        self._guesses = self._table.followers[token].tolist()

    def append(self, token: int, alone: bool = True) -> None:
        self._table.learn(self._guesses, token, alone)
        self._read(token)

    def begin(self) -> int:
        return self._last

    def candidates(self, place: int) -> list[Candidate]:
        return self._table.candidates(place)
