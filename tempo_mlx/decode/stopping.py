"""Stop texts: where a text ends, and when a run has reached one.

The text that a run returns is judged, whatever the visibility. Where each token has a parent, or
every set has one token, the run knows that text at each step. In merged visibilities the best path
is found by another search (:mod:`.paths`); it is kept and extended step by step, and it
starts only once some path of the lattice contains a stop text at all.
"""

from collections.abc import Callable, Sequence

from ..lattice.lattice import Step
from ..models import PositionedModel, SlotStore
from .paths import PathSearch
from .result import BEAM, GenerationResult

#: A search that has to start again, because earlier sets were pruned, waits until the run is
#: longer by this factor: all searches together then cost a multiple of the last one.
GROWTH = 1.25


class StopAutomaton:
    """Whether some path through the sets so far contains a stop text (Knuth-Morris-Pratt).

    Args:
        stops: at least one.
        bytes_of: UTF-8 of a token.
    """

    def __init__(self, stops: Sequence[str], bytes_of: Callable[[int], bytes]):
        self._bytes_of = bytes_of
        self._stops = [stop.encode() for stop in stops]
        self._borders = [_borders(stop) for stop in self._stops]
        # Of each stop, how many of its bytes the paths so far end with.
        self._matched: list[set[int]] = [{0} for _ in stops]
        #: whether a path contains one; never becomes False again
        self.possible = False

    def add(self, step: Step) -> None:
        """Take the next step: each path goes on with each of its tokens."""
        if self.possible or not step.tokens:
            return
        for number, before in enumerate(self._matched):
            self._matched[number] = {
                self._advance(number, matched, self._bytes_of(token.id))
                for token in step.tokens
                for matched in before
            }

    def _advance(self, number: int, matched: int, raw: bytes) -> int:
        stop, borders = self._stops[number], self._borders[number]
        for byte in raw:
            while matched and stop[matched] != byte:
                matched = borders[matched - 1]
            matched += stop[matched] == byte
            if matched == len(stop):
                self.possible = True
                return 0
        return matched


def _borders(stop: bytes) -> list[int]:
    """Of each prefix, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0], 0
    for byte in stop[1:]:
        while length and stop[length] != byte:
            length = borders[length - 1]
        length += stop[length] == byte
        borders.append(length)
    return borders


class StopWatch:
    """Whether the text of a run has come to a stop text.

    Args:
        result: of the run, whose lattice grows; its settings have stop texts.
    """

    def __init__(self, result: GenerationResult):
        self._result = result
        #: makes a cache that has read the prompt but its last token; None to read it
        self.prompt_slots: Callable[[], SlotStore | None] | None = None
        self._automaton = StopAutomaton(result.settings.stop, result.vocabulary.bytes_of)
        self._search: PathSearch | None = None
        self._sets: list[list[int]] = []
        self._due = 0

    def reached(self) -> bool:
        """Take the step that was recorded last; whether the run's text contains a stop text now."""
        result = self._result
        self._automaton.add(result.lattice.steps[-1])
        ids = result.known_best()
        if ids is None:
            ids = self._best() if self._automaton.possible else []
        return result.stops(ids)

    def _best(self) -> list[int]:
        """Ids of the best path through the sets; none where finding it would cost too much now."""
        result = self._result
        sets = [[token.id for token in tokens] for tokens in result.lattice.sets]
        if self._search is None or sets[: len(self._sets)] != self._sets:
            if len(sets) < self._due:
                return []
            self._due = int(GROWTH * len(sets)) + 1
            assert isinstance(result.model, PositionedModel)
            cache = self.prompt_slots() if self.prompt_slots is not None else None
            prompt = result.lattice.prompt_tokens
            self._search = PathSearch(result.model, [prompt], BEAM, cache)
        self._sets = sets
        return self._search.extend([sets])[0][0][0]
