"""The picture of a search: the candidates of each token, and the one that was chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TempoError
from .figure import (
    GREY,
    INK,
    MARGIN,
    ORANGE,
    PALE,
    SKY,
    TITLE,
    blank,
    cut,
    draw_heading,
    finished,
)
from .labels import label, width
from .layout import Placed, page_width, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..search import SearchResult

#: Children drawn for each token, the most visited ones; and the height of one, in points.
SHOWN, ROW = 8, 26.0
#: Narrowest and widest column, and the room between two, in points.
NARROWEST, WIDEST, GAP = 46.0, 120.0, 14.0
SIZE = 9.0
#: Room for a value after the text.
VALUE = 24.0
NARROWEST_PAGE = 420.0
KEY = 34.0


class Candidate(NamedTuple):
    """A candidate: its text, its share of the visits, its value or ""."""

    text: str
    share: float
    value: str
    chosen: bool


@dataclass
class Column(Placed):
    """The candidates of one choice."""

    candidates: list[Candidate]

    @property
    def width(self) -> float:
        widest = max(SIZE * width(each.text, bold=True) for each in self.candidates)
        return min(WIDEST, max(NARROWEST, widest + VALUE))


def plot_search(result: "SearchResult", path: Path | None = None) -> "Figure":
    """Draw a search: a column for each token, its candidates by visits.

    Bars are as long as a candidate's share of the visits; the chosen ones are joined.

    Args:
        result: of :func:`tempo_mlx.search`, with at least one token.
        path: of a file to save it in, ending in .svg, .png or .pdf; None for none.

    Raises:
        ValueError: for another ending, or a search that chose nothing.
        ImportError: if Matplotlib is missing.
    """
    return finished(lambda: search_figure(result), path, "search")


def search_figure(result: "SearchResult") -> "Figure":
    """The figure that :func:`plot_search` saves, made inside :func:`~.figure.look`."""
    if not result.choices:
        raise TempoError("a search that chose no token has nothing to draw")
    columns = [Column(_candidates(choice)) for choice in result.choices]
    place(columns, gap=GAP)
    height = ROW * max(len(column.candidates) for column in columns)
    top = MARGIN + TITLE + 8
    page = page_width(columns, NARROWEST_PAGE)
    figure, axes = blank(page, top + height + KEY + MARGIN)
    settings = result.settings
    details = [
        f"{result.simulations} simulations",
        str(settings.selection),
        f"backup {settings.backup}",
        f"{result.forward_tokens} tokens through the model",
    ]
    draw_heading(axes, page, result.prompt, details)
    before = None
    for column in columns:
        for i, candidate in enumerate(column.candidates):
            y = top + ROW * i
            _draw(axes, column, candidate, y)
            if candidate.chosen:
                middle = y + 15.5
                if before is not None:
                    axes.plot([before[0], column.left], [before[1], middle], color=ORANGE, lw=1.5)
                after = column.right, middle
        before = after
    axes.text(
        MARGIN,
        top + height + 18,
        "bars: share of the visits; small numbers: values; in orange what was chosen",
        size=8,
        color=GREY,
    )
    return figure


def _draw(axes: Any, column: Column, candidate: Candidate, y: float) -> None:
    """A candidate's text and value, and its share of the visits as a bar."""
    left, right, bar = column.left, column.right, (y + 13, y + 18)
    axes.fill_between([left, right], *bar, color=PALE, linewidth=0)
    filled = left + column.width * candidate.share
    axes.fill_between([left, filled], *bar, color=ORANGE if candidate.chosen else SKY, linewidth=0)
    text = cut(candidate.text, (column.width - VALUE + 4) / SIZE, bold=candidate.chosen)
    axes.text(
        left,
        y + 10,
        text,
        size=SIZE,
        weight="bold" if candidate.chosen else "normal",
        color=INK if candidate.chosen else GREY,
        parse_math=False,
    )
    axes.text(right, y + 10, candidate.value, size=6, color=GREY, ha="right", parse_math=False)


def _candidates(choice: Any) -> list[Candidate]:
    """The candidates of a choice to draw: the most visited ones and the chosen one."""
    visits = sum(child["visits"] for child in choice.children) or 1
    found = [
        Candidate(
            label(child["text"], child["action"]),
            child["visits"] / visits,
            f"{child['value']:.2f}" if child["visits"] else "",
            child["action"] == choice.id,
        )
        for child in choice.children
    ]
    shown = found[:SHOWN]
    if any(candidate.chosen for candidate in shown):
        return shown
    return [*shown[:-1], *(candidate for candidate in found if candidate.chosen)]
