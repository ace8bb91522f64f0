"""Where each text of a lattice's picture stands. Lengths are in points, y grows downwards."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..lattice import Lattice, Step, Token
from ..result import GenerationResult
from .labels import label, width

#: Prompt tokens that are shown, the last ones.
PROMPT_TOKENS = 6

PAGE_WIDTH = 900.0
NARROWEST_PAGE = 400.0
MARGIN = 18.0
GAP = 15.0  # between columns
ROW_GAP = 20.0
TITLE = 30.0
HEADER = 13.0  # the position above a column
KEY = 14.0
ARC_ROOM = 44.0

#: Font sizes of probabilities 0 and 1.
SMALLEST, LARGEST = 7.0, 15.0
PROMPT_SIZE = 10.0

# Of a line, in font sizes.
ASCENT, DESCENT = 0.95, 0.27
HALF_SMALL_LETTER = 0.28


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


@dataclass
class Column:
    """One position: its texts, the most probable on top.

    Args:
        step: None for the prompt.
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

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


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
    left, row = MARGIN, 0
    for column in columns:
        if left > MARGIN and left + column.width > PAGE_WIDTH - MARGIN:
            left, row = MARGIN, row + 1
        column.left, column.row = left, row
        left = column.right + GAP
    top = MARGIN + TITLE
    for number in range(row + 1):
        top += HEADER + (ARC_ROOM if arcs else 0.0)
        top = stack([column for column in columns if column.row == number], top) + ROW_GAP
    wide = max(NARROWEST_PAGE, max(column.right for column in columns) + MARGIN)
    return Page(columns, wide, top + KEY + MARGIN)


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


def prompt_columns(run: GenerationResult | Lattice) -> list[Column]:
    """The last tokens of the prompt, behind an ellipsis if there are more."""
    ids = (run if isinstance(run, Lattice) else run.lattice).prompt_tokens
    first = max(0, len(ids) - PROMPT_TOKENS)
    texts = [f"#{id}" if isinstance(run, Lattice) else run.vocabulary.text(id) for id in ids[first:]]
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
            if token.pruned_at is not None:
                kind = "pruned"
            cell = Cell(label(token.text, token.id), font_size(token.probability), kind, token)
            found.append((token.probability, cell))
        for ending in step.endings:
            size = font_size(ending.probability)
            found.append((ending.probability, Cell("<end>", size, "ending")))
        found.sort(key=lambda pair: -pair[0])
        columns.append(Column(step.position, [cell for _, cell in found], step))
    return columns


def font_size(probability: float) -> float:
    """Rises with the root, so that the area that a text covers follows its probability."""
    return SMALLEST + (LARGEST - SMALLEST) * float(probability) ** 0.5


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
