"""Where the columns of a lattice or a search stand on a page, by the widths of their texts.

Lengths are in points, y grows downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import TempoError
from ..lattice.lattice import Lattice, Step, Token
from .figure import MARGIN, TITLE
from .labels import aside, label, width

if TYPE_CHECKING:
    from ..decode.result import GenerationResult

#: Prompt tokens that are shown, the last ones.
PROMPT_TOKENS = 6

PAGE_WIDTH = 900.0
NARROWEST_PAGE = 580.0  # holds the key
GAP = 15.0  # between columns
ROW_GAP = 20.0
HEADER = 13.0  # the position above a column
KEY = 14.0
ARC_ROOM = 44.0

#: Font sizes of probabilities 0 and 1.
SMALLEST, LARGEST = 7.0, 17.0
PROMPT_SIZE = 10.0

# Of a line, in font sizes.
ASCENT, DESCENT = 0.95, 0.27
HALF_SMALL_LETTER = 0.28

#: Height of the line through the best path above the baseline.
PATH_HEIGHT = 3.5


@dataclass
class Cell:
    """One text of a column.

    Args:
        kind: "prompt", "token", "best", "pruned" or "ending".
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
        return self.size * width(self.text, bold=self.kind == "best")

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def middle(self) -> float:
        """Height of the middle of its small letters."""
        return self.y - HALF_SMALL_LETTER * self.size

    @property
    def on_path(self) -> float:
        """Where the best path runs: the same on one baseline, whatever the sizes on it."""
        return self.y - PATH_HEIGHT


@dataclass(kw_only=True)
class Placed:
    """A column that knows its width, and where :func:`place` has put it.

    Args:
        row: of the page.
        left: its left side.
    """

    row: int = 0
    left: float = 0.0

    @property
    def width(self) -> float:
        raise NotImplementedError

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


@dataclass
class Column(Placed):
    """One position: its texts, the most probable on top.

    Args:
        step: None for the prompt.
        top: where its texts begin.
    """

    position: int
    cells: list[Cell]
    step: Step | None = None
    top: float = 0.0

    @property
    def width(self) -> float:
        return max(cell.width for cell in self.cells)


@dataclass
class Page:
    """Columns in their places."""

    columns: list[Column]
    width: float
    height: float


def arrange(columns: list[Column], arcs: bool) -> Page:
    """Break the columns into rows of a page and put every text in its place.

    Args:
        columns: in order of position, at least one.
        arcs: leave room for arcs above each row.
    """
    place(columns, balanced(columns))
    top = MARGIN + TITLE
    for number in range(columns[-1].row + 1):
        top += HEADER + (ARC_ROOM if arcs else 0.0)
        top = stack([column for column in columns if column.row == number], top) + ROW_GAP
    return Page(columns, page_width(columns, NARROWEST_PAGE), top + KEY + MARGIN)


def page_width(columns: Sequence[Placed], narrowest: float) -> float:
    """Width of the page that holds the columns, at least the narrowest."""
    return max(narrowest, max(column.right for column in columns) + MARGIN)


def place(columns: Sequence[Placed], room: float = math.inf, gap: float = GAP) -> int:
    """Put the columns into rows no wider than ``room``, where they fit; returns the rows."""
    left, row = 0.0, 0
    for column in columns:
        if left and left + column.width > room:
            left, row = 0.0, row + 1
        column.left, column.row = MARGIN + left, row
        left += column.width + gap
    return row + 1


def balanced(columns: list[Column]) -> float:
    """The least room that takes no more rows than the page: no row is left nearly empty."""
    widest = PAGE_WIDTH - 2 * MARGIN
    rows = place(columns, widest)
    room = sum(column.width + GAP for column in columns) / rows - GAP
    while room < widest and place(columns, room) > rows:
        room += GAP
    return min(room, widest)


def stack(columns: list[Column], top: float) -> float:
    """Hang the texts of a row's columns below ``top``; returns where the lowest ends.

    The first texts stand on one line, so that they read as one.
    """
    line = top + ASCENT * max(column.cells[0].size for column in columns)
    lowest = line
    for column in columns:
        column.top, y = top, line
        for rank, cell in enumerate(column.cells):
            if rank:
                y += ASCENT * cell.size
            cell.x, cell.y = column.middle, y
            y += DESCENT * cell.size
        lowest = max(lowest, y)
    return lowest


def prompt_columns(run: "GenerationResult | Lattice") -> list[Column]:
    """The last tokens of the prompt, after an ellipsis if there are more."""
    ids = (run if isinstance(run, Lattice) else run.lattice).prompt_tokens
    first = max(0, len(ids) - PROMPT_TOKENS)
    texts = [
        f"#{id}" if isinstance(run, Lattice) else run.vocabulary.text(id) for id in ids[first:]
    ]
    columns = [
        Column(first + i, [Cell(label(text, id), PROMPT_SIZE, "prompt")])
        for i, (text, id) in enumerate(zip(texts, ids[first:], strict=True))
    ]
    if first:
        columns.insert(0, Column(first - 1, [Cell("…", PROMPT_SIZE, "prompt")]))
    return columns


def step_columns(lattice: Lattice, best: Sequence[Token]) -> list[Column]:
    """One column for each step, its tokens and endings by probability.

    Args:
        lattice: of the run.
        best: the tokens of the path to point out.
    """
    on_path = {token.slot for token in best}
    columns = []
    for step in lattice.steps:
        found: list[tuple[float, Cell]] = []
        for token in step.tokens:
            kind = "best" if token.slot in on_path else "token"
            text = label(token.text, token.id)
            if token.pruned_at is not None:
                kind, text = "pruned", aside(text)
            cell = Cell(text, font_size(token.probability), kind, token)
            found.append((token.probability, cell))
        for ending in step.endings:
            size = font_size(ending.probability)
            found.append((ending.probability, Cell("<end>", size, "ending")))
        found.sort(key=lambda pair: -pair[0])
        columns.append(Column(step.position, [cell for _, cell in found], step))
    return columns


def font_size(probability: float) -> float:
    """Font size of a probability: between proportional height and proportional area, so that
    small ones stay legible and large ones stand out."""
    return SMALLEST + (LARGEST - SMALLEST) * float(probability) ** 0.7


def best_tokens(lattice: Lattice, ids: Sequence[int]) -> list[Token]:
    """The tokens that a path of ids goes through.

    Raises:
        ValueError: if the ids are not one of each set with live tokens.
    """
    steps = [step for step in lattice.steps if step.live]
    if len(ids) != len(steps):
        raise TempoError(f"best has {len(ids)} tokens, the lattice has {len(steps)} sets")
    path: list[Token] = []
    for step, id in zip(steps, ids, strict=True):
        found = [token for token in step.live if token.id == id]
        if not found:
            raise TempoError(f"best has token {id}, which is not live in step {step.step}")
        # Where tokens have parents, one id may stand in a set more than once.
        path.append(next((t for t in found if path and t.parent == path[-1].slot), found[0]))
    return path
