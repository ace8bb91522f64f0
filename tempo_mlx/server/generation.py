"""One generation of a client: what the engine's thread tells of it, as the event loop hears it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..decode.request import Request
from ..decode.result import GenerationResult
from ..settings import Settings
from ..text.printable import unfinished
from ..text.vocabulary import Prompt, Vocabulary
from .engine import Engine


@dataclass(frozen=True)
class TokenScore:
    """A token and what the model says of it.

    Args:
        id, logprob: of the token; nats, None where nothing comes before it.
        top: the most probable tokens in its place, (id, log-probability), best first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def token_score(id: int, logprobs: np.ndarray, k: int) -> TokenScore:
    """The score of a token under log-probabilities [V], and the k best beside it."""
    best = np.argpartition(-logprobs, k)[:k] if 0 < k < len(logprobs) else np.arange(len(logprobs))
    best = best[np.argsort(-logprobs[best], kind="stable")][:k]
    return TokenScore(
        id, float(logprobs[id]), tuple((int(each), float(logprobs[each])) for each in best)
    )


@dataclass(frozen=True)
class StepEvent:
    """A step that was taken.

    Args:
        ids: of the set's tokens, most probable first; empty where the text ended.
        score: of the first token, if it was wanted.
        lattice: the step as the result's schema has it, if it was wanted.
    """

    ids: tuple[int, ...]
    score: TokenScore | None
    lattice: dict[str, Any] | None


class Generation:
    """Events of one generation: :class:`StepEvent`, and its result as the last one.

    Args:
        top: tokens whose log-probabilities are told beside each token's; None tells none.
        lattice: whether each event has its step.
    """

    def __init__(self, top: int | None = None, lattice: bool = False):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StepEvent | GenerationResult | Exception] = asyncio.Queue()
        self._top = top
        self._lattice = lattice

    def stepped(self, request: Request) -> None:
        """See :class:`.engine.Listener`."""
        step = request.lattice.steps[-1]
        ids = tuple(token.id for token in step.tokens)
        score = None
        if self._top is not None and ids and request.logprobs is not None:
            score = token_score(ids[0], request.logprobs[0], self._top)
        told = None
        if self._lattice:
            told = asdict(step) | {"tokens": [token.to_dict() for token in step.tokens]}
        self._tell(StepEvent(ids, score, told))

    def ended(self, outcome: GenerationResult | Exception) -> None:
        """See :class:`.engine.Listener`."""
        self._tell(outcome)

    def _tell(self, event: StepEvent | GenerationResult | Exception) -> None:
        # The event loop is closed once the server has ended; no one is listening.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[StepEvent | GenerationResult]:
        """The events as they come; the last one is the result.

        Raises:
            whatever the generation failed with.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, GenerationResult):
                return


@asynccontextmanager
async def running(
    engine: Engine,
    prompt: Prompt,
    settings: Settings,
    top: int | None = None,
    lattice: bool = False,
    paths: int = 0,
) -> AsyncIterator[Generation]:
    """A generation that is let go when the block is left, whether or not it has ended.

    Args:
        prompt, settings, paths: as in :func:`tempo_mlx.generate`.
        top, lattice: see :class:`Generation`.
    """
    generation = Generation(top, lattice)
    number = engine.generate(prompt, settings, generation, top is not None, paths)
    try:
        yield generation
    finally:
        engine.cancel(number)


class TextStream:
    """Text of tokens as they come: whole characters, and nothing that may become a stop text.

    Args:
        vocabulary: decodes.
        stops: texts that end the text.
    """

    #: tokens after which the text before them is not decoded again
    WINDOW = 32

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str]):
        self._vocabulary = vocabulary
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._decoded = ""
        self._said = 0
        self.ended = False

    def write(self, id: int) -> str:
        """What can be said after another token; nothing once a stop text was found."""
        if self.ended:
            return ""
        self._ids.append(id)
        tail = self._vocabulary.decode(self._ids)
        text = self._decoded + tail
        last = b"".join(self._vocabulary.bytes_of(each) for each in self._ids[-4:])
        if len(self._ids) >= self.WINDOW and not unfinished(last):
            self._decoded, self._ids = text, []
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            return self._say(text, min(found))
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return self._say(text, len(text) - held)

    def finish(self, whole: str) -> str:
        """The rest of the text, which is known whole now."""
        rest, self._said = whole[self._said :], len(whole)
        return rest

    def _say(self, text: str, end: int) -> str:
        said, self._said = text[self._said : end], max(self._said, end)
        return said
