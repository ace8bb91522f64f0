"""The report of a suite: one HTML file that needs no other, and Markdown with pictures beside."""

from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..io.files import write_atomically
from ..text.printable import running
from .analysis import Analysis
from .pictures import plot_experiment
from .report_text import sections

HTML, MARKDOWN = "report.html", "report.md"
PLOTS = "plots"

#: Last line of both files, a comment in either language, by which a report is recognised.
MARK = "<!-- tempo-mlx experiment report -->\n"


def write_report(analysis: Analysis, folder: Path, measure: str = "token") -> list[Path]:
    """Draw the pictures and write both files.

    Args:
        analysis: what was found.
        folder: of the suite's run.
        measure: that the pictures show.

    Returns:
        The HTML and the Markdown file.

    Raises:
        ValueError: for an unknown measure.
    """
    drawn = {path.stem: path for path in plot_experiment(analysis, folder / PLOTS, measure)}
    title = str(analysis.info["suite"].get("name") or "Experiment")
    described = sections(analysis)
    written = []
    for name, autoescape, pictures in (
        (HTML, True, {stem: _inline(path) for stem, path in drawn.items()}),
        (MARKDOWN, False, {stem: f"{PLOTS}/{path.name}" for stem, path in drawn.items()}),
    ):
        template = environment(autoescape).get_template(f"{name}.j2")
        text = template.render(title=title, sections=described, pictures=pictures)
        path = folder / name
        write_atomically(path, f"{text.rstrip()}\n\n{MARK}")
        written.append(path)
    return written


def environment(autoescape: bool) -> Environment:
    """Where the templates are; a name that they misspell is an error.

    Control characters of texts are shown as symbols, so that none reorders what stands beside it.
    """
    found = Environment(
        loader=PackageLoader("tempo_mlx.experiments"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: running(value) if type(value) is str else value,
    )
    found.filters["cell"] = markdown_cell
    return found


def markdown_cell(value: Any) -> str:
    """A text as Markdown shows it, in one line of a table: nothing in it is markup."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|#~$":
        text = text.replace(sign, f"\\{sign}")
    return text


def _inline(path: Path) -> str:
    """The picture as an address that holds it.

    Not as SVG elements: the names in several pictures of one page would collide.
    """
    return f"data:image/svg+xml;base64,{b64encode(path.read_bytes()).decode('ascii')}"
