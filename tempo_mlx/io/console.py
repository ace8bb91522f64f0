"""Rich's console: control characters in texts stay visible, and tables are never cut."""

import copy
import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table

from ..text.printable import running

#: Width of what has no width of its own: a pipe or a file.
UNLIMITED = 100_000

#: A column whose cells may break anywhere (overflow="fold", such as paths) keeps this many
#: characters, if it has so many and sets no min_width; in stacked rows, so do the names of columns.
FOLDED = 20
NAMES = 10


class Console(rich.console.Console):
    """A console that shows control characters as symbols and prints tables whole.

    Prompts, files, file names and the model's own output may hold any character. What rich itself
    sends to the terminal (colours, cursor movements of progress bars) stays as it is. Brackets and
    colons in a text are no markup.

    A pipe or a file gets lines of any length. On a terminal, a table that is too wide breaks its
    headers and left-justified cells between words; right-justified cells (numbers) never break. If
    that is not enough, its rows are stacked: a line for each cell, behind the name of its column.
    So print a ``rich.table.Table`` with :meth:`print` and justify numbers to the right; nothing
    else is needed.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.is_terminal:
            options.setdefault("soft_wrap", True)
        whole = (WholeTable(each) if isinstance(each, Table) else each for each in objects)
        super().print(*whole, **options)

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


class WholeTable:
    """A table that fits the console's width without cutting a number or a word."""

    def __init__(self, table: Table):
        self._table = table

    def __rich_console__(
        self, console: rich.console.Console, options: ConsoleOptions
    ) -> RenderResult:
        width = options.max_width if console.is_terminal else UNLIMITED
        fitted = _fitted(self._table, width, console, options)
        if fitted is None:
            stack = _stacked(self._table, console, options)
            fitted = _fitted(stack, width, console, options) or stack
        yield from console.render(fitted, options.update_width(width))


def _fitted(
    table: Table, width: int, console: rich.console.Console, options: ConsoleOptions
) -> Table | None:
    """The table with widths for its columns, or None if the least widths do not fit."""
    unlimited = options.update_width(UNLIMITED)
    ranges = [_range(column, table.show_header, console, unlimited) for column in table.columns]
    widths = [least for least, _ in ranges]
    border = Measurement.get(console, unlimited, table).maximum - sum(most for _, most in ranges)
    spare = width - border - sum(widths)
    if spare < 0:
        return None
    # The narrowest column that wants more grows first, so that long texts do the breaking.
    while spare and (wanting := [i for i, (_, most) in enumerate(ranges) if widths[i] < most]):
        widths[min(wanting, key=widths.__getitem__)] += 1
        spare -= 1
    fitted = copy.copy(table)
    fitted.columns = [
        replace(column, width=width, no_wrap=False)
        for column, width in zip(table.columns, widths, strict=True)
    ]
    return fitted


def _range(
    column: Column, show_header: bool, console: rich.console.Console, options: ConsoleOptions
) -> tuple[int, int]:
    """The least width of a column that cuts nothing, and the width at which nothing breaks."""
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    headers = [Measurement.get(console, options, column.header)] if show_header else []
    most = max((one.maximum for one in cells + headers), default=1)
    if column.overflow == "fold":
        return min(column.min_width or FOLDED, most), most
    whole = column.justify == "right" or column.no_wrap
    least = [one.maximum if whole else one.minimum for one in cells]
    return max(least + [one.minimum for one in headers], default=1), most


def _stacked(table: Table, console: rich.console.Console, options: ConsoleOptions) -> Table:
    """The table with its cells below each other, a section for each row."""
    unlimited = options.update_width(UNLIMITED)
    widest = max(_range(column, False, console, unlimited)[0] for column in table.columns)
    stack = Table(
        title=table.title, title_justify=table.title_justify, box=table.box, show_header=False
    )
    stack.add_column(style="dim", overflow="fold", min_width=NAMES)
    stack.add_column(overflow="fold", min_width=widest)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            if str(cell):
                stack.add_row(column.header, cell)
        stack.add_section()
    return stack
