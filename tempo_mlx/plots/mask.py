"""A picture of who saw whom: the visibility of every slot to every other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..lattice.lattice import Lattice, Slots
from ..rules.visibility import Visibility, may_attend
from .figure import (
    GREY,
    INK,
    MARGIN,
    MINT,
    PALE,
    TITLE,
    blank,
    draw_title,
    finished,
)
from .labels import aside, label, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..decode.result import GenerationResult

#: Prompt tokens that are shown, the last ones.
PROMPT_TOKENS = 8

#: Meaning and colour of each number in :func:`visibility_matrix`.
MEANINGS = (("not visible", PALE), ("visible", MINT), ("pruned", GREY))

# Lengths are in points.
LARGEST_CELL = 12.0
LARGEST_MATRIX = 1000.0
SMALLEST_LABELLED = 5.0
AXIS = 18.0  # room for the name of an axis
KEY = 22.0
NARROWEST_PAGE = 440.0

#: Where cells are too small for texts, about as many slots are numbered instead.
NUMBERS = 20
NUMBER_SIZE = 6.5


def plot_mask(
    run: "GenerationResult | Lattice", visibility: Visibility | str, path: Path | None = None
) -> "Figure":
    """Draw which slot saw which, and save it as SVG, PNG or PDF where a path is given.

    Args:
        run: a result, or its lattice alone, which does not know the prompt's text.
        visibility: a rule, or its name in :data:`tempo_mlx.rules.visibility.VISIBILITY`.
        path: of the file, whose ending names the format; None for none.

    Raises:
        ValueError: for another visibility, a path that cannot be written or has another ending.
        ImportError: if Matplotlib is missing.
    """
    return finished(lambda: mask_figure(run, visibility), path, "mask")


def visibility_matrix(
    lattice: Lattice, visibility: Visibility | str, shown: np.ndarray, repairs: bool = False
) -> np.ndarray:
    """Whether each query of ``shown`` may attend to each key of ``shown``: indices of MEANINGS.

    Args:
        lattice: of the run.
        visibility: a rule, or its name in :data:`tempo_mlx.rules.visibility.VISIBILITY`.
        shown: numbers of slots, [n].
        repairs: whether what saw a pruned token was run again.

    Returns:
        integers [n, n], queries x keys.
    """
    slots = lattice.slots
    by_rule = may_attend(visibility, slots[shown], slots)[:, shown]
    unseen_from = np.full(len(slots), np.inf)
    for step in lattice.steps:
        for token in step.tokens:
            if token.pruned_at is not None:
                unseen_from[token.slot] = 0 if repairs else token.pruned_at + 1
    lives = slots.step[shown, None] < unseen_from[shown]
    return np.where(by_rule, np.where(lives, 1, 2), 0)


def mask_figure(run: "GenerationResult | Lattice", visibility: Visibility | str) -> "Figure":
    """The figure that :func:`plot_mask` saves, made inside :func:`~.figure.look`."""
    from matplotlib.colors import ListedColormap

    lattice = run if isinstance(run, Lattice) else run.lattice
    left_out = max(0, len(lattice.prompt_tokens) - PROMPT_TOKENS)
    shown = np.arange(left_out, lattice.n_slots)
    repairs = not isinstance(run, Lattice) and run.settings.repairs
    matrix = visibility_matrix(lattice, visibility, shown, repairs)

    cell = min(LARGEST_CELL, LARGEST_MATRIX / len(shown))
    side = cell * len(shown)
    texts = slot_labels(run, left_out)
    size, labelled, unit = 0.75 * cell, range(len(shown)), ""
    if cell < SMALLEST_LABELLED:
        size, texts, unit = NUMBER_SIZE, [str(slot) for slot in shown], ", numbers of slots"
        every = 50 * -(-len(shown) // (50 * NUMBERS))
        labelled = range(-left_out % every, len(shown), every)
    room = size * max(width(text) for text in texts) + 4

    left, top = MARGIN + AXIS + room, MARGIN + TITLE + AXIS + room
    page = max(NARROWEST_PAGE, left + side + MARGIN)
    figure, axes = blank(page, top + side + KEY + MARGIN)
    note = f"the first {left_out} prompt tokens are left out" if left_out else ""
    draw_title(axes, page, run, note)
    colours = [colour for _, colour in MEANINGS]
    axes.imshow(
        matrix,
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=len(colours) - 1,
        extent=(left, left + side, top + side, top),
        aspect="auto",
        interpolation="nearest",
    )
    draw_lines(axes, left, top, cell, lattice.slots[shown])
    for i in labelled:
        # On a baseline, so that a comma looks like one.
        baseline = (i + 0.5) * cell + 0.28 * size
        name = {"size": size, "parse_math": False}
        axes.text(left - 3, top + baseline, texts[i], ha="right", **name)
        turned = {"rotation": 90, "rotation_mode": "anchor"}
        axes.text(left + baseline, top - 3, texts[i], **turned, **name)
    axis = {"color": GREY, "size": 8}
    axes.text(left, MARGIN + TITLE + 8, f"seen: the keys{unit}", **axis)
    axes.text(
        MARGIN + 6, top, f"looking: the queries{unit}", rotation=90, va="top", ha="center", **axis
    )
    draw_key(axes, MARGIN, top + side + KEY, sorted(set(matrix.flat)))
    return figure


def slot_labels(run: "GenerationResult | Lattice", first: int) -> list[str]:
    """The texts of the slots from ``first`` on."""
    lattice = run if isinstance(run, Lattice) else run.lattice
    texts = []
    for id in lattice.prompt_tokens[first:]:
        text = "" if isinstance(run, Lattice) else run.vocabulary.text(id)
        texts.append(aside(label(text, id)))
    for step in lattice.steps:
        texts.extend(aside(label(token.text, token.id)) for token in step.tokens)
    # The last set has no slots where nothing was computed from it.
    return texts[: lattice.n_slots - first]


def draw_lines(axes: Any, left: float, top: float, cell: float, slots: Slots) -> None:
    """Pale lines between slots, dark ones around sets of several tokens and after the prompt."""
    side, thickness = cell * len(slots), min(0.5, 0.07 * cell)
    for i in range(1, len(slots)):
        before, after = slots.step[i - 1], slots.step[i]
        several = max(slots.set_size[i - 1], slots.set_size[i]) > 1
        dark = before != after and (several or before < 0 <= after)
        if not dark and cell < SMALLEST_LABELLED:
            continue
        style = {
            "color": INK if dark else "white",
            "linewidth": thickness,
            "zorder": 3 if dark else 2,
        }
        axes.plot([left, left + side], [top + i * cell] * 2, **style)
        axes.plot([left + i * cell] * 2, [top, top + side], **style)


def draw_key(axes: Any, x: float, y: float, meanings: list[int]) -> None:
    from matplotlib.patches import Rectangle

    for meaning in meanings:
        text, colour = MEANINGS[meaning]
        axes.add_patch(Rectangle((x, y - 7), 9, 9, facecolor=colour, edgecolor=GREY, linewidth=0.4))
        axes.text(x + 13, y, text, size=8, color=GREY)
        x += 13 + 8 * width(text) + 16
