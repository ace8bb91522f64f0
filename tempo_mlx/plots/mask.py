"""A picture of who saw whom: the visibility of every slot to every other."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..lattice import Lattice
from ..result import GenerationResult
from ..visibility import VISIBILITY, may_attend
from .figure import BLUE, GREY, INK, ORANGE, PALE, POINTS_PER_INCH, check_plot, describe, look, save
from .labels import label, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Prompt tokens that are shown, the last ones.
PROMPT_TOKENS = 8

#: What the numbers of :func:`visibility_matrix` mean, and their colours.
MEANING = ("may not attend", "may attend", "pruned before")
COLOURS = (PALE, BLUE, ORANGE)

# Lengths are in points.
LARGEST_CELL = 12.0
LARGEST_MATRIX = 1000.0
SMALLEST_LABELLED = 5.0
MARGIN = 18.0
TITLE = 36.0
KEY = 24.0
NARROWEST = 300.0


def plot_mask(run: GenerationResult | Lattice, visibility: str, path: Path) -> None:
    """Draw which slot may attend to which and save it as SVG, PNG or PDF.

    Args:
        run: a result, or its lattice alone, which does not know the prompt's text.
        visibility: a key of :data:`tempo_mlx.visibility.VISIBILITY`.
        path: the file; its ending names the format.

    Raises:
        ValueError: for another visibility, a path that cannot be written or has another ending.
        ImportError: if Matplotlib is missing.
    """
    check_plot(path)
    with look():
        save(mask_figure(run, visibility), path)


def visibility_matrix(lattice: Lattice, visibility: str, shown: np.ndarray) -> np.ndarray:
    """[shown, shown], queries x keys, indices into :data:`MEANING`.

    Args:
        lattice: of the run.
        visibility: a key of :data:`tempo_mlx.visibility.VISIBILITY`.
        shown: indices of slots.
    """
    if visibility not in VISIBILITY:
        raise ValueError(f"visibility must be one of {', '.join(VISIBILITY)}, got {visibility!r}")
    slots = lattice.slots
    allowed = may_attend(visibility, slots[shown], slots)[:, shown]
    by_rule = VISIBILITY[visibility](slots[shown], slots)[:, shown]
    return np.where(allowed, 1, np.where(by_rule, 2, 0))


def mask_figure(run: GenerationResult | Lattice, visibility: str) -> "Figure":
    """The figure that :func:`plot_mask` saves, made inside :func:`~.figure.look`."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    lattice = run if isinstance(run, Lattice) else run.lattice
    left_out = max(0, len(lattice.prompt_tokens) - PROMPT_TOKENS)
    shown = np.arange(left_out, lattice.n_slots)
    matrix = visibility_matrix(lattice, visibility, shown)

    cell = min(LARGEST_CELL, LARGEST_MATRIX / len(shown))
    side = cell * len(shown)
    texts = labels(run, shown)
    size = 0.7 * cell
    room = 12 + (size * max(width(text) for text in texts) if cell >= SMALLEST_LABELLED else 16)
    wide = max(NARROWEST, 2 * MARGIN + room + 14 + side)
    high = 2 * MARGIN + TITLE + room + 14 + side + KEY
    figure = Figure(figsize=(wide / POINTS_PER_INCH, high / POINTS_PER_INCH))
    left, bottom = (MARGIN + room + 14) / wide, (MARGIN + KEY) / high
    axes = figure.add_axes((left, bottom, side / wide, side / high))
    axes.imshow(
        matrix, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest"
    )
    boundaries(axes, lattice.slots.step[shown])
    if cell >= SMALLEST_LABELLED:
        ticks = np.arange(len(shown))
    else:
        # Too small for texts: the numbers of the slots.
        ticks = np.arange(0, len(shown), max(1, len(shown) // 20))
        texts, size = [str(slot) for slot in shown], 7.0
    named = [texts[i] for i in ticks]
    style: dict[str, Any] = {"fontsize": size, "color": INK, "parse_math": False}
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks(ticks, named, rotation=90, **style)
    axes.set_yticks(ticks, named, **style)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("key: the token that is seen")
    axes.set_ylabel("query: the token that looks")

    prompt, settings = describe(run)
    note = f", {left_out} earlier prompt tokens left out" if left_out else ""
    figure.text(
        MARGIN / wide, 1 - (MARGIN + 8) / high, prompt, size=11, weight="bold", parse_math=False
    )
    figure.text(MARGIN / wide, 1 - (MARGIN + 21) / high, settings + note, size=8, color=GREY)
    key(figure, wide, high, sorted(set(matrix.flat)))
    return figure


def labels(run: GenerationResult | Lattice, shown: np.ndarray) -> list[str]:
    """The texts of the slots."""
    lattice = run if isinstance(run, Lattice) else run.lattice
    texts = {
        token.slot: label(token.text, token.id) for step in lattice.steps for token in step.tokens
    }
    for slot, id in enumerate(lattice.prompt_tokens):
        if slot in shown:
            text = "" if isinstance(run, Lattice) else run.vocabulary.text(id)
            texts[slot] = label(text, id)
    return [texts[slot] for slot in shown]
