"""The picture of a search: what was weighed for each token, and what was chosen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TempoError
from ..search import SearchResult
from .figure import BLUE, GREY, INK, MARGIN, PALE, SKY, TITLE, blank, check_plot, cut, look, save
from .labels import label, readable, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Children drawn for each token, the most visited ones; and the height of one, in points.
SHOWN, ROW = 8, 26.0
#: Narrowest and widest column, and the room between two, in points.
NARROWEST, WIDEST, GAP = 46.0, 120.0, 14.0
SIZE = 9.0
#: Room for a value behind the text.
VALUE = 24.0
NARROWEST_PAGE = 420.0
KEY = 34.0


def plot_search(result: SearchResult, path: Path) -> None:
    """Draw a search into a file: a column for each token, its candidates by visits.

    Bars are as long as a candidate's share of the visits; the chosen ones are joined.

    Args:
        result: of :func:`tempo_mlx.search`, with at least one token.
        path: ending in .svg, .png or .pdf.

    Raises:
        ValueError: for another ending, or a search that chose nothing.
        ImportError: if Matplotlib is missing.
    """
    check_plot(path)
    with look():
        save(search_figure(result), path, "search")


def search_figure(result: SearchResult) -> "Figure":
    """The figure that :func:`plot_search` saves, made inside :func:`~.figure.look`."""
    if not result.choices:
        raise TempoError("a search that chose no token has nothing to draw")
    columns = [_column(choice) for choice in result.choices]
    widths = [
        min(WIDEST, max(NARROWEST, *(SIZE * width(text, bold=True) + VALUE for text, *_ in rows)))
        for rows in columns
    ]
    height = ROW * max(len(rows) for rows in columns)
    top = MARGIN + TITLE + 8
    page = max(NARROWEST_PAGE, 2 * MARGIN + sum(widths) + GAP * (len(widths) - 1))
    figure, axes = blank(page, top + height + KEY + MARGIN)
    plain: dict[str, Any] = {"parse_math": False}
    axes.text(
        MARGIN,
        MARGIN + 8,
        cut(readable(result.prompt[:500]), (page - 2 * MARGIN) / 11, bold=True),
        size=11,
        weight="bold",
        **plain,
    )
    settings = result.settings
    details = (
        f"{result.simulations} simulations, {settings.selection}, backup {settings.backup}, "
        f"{result.forward_tokens} tokens through the model"
    )
    axes.text(MARGIN, MARGIN + 21, details, size=8, color=GREY, **plain)
    left, before = MARGIN, None
    for rows, wide in zip(columns, widths, strict=True):
        for i, (text, share, value, chosen) in enumerate(rows):
            y = top + ROW * i
            axes.fill_between([left, left + wide], y + 13, y + 18, color=PALE, linewidth=0)
            colour = BLUE if chosen else SKY
            axes.fill_between([left, left + wide * share], y + 13, y + 18, color=colour, lw=0)
            weight = "bold" if chosen else "normal"
            shown = cut(text, (wide - VALUE + 4) / SIZE, bold=chosen)
            colour = INK if chosen else GREY
            axes.text(left, y + 10, shown, size=SIZE, weight=weight, color=colour, **plain)
            axes.text(left + wide, y + 10, value, size=6, color=GREY, ha="right", **plain)
            if chosen:
                middle = y + 15.5
                if before is not None:
                    axes.plot([before[0], left], [before[1], middle], color=BLUE, lw=1)
                after = left + wide, middle
        before = after
        left += wide + GAP
    axes.text(
        MARGIN,
        top + height + 18,
        "bars: share of the visits; small numbers: values; in blue what was chosen",
        size=8,
        color=GREY,
    )
    return figure


def _column(choice: Any) -> list[tuple[str, float, str, bool]]:
    """Texts, shares of the visits, values of a choice's candidates, and which was chosen."""
    visits = sum(child["visits"] for child in choice.children) or 1
    rows = [
        (
            label(child["text"], child["action"]),
            child["visits"] / visits,
            f"{child['value']:.2f}" if child["visits"] else "",
            child["action"] == choice.id,
        )
        for child in choice.children
    ]
    shown = rows[:SHOWN]
    return shown if any(row[3] for row in shown) else [*shown[:-1], *(r for r in rows if r[3])]
