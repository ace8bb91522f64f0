"""Rich's console, through which no text commands the terminal."""

import errno
import os
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from ..text.printable import running


class Console(rich.console.Console):
    """A console on which control characters in texts are shown as symbols.

    Prompts, files, file names and the model's own output may hold any character. What rich itself
    sends to the terminal (colours, cursor movements of progress bars) stays as it is. Neither does
    a text command rich: brackets and colons are no markup here.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, **options})

    def on_broken_pipe(self) -> None:
        """Leave the end of the command to it, instead of ending the process here."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(running(segment.text), segment.style)
