"""Rich's console, with control characters shown as symbols and tables never cut."""

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

#: Width for pipes and files, which have none.
UNLIMITED = 100_000

#: Default min_width of columns whose cells may break anywhere (overflow="fold", such as paths), and
#: of the column names in stacked rows.
FOLDED = 20
NAMES = 10


class Console(rich.console.Console):
    """A console that shows control characters as symbols and never cuts tables.

    Prompts, files, file names and the model's output may contain any character. Rich's own control
    codes (colours, cursor movements of progress bars) are kept. Brackets and colons are not treated
    as markup.

    Lines in pipes and files may have any length. On a terminal, a table that is too wide breaks its
    headers and left-justified cells between words; right-justified cells (numbers) never break. If
    that is not enough, its rows are stacked, with one line for each column name and cell. All that
    callers need to do is print a ``rich.table.Table`` and justify numbers to the right.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        if not self.is_terminal:
            options.setdefault("soft_wrap", True)
        whole = (WholeTable(each) if isinstance(each, Table) else each for each in objects)
        super().print(*whole, **options)

    def on_broken_pipe(self) -> None:
        """Raise, so the command can end cleanly, instead of exiting the process here."""
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
    """A table fitted to the console's width without cutting numbers or words."""

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
    """The table with column widths set, or None if even the least widths do not fit."""
    unlimited = options.update_width(UNLIMITED)
    ranges = [_range(column, table.show_header, console, unlimited) for column in table.columns]
    widths = [least for least, _ in ranges]
    border = Measurement.get(console, unlimited, table).maximum - sum(most for _, most in ranges)
    spare = width - border - sum(widths)
    if spare < 0:
        return None
    # The narrowest column grows first, so long texts break before short ones.
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
    """The least width at which a column is not cut, and the width at which it does not break."""
    cells = [Measurement.get(console, options, cell) for cell in column.cells]
    headers = [Measurement.get(console, options, column.header)] if show_header else []
    most = max((one.maximum for one in cells + headers), default=1)
    if column.overflow == "fold":
        return min(column.min_width or FOLDED, most), most
    whole = column.justify == "right" or column.no_wrap
    least = [one.maximum if whole else one.minimum for one in cells]
    return max(least + [one.minimum for one in headers], default=1), most


def _stacked(table: Table, console: rich.console.Console, options: ConsoleOptions) -> Table:
    """The table with cells below each other, in one section for each row."""
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
