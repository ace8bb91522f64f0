"""A picture of a lattice: one column for each position, the best path drawn through."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TempoError
from ..lattice.lattice import Lattice
from .figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MARGIN,
    ORANGE,
    PURPLE,
    blank,
    draw_title,
    finished,
)
from .labels import BEFORE_WORD, width
from .layout import (
    ARC_ROOM,
    GAP,
    HEADER,
    SMALLEST,
    Cell,
    Column,
    Page,
    arrange,
    best_tokens,
    font_size,
    prompt_columns,
    step_columns,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..decode.result import GenerationResult

#: Arcs of one step at most, the strongest.
ARCS = 3

#: Every column whose position is a multiple of this is numbered.
NUMBERED = 5

#: How each kind of text looks.
LOOKS: dict[str, dict[str, Any]] = {
    "prompt": {"color": GREY},
    "token": {"color": BLUE},
    "best": {"color": INK, "weight": "bold"},
    "pruned": {"color": GREY, "alpha": 0.85},
    "ending": {"color": PURPLE, "style": "italic"},
}
HIGHLIGHT: dict[str, Any] = {"color": ORANGE, "alpha": 0.45, "linewidth": 7, "zorder": 2}


def plot_lattice(
    run: "GenerationResult | Lattice",
    path: Path | None = None,
    *,
    best: Sequence[int] | None = None,
    attention: Mapping[int, np.ndarray] | None = None,
) -> "Figure":
    """Draw a lattice, and save it as SVG, PNG or PDF where a path is given.

    A token is the larger, the more probable it is; pruned ones are faded and struck through.

    Args:
        run: a result, or its lattice alone, which does not know the prompt's text.
        path: of the file, whose ending names the format; None for none.
        best: token ids of the path to draw through, one for each set that has live tokens.
        attention: step -> the attention that its rows paid to each slot, [n_slots]. Drawn as arcs
            to tokens of earlier sets of several, the strongest :data:`ARCS` of each step.

    Raises:
        TempoError: for a path that cannot be written or has another ending, a ``best`` that is not
            a path of this lattice, or attention of a step that it does not have.
        ImportError: if Matplotlib is missing.
    """
    return finished(lambda: lattice_figure(run, best, attention), path, "lattice")


def lattice_figure(
    run: "GenerationResult | Lattice",
    best: Sequence[int] | None = None,
    attention: Mapping[int, np.ndarray] | None = None,
) -> "Figure":
    """The figure that :func:`plot_lattice` draws, made inside :func:`~.figure.look`.

    Its artists have names: ``token-SLOT``, ``strike-SLOT``, ``best-path``, ``arc-STEP-SLOT``.
    """
    lattice = run if isinstance(run, Lattice) else run.lattice
    path = [] if best is None else best_tokens(lattice, best)
    columns = prompt_columns(run) + step_columns(lattice, path)
    arcs = [
        arc
        for step, paid in sorted((attention or {}).items())
        for arc in strongest(columns, step, paid)
    ]
    page = arrange(columns, arcs=bool(arcs))
    figure, axes = blank(page.width, page.height)
    draw_title(axes, page.width, run, "")
    heaviest = max((weight for *_, weight in arcs), default=1.0)
    for source, column, cell, weight in arcs:
        draw_arc(axes, page, source, column, cell, weight / heaviest)
    if path:
        draw_path(axes, page)
    for column in page.columns:
        draw_column(axes, column)
    draw_key(axes, page, bool(arcs))
    return figure


def strongest(
    columns: list[Column], step: int, paid: np.ndarray
) -> list[tuple[Column, Column, Cell, float]]:
    """A step's arcs: its column, the column and text that it goes to, and the attention."""
    paid = np.asarray(paid)
    source = next((c for c in columns if c.step is not None and c.step.step == step), None)
    if source is None or paid.ndim != 1:
        raise TempoError(f"attention[{step}] must be an array [n_slots] for a step of the lattice")
    found = [
        (source, column, cell, float(paid[cell.token.slot]))
        for column in columns
        if column.step is not None and column.step.step < step and len(column.step.tokens) > 1
        for cell in column.cells
        if cell.token is not None and cell.token.slot < len(paid) and paid[cell.token.slot] > 0
    ]
    return sorted(found, key=lambda arc: -arc[-1])[:ARCS]


def draw_column(axes: Any, column: Column) -> None:
    if column.position % NUMBERED == 0:
        number = {"size": 6.5, "color": GREY, "ha": "center"}
        axes.text(column.middle, column.top - 4, str(column.position), **number)
    for cell in column.cells:
        draw_cell(axes, cell)


def draw_cell(axes: Any, cell: Cell) -> None:
    name = f"token-{cell.token.slot}" if cell.token is not None else None
    style = {"size": cell.size, "ha": "center", "parse_math": False, "zorder": 3}
    axes.text(cell.x, cell.y, cell.text, gid=name, **style, **LOOKS[cell.kind])
    if cell.kind == "pruned":
        # Behind the letters, which stay readable.
        stroke = {"color": GREY, "alpha": 0.6, "linewidth": 0.6, "zorder": 2}
        name = f"strike-{cell.token.slot}" if cell.token is not None else None
        axes.plot([cell.left - 1, cell.right + 1], [cell.middle] * 2, gid=name, **stroke)


class Pen:
    """Collects the strokes of one path."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.codes: list[int] = []

    def _add(self, code: int, *points: tuple[float, float]) -> None:
        self.points.extend(points)
        self.codes.extend([code] * len(points))

    def move(self, x: float, y: float) -> None:
        self._add(1, (x, y))

    def line(self, x: float, y: float) -> None:
        self._add(2, (x, y))

    def curve(self, *points: tuple[float, float]) -> None:
        """A cubic: two control points and its end."""
        self._add(4, *points)

    def glide(self, x: float, y: float) -> None:
        """A curve that leaves and arrives level."""
        from_x, from_y = self.points[-1]
        half = (from_x + x) / 2
        self.curve((half, from_y), (half, y), (x, y))

    def draw(self, axes: Any, **style: Any) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Strokes

        strokes = Strokes(self.points, self.codes)
        axes.add_patch(PathPatch(strokes, fill=False, capstyle="round", joinstyle="round", **style))


def draw_path(axes: Any, page: Page) -> None:
    """A broad line behind the tokens of the best path: one straight stroke for each of them."""
    pen = Pen()
    row = None
    for column in page.columns:
        for cell in column.cells:
            if cell.kind != "best":
                continue
            if column.row != row:
                if row is not None:
                    pen.glide(pen.points[-1][0] + GAP / 2, pen.points[-1][1])
                pen.move(column.left - GAP / 2, cell.on_path)
                row = column.row
            pen.glide(column.left, cell.on_path)
            pen.line(column.right, cell.on_path)
    pen.draw(axes, gid="best-path", **HIGHLIGHT)


def draw_arc(
    axes: Any, page: Page, source: Column, column: Column, cell: Cell, weight: float
) -> None:
    """From the top of a step's column over the others, down next to a column, to one text of it.

    Args:
        axes, page: where to draw.
        source: the step's column.
        column, cell: where the arc goes.
        weight: of the heaviest arc, in (0, 1].
    """
    assert source.step is not None and cell.token is not None
    lane, foot = column.right + GAP / 2, column.top - HEADER
    pen = Pen()
    pen.move(source.middle, source.top - HEADER)
    if source.row == column.row:
        above = foot - rise(source.middle - lane)
        pen.curve((source.middle, above), (lane, above), (lane, foot))
    else:
        # Out on the left of one row, in on the right of the other.
        above = source.top - HEADER - rise(source.middle)
        pen.curve((source.middle, above), (source.middle / 2, above), (0, above))
        above = foot - rise(page.width - lane)
        pen.move(page.width, above)
        pen.curve(((page.width + lane) / 2, above), (lane, above), (lane, foot))
    pen.line(lane, cell.middle - 5)
    pen.curve((lane, cell.middle), (lane, cell.middle), (cell.right + 2, cell.middle))
    name = f"arc-{source.step.step}-{cell.token.slot}"
    pen.draw(axes, gid=name, edgecolor=GREEN, **arc_style(weight))


def arc_style(weight: float) -> dict[str, float]:
    return {"alpha": 0.2 + 0.5 * weight, "linewidth": 0.5 + 2.0 * weight, "zorder": 1}


def rise(distance: float) -> float:
    """How high the control points of an arc stand above its feet."""
    return min(ARC_ROOM / 0.75, 14 + 0.12 * abs(distance))


def draw_key(axes: Any, page: Page, arcs: bool) -> None:
    """One line that explains the marks that occur."""
    kinds = {cell.kind for column in page.columns for cell in column.cells}
    x, y = MARGIN, page.height - MARGIN

    def note(text: str, size: float = 7.5, **style: Any) -> None:
        nonlocal x
        axes.text(x, y, text, size=size, **{"color": GREY, **style})
        x += size * width(text) + 6

    note("probability")
    for probability in (0.05, 0.25, 1.0):
        note(f"{probability:g}", font_size(probability), **LOOKS["token"])
    x += GAP
    if any(cell.text.startswith(BEFORE_WORD) for column in page.columns for cell in column.cells):
        note(f"{BEFORE_WORD} space before it")
        x += GAP
    if "best" in kinds:
        axes.plot([x, x + 18], [y - 3] * 2, solid_capstyle="round", **HIGHLIGHT)
        x += 28
        note("best path")
        x += GAP
    if "pruned" in kinds:
        cell = Cell("pruned", 8, "pruned", x=x + 4 * width("pruned"), y=y)
        draw_cell(axes, cell)
        x = cell.right + 6
        note("later")
        x += GAP
    if "ending" in kinds:
        note("<end>", SMALLEST + 1, **LOOKS["ending"])
        note("possible")
        x += GAP
    if arcs:
        axes.plot([x, x + 18], [y - 3] * 2, color=GREEN, **arc_style(0.6))
        x += 26
        note("strongest attention")
