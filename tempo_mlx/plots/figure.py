"""What every picture needs: Matplotlib if it is installed, one style, and files written whole."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, TempoError
from ..io.files import check_writable, write_atomically
from ..lattice.lattice import Lattice
from ..rules.pruning import Pruning
from .labels import fonts, readable, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..decode.result import GenerationResult

MISSING = "plots need Matplotlib: pip install 'tempo-mlx[plots]'"

#: Endings of file names, each a format.
FORMATS = (".svg", ".png", ".pdf")

POINTS_PER_INCH = 72
#: Around every picture, and of its title, in points.
MARGIN, TITLE = 18.0, 30.0
DPI = 200
#: Longest side of a PNG, in pixels; longer pictures get fewer dots per inch.
MAX_PIXELS = 20_000

#: The creator of a picture in its metadata; and for SVG, PNG and PDF the first bytes of a file, and
#: the bytes before and after the creator.
CREATOR = "tempo-mlx {}"
MARKS = (
    (b"<?xml", b"<dc:title>", b"</dc:title>"),
    (b"\x89PNG", b"tEXtCreator\0", b""),
    (b"%PDF", b"/Creator (", b")"),
)

# Each colour means one thing in all pictures. They are Okabe and Ito's, which the common kinds of
# colour blindness keep apart, and greys.
INK = "#1a1a1a"  # the text that was chosen
GREY = "#7a7a7a"  # axes, notes, and what was pruned
PALE = "#ededed"  # the ground
BLUE = "#0072b2"  # tokens, and what concerns their probabilities
SKY = "#56b4e9"  # the same, of tokens that were not chosen
ORANGE = "#e69f00"  # the path that was chosen
GREEN = "#009e73"  # attention
MINT = "#7fceb9"  # what may be attended to
PURPLE = "#a3447e"  # the end of a text

#: Colours of what is compared over many runs, conditions for example: Paul Tol's muted ones, none
#: of which a picture of one run uses.
COMPARED = ("#332288", "#cc6677", "#44aa99", "#999933", "#882255", "#88ccee")


def check_plot(path: Path, argument: str = "--plot") -> None:
    """Raise unless a picture can be drawn and saved at path.

    For long work: called before it starts, so that its result is not lost at the end.

    Raises:
        ValueError: naming the argument, its value, and what is allowed.
        ImportError: if Matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise TempoError(f"{argument} must end in {', '.join(FORMATS)}, got {str(path)!r}")
    check_writable(argument, path)
    _import()


def _import() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError(MISSING) from error
    return matplotlib


@contextmanager
def look() -> Iterator[None]:
    """Our style on top of Matplotlib's defaults, whatever the user's, while a picture is made."""
    matplotlib = _import()
    with matplotlib.rc_context(), _quiet("matplotlib.font_manager"):
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": list(fonts()),
                "font.size": 8,
                "text.color": INK,
                "axes.edgecolor": GREY,
                "axes.labelcolor": GREY,
                "xtick.color": GREY,
                "ytick.color": GREY,
                # Letters as wide as they were measured, whatever the resolution.
                "text.hinting": "none",
                # Text stays text, which can be searched and selected.
                "svg.fonttype": "none",
                "pdf.fonttype": 42,
                # The same run gives the same file.
                "svg.hashsalt": "tempo-mlx",
            }
        )
        yield


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger's warnings: here, that a font family without a bold face is drawn plain."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def blank(width: float, height: float) -> tuple["Figure", Any]:
    """A figure of width x height points, and axes that fill it; y grows downwards."""
    from .picture import Picture

    figure = Picture(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def save(figure: "Figure", path: Path, kind: str) -> None:
    """Write the figure in the format of the path's ending, whole or not at all.

    Args:
        figure: to be written.
        path: of the file.
        kind: what it shows, by which :func:`drawn` recognises it.
    """
    ending = path.suffix.lower().removeprefix(".")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    picture = BytesIO()
    figure.savefig(
        picture,
        format=ending,
        dpi=min(DPI, MAX_PIXELS / max(figure.get_size_inches())),
        metadata={**dates[ending], "Creator": CREATOR.format(kind)},
    )
    write_atomically(path, picture.getvalue())


def finished(draw: Callable[[], "Figure"], path: Path | None, kind: str) -> "Figure":
    """Draw a figure in our style, and save it if there is a path.

    Args:
        draw: makes the figure.
        path: of the file, checked before anything is drawn; None for none.
        kind: as in :func:`save`.
    """
    if path is not None:
        check_plot(path)
    with look():
        figure = draw()
        if path is not None:
            save(figure, path, kind)
    return figure


def drawn(picture: bytes, kinds: Sequence[str]) -> bool:
    """Whether :func:`save` wrote a file as a picture of one of these kinds."""
    creators = [CREATOR.format(kind).encode() for kind in kinds]
    return any(
        picture.startswith(start) and before + creator + after in picture
        for start, before, after in MARKS
        for creator in creators
    )


#: Characters of a prompt that are looked at; more than any picture is wide.
LONGEST_TITLE = 500

#: Settings that a title always names, and those that do not change what a picture shows.
SHOWN = ("rule", "threshold", "visibility")
UNSEEN = ("max_tokens", "prefill_step_size", "stop", "compact_above")


def draw_title(axes: Any, page_width: float, run: "GenerationResult | Lattice", note: str) -> None:
    """The prompt; below it the settings that differ from their defaults, and a note."""
    if isinstance(run, Lattice):
        title, details = f"{len(run.prompt_tokens)} prompt tokens, {len(run)} steps", []
    else:
        title, details = run.prompt, unusual(run.settings)
    draw_heading(axes, page_width, title, [*details, note] if note else details)


def draw_heading(axes: Any, page_width: float, title: str, details: Sequence[str]) -> None:
    """A title in bold letters and details below it, a line each, cut to the page."""
    room = page_width - 2 * MARGIN
    text: dict[str, Any] = {"parse_math": False}
    title = cut(readable(title[:LONGEST_TITLE]), room / 11, bold=True)
    axes.text(MARGIN, MARGIN + 8, title, size=11, weight="bold", **text)
    axes.text(MARGIN, MARGIN + 21, cut(", ".join(details), room / 8), size=8, color=GREY, **text)


def cut(text: str, room: float, bold: bool = False) -> str:
    """The text, or as much of it as the room holds, in multiples of the font size."""
    if width(text, bold) <= room:
        return text
    lengths = range(len(text) + 1)
    fitting = bisect_right(lengths, room, key=lambda length: width(text[:length] + "…", bold))
    return text[: max(0, fitting - 1)] + "…"


def unusual(settings: Any) -> list[str]:
    """What a title says of settings: the most important, and what differs from its default."""
    return _unusual(settings.to_dict(), type(settings)().to_dict())


def _unusual(values: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    shown = [name for name in SHOWN if name in values]
    shown += [
        name
        for name, value in values.items()
        if value != usual[name] and name not in (*SHOWN, *UNSEEN)
    ]
    return [f"{name.replace('_', ' ')} {_plain(values[name])}" for name in shown]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(_unusual(value, Pruning().to_dict()))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
