"""Steps as text that can be printed as they come."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..text.printable import running, spelled, unfinished, visible
from .lattice import Step, Token


@dataclass(frozen=True)
class Span:
    """A piece of text and what it is.

    Args:
        text: without control characters.
        kind: "text", "mark" (brackets and strokes), "best", "other" (tokens of a set of several)
            or "ending".
        pruned: whether the token has been pruned.
    """

    text: str
    kind: str = "text"
    pruned: bool = False


class StepWriter:
    """Writes steps as spans: a set of one as running text, a larger one as ``[ on/ under]``.

    Running text comes in whole characters: a token that ends within one is held back until the
    next. A set ends running text; bytes that wait there, and those in the set, are shown as
    ``⟨e4 bb⟩``. Newlines and control characters inside a set are shown as symbols.
    """

    def __init__(self) -> None:
        self._held = b""

    def write(self, step: Step) -> Iterator[Span]:
        """The spans that a step adds."""
        if len(step.tokens) == 1 and not step.endings:
            yield from self._running(step.tokens[0])
            return
        yield from self.finish()
        if len(step.tokens) + len(step.endings) > 1:
            yield from self._set(step)
        else:
            yield from (Span(f"<end {e.probability:.2f}>", "ending") for e in step.endings)

    def finish(self) -> Iterator[Span]:
        """What waits for the rest of its character."""
        if self._held:
            yield Span(spelled(self._held))
        self._held = b""

    def _running(self, token: Token) -> Iterator[Span]:
        if token.pruned_at is not None:
            yield from self.finish()
            yield Span(visible(token.text), pruned=True)
            return
        raw = self._held + token.raw
        cut = len(raw) - unfinished(raw)
        self._held = raw[cut:]
        if cut:
            yield Span(running(spelled(raw[:cut])))

    def _set(self, step: Step) -> Iterator[Span]:
        spans = [
            Span(visible(token.text), "other" if rank else "best", token.pruned_at is not None)
            for rank, token in enumerate(step.tokens)
        ]
        spans += [Span(f"<end {e.probability:.2f}>", "ending") for e in step.endings]
        yield Span("[", "mark")
        for number, span in enumerate(spans):
            if number:
                yield Span("/", "mark")
            yield span
        yield Span("]", "mark")


def plain(spans: Iterable[Span]) -> str:
    """Spans as text without colours; pruned tokens are between tildes."""
    return "".join(f"~{span.text}~" if span.pruned else span.text for span in spans)
