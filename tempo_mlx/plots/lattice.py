"""A picture of a lattice: one column for each position, the best path drawn through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..lattice import Lattice, Step, Token
from ..result import GenerationResult
from .figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    blank,
    check_plot,
    describe,
    look,
    save,
)
from .labels import label, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Prompt tokens that are shown, the last ones.
PROMPT_TOKENS = 6

#: Arcs of one step at most, the strongest.
ARCS = 3

# Lengths are in points.
PAGE_WIDTH = 900.0
NARROWEST_PAGE = 380.0
MARGIN = 18.0
GAP = 15.0  # between columns
ROW_GAP = 20.0
HEADER = 13.0  # the position above a column
TITLE = 34.0
KEY = 26.0
ARC_ROOM = 44.0
SMALLEST, LARGEST = 7.0, 15.0  # font sizes of probabilities 0 and 1
PROMPT_SIZE = 10.0
SMALL = 6.5
ASCENT, DESCENT = 0.95, 0.27  # of a line, in font sizes

#: How each kind of text looks.
LOOKS: dict[str, dict[str, Any]] = {
    "prompt": {"color": GREY},
    "token": {"color": BLUE},
    "best": {"color": INK, "weight": "bold"},
    "pruned": {"color": GREY, "alpha": 0.55},
    "ending": {"color": PURPLE, "style": "italic"},
}


@dataclass
class Cell:
    """One text of a column.

    Args:
        kind: a key of :data:`LOOKS`.
        token: None for prompt tokens and endings.
        x: its middle.
        y: its baseline.
    """

    text: str
    size: float
    kind: str
    token: Token | None = None
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return self.size * width(self.text, self.kind == "best")

    @property
    def middle(self) -> float:
        """Height of the middle of its small letters."""
        return self.y - 0.3 * self.size


@dataclass
class Column:
    """One position: its texts, the most probable on top.

    Args:
        row: row of the page.
        left: its left side.
        top: where its texts begin.
    """

    position: int
    cells: list[Cell]
    step: Step | None = None
    row: int = 0
    left: float = 0.0
    top: float = 0.0

    @property
    def width(self) -> float:
        return max(cell.width for cell in self.cells)

    @property
    def right(self) -> float:
        return self.left + self.width


@dataclass
class Page:
    """Columns in their places."""

    columns: list[Column]
    width: float
    height: float
    best: list[tuple[Column, Cell]] = field(default_factory=list)


def plot_lattice(
    run: GenerationResult | Lattice,
    path: Path,
    *,
    best: Sequence[int] | None = None,
    attention: Mapping[int, np.ndarray] | None = None,
) -> None:
    """Draw a lattice and save it as SVG, PNG or PDF.

    Tokens are as large as they are probable; pruned ones are faded and struck through.

    Args:
        run: a result, or its lattice alone, which does not know the prompt's text.
        path: the file; its ending names the format.
        best: token ids of the path to draw through, one for each set that has live tokens.
        attention: step -> the attention that its rows paid to each slot, [n_slots]. Drawn as arcs
            to tokens of earlier sets of several, the strongest :data:`ARCS` of each step.

    Raises:
        ValueError: for a path that cannot be written or has another ending, or a ``best`` that is
            no path of this lattice.
        ImportError: if Matplotlib is missing.
    """
    check_plot(path)
    with look():
        save(lattice_figure(run, best, attention), path)


def lattice_figure(
    run: GenerationResult | Lattice,
    best: Sequence[int] | None = None,
    attention: Mapping[int, np.ndarray] | None = None,
) -> "Figure":
    """The figure that :func:`plot_lattice` saves; call it inside :func:`~.figure.look`.

    Artists carry names: ``token-SLOT``, ``strike-SLOT``, ``best-path``, ``arc-STEP-SLOT``.
    """
    lattice = run if isinstance(run, Lattice) else run.lattice
    chosen = best_tokens(lattice, best) if best is not None else []
    page = arrange(prompt_columns(run) + step_columns(lattice, chosen), bool(attention))
    figure, axes = blank(page.width, page.height)
    draw_title(axes, page, *describe(run))
    for step, paid in sorted((attention or {}).items()):
        draw_arcs(axes, page, step, paid)
    if chosen:
        draw_path(axes, page)
    for column in page.columns:
        draw_column(axes, column)
    draw_key(axes, page, bool(attention))
    return figure


def best_tokens(lattice: Lattice, ids: Sequence[int]) -> list[Token]:
    """The tokens that a path of ids goes through.

    Raises:
        ValueError: if the ids are not one of each set with live tokens.
    """
    steps = [step for step in lattice.steps if step.live]
    if len(ids) != len(steps):
        raise ValueError(f"best has {len(ids)} tokens, the lattice has {len(steps)} sets")
    path: list[Token] = []
    for step, id in zip(steps, ids, strict=True):
        found = [token for token in step.live if token.id == id]
        if not found:
            raise ValueError(f"best has token {id}, which is not live in step {step.step}")
        # Where tokens have parents, one id may stand in a set more than once.
        path.append(next((t for t in found if path and t.parent == path[-1].slot), found[0]))
    return path


def prompt_columns(run: GenerationResult | Lattice) -> list[Column]:
    """The last tokens of the prompt, behind an ellipsis if there are more."""
    if isinstance(run, Lattice):
        ids, texts = run.prompt_tokens, [""] * len(run.prompt_tokens)
    else:
        ids = run.lattice.prompt_tokens
        texts = [run.vocabulary.text(id) for id in ids[-PROMPT_TOKENS:]]
    length = len(ids)
    labels = [label(t, id) for t, id in zip(texts[-PROMPT_TOKENS:], ids[-PROMPT_TOKENS:], strict=True)]
    first = length - len(labels)
    columns = [
        Column(first + i, [Cell(text, PROMPT_SIZE, "prompt")]) for i, text in enumerate(labels)
    ]
    if first:
        columns.insert(0, Column(first - 1, [Cell("…", PROMPT_SIZE, "prompt")]))
    return columns


def step_columns(lattice: Lattice, best: Sequence[Token]) -> list[Column]:
    """One column for each step, its tokens and endings by probability."""
    on_path = {token.slot for token in best}
    columns = []
    for step in lattice.steps:
        found: list[tuple[float, Cell]] = []
        for token in step.tokens:
            kind = "best" if token.slot in on_path else "token"
            if token.pruned_at is not None:
                kind = "pruned"
            cell = Cell(label(token.text, token.id), font_size(token.probability), kind, token)
            found.append((token.probability, cell))
        for ending in step.endings:
            size = font_size(ending.probability)
            found.append((ending.probability, Cell("<end>", size, "ending")))
        found.sort(key=lambda pair: -pair[0])
        if found:
            columns.append(Column(step.position, [cell for _, cell in found], step))
    return columns


def font_size(probability: float) -> float:
    """Rises with the root, so that the area that a text covers rises with its probability."""
    return SMALLEST + (LARGEST - SMALLEST) * float(probability) ** 0.5


def arrange(columns: list[Column], arcs: bool) -> Page:
    """Break the columns into rows of a page and put every text in its place."""
    left, row = MARGIN, 0
    for column in columns:
        if left > MARGIN and left + column.width > PAGE_WIDTH - MARGIN:
            left, row = MARGIN, row + 1
        column.left, column.row = left, row
        left = column.right + GAP
    top = MARGIN + TITLE
    for number in range(row + 1):
        members = [column for column in columns if column.row == number]
        top += HEADER + (ARC_ROOM if arcs else 0)
        # The first texts of a row stand on one line and read as one.
        line = top + ASCENT * max(column.cells[0].size for column in members)
        lowest = top
        for column in members:
            column.top, y = top, line
            for i, cell in enumerate(column.cells):
                y += ASCENT * cell.size if i else 0.0
                cell.x, cell.y = column.left + column.width / 2, y
                y += DESCENT * cell.size
            lowest = max(lowest, y)
        top = lowest + ROW_GAP
    width = max(NARROWEST_PAGE, max(column.right for column in columns) + MARGIN)
    best = [(column, cell) for column in columns for cell in column.cells if cell.kind == "best"]
    return Page(columns, width, top + KEY, best)


def draw_title(axes: Any, page: Page, title: str, subtitle: str) -> None:
    room = page.width - 2 * MARGIN
    for text, size, y, style in (
        (title, 11.0, MARGIN + 8, {"weight": "bold"}),
        (subtitle, 8.0, MARGIN + 21, {"color": GREY}),
    ):
        while width(text, "weight" in style) * size > room:
            text = text[:-2] + "…"
        axes.text(MARGIN, y, text, size=size, parse_math=False, **style)


def draw_column(axes: Any, column: Column) -> None:
    if column.position % 5 == 0:
        x = column.left + column.width / 2
        axes.text(x, column.top - 4, column.position, size=SMALL, color=GREY, ha="center")
    for cell in column.cells:
        draw_cell(axes, cell)


def draw_cell(axes: Any, cell: Cell) -> None:
    name = f"token-{cell.token.slot}" if cell.token is not None else None
    text = {"size": cell.size, "ha": "center", "parse_math": False, "zorder": 3}
    axes.text(cell.x, cell.y, cell.text, gid=name, **text, **LOOKS[cell.kind])
    if cell.kind == "pruned" and cell.token is not None:
        ends = [cell.x - cell.width / 2 - 1, cell.x + cell.width / 2 + 1]
        axes.plot(
            ends,
            [cell.middle] * 2,
            color=GREY,
            linewidth=0.8,
            zorder=4,
            gid=f"strike-{cell.token.slot}",
        )


class Pen:
    """Collects the strokes of one path."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.codes: list[int] = []

    def move(self, x: float, y: float) -> None:
        self.points.append((x, y))
        self.codes.append(1)

    def line(self, x: float, y: float) -> None:
        self.points.append((x, y))
        self.codes.append(2)

    def curve(self, *points: tuple[float, float]) -> None:
        """A cubic with two control points and an end."""
        self.points.extend(points)
        self.codes.extend([4] * 3)

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
    for column, cell in page.best:
        if column.row != row:
            if row is not None:
                pen.glide(pen.points[-1][0] + GAP / 2, pen.points[-1][1])
            pen.move(column.left - GAP / 2, cell.middle)
            row = column.row
        pen.glide(column.left, cell.middle)
        pen.line(column.right, cell.middle)
    pen.draw(axes, edgecolor=ORANGE, alpha=0.45, linewidth=7, zorder=2, gid="best-path")


def draw_arcs(axes: Any, page: Page, step: int, paid: np.ndarray) -> None:
    """Arcs from a step's column to the tokens of earlier sets that it attended to most."""
    paid = np.asarray(paid)
    source = next((c for c in page.columns if c.step is not None and c.step.step == step), None)
    if source is None or paid.ndim != 1:
        raise ValueError(f"attention of step {step} must be an array [n_slots] of a step with tokens")
    targets = [
        (float(paid[cell.token.slot]), column, cell)
        for column in page.columns
        if column.step is not None and column.step.step < step and len(column.step.tokens) > 1
        for cell in column.cells
        if cell.token is not None and cell.token.slot < len(paid) and paid[cell.token.slot] > 0
    ]
    for weight, column, cell in sorted(targets, key=lambda target: -target[0])[:ARCS]:
        draw_arc(axes, page, source, column, cell, weight)


def draw_arc(
    axes: Any, page: Page, source: Column, column: Column, cell: Cell, weight: float
) -> None:
    assert source.step is not None and cell.token is not None
    start = source.left + source.width / 2
    lane = column.right + GAP / 2
    pen = Pen()
    pen.move(start, source.top - HEADER)
    if source.row == column.row:
        height = rise(start - lane)
        above = column.top - HEADER - height
        pen.curve((start, above), (lane, above), (lane, column.top - HEADER))
    else:
        # Out on the left of one row, in on the right of the other.
        above = source.top - HEADER - rise(start)
        pen.curve((start, above), (start / 2, above), (0, above))
        above = column.top - HEADER - rise(page.width - lane)
        pen.move(page.width, above)
        pen.curve(((page.width + lane) / 2, above), (lane, above), (lane, column.top - HEADER))
    pen.line(lane, cell.middle - 5)
    edge = cell.x + cell.width / 2 + 2
    pen.curve((lane, cell.middle), (lane, cell.middle), (edge, cell.middle))
    pen.draw(
        axes,
        edgecolor=GREEN,
        alpha=0.15 + 0.6 * min(1.0, weight),
        linewidth=0.5 + 3.0 * min(1.0, weight),
        zorder=1,
        gid=f"arc-{source.step.step}-{cell.token.slot}",
    )


def rise(distance: float) -> float:
    """How high the control points of an arc stand above its feet."""
    return min(ARC_ROOM / 0.75, 14 + 0.12 * abs(distance))


def draw_key(axes: Any, page: Page, arcs: bool) -> None:
    """One line that says what the marks mean, those that occur."""
    cells = [cell for column in page.columns for cell in column.cells]
    kinds = {cell.kind for cell in cells}
    y = page.height - MARGIN
    x = MARGIN
