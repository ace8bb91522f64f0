"""The report of a suite: Markdown with pictures beside it, and one HTML file that holds them.

The words are in ``templates/report.md.j2``; the HTML is that Markdown, rendered.
"""

import re
from base64 import b64encode
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from pandas import DataFrame

from ..io.files import write_atomically
from ..text.printable import running
from .analysis import Analysis
from .numbers import interval, number, with_holm
from .pictures import plot_experiment
from .summary import each

HTML, MARKDOWN = "report.html", "report.md"
PLOTS = "plots"

#: The line below a table's head, what separates cells, and what a cell of numbers holds: one with
#: its sign or unit, one with another in brackets, an interval with a note, or nothing.
RULE, CELLS = re.compile(r"\|(---\|)+"), re.compile(r"(?<!\\)\|")
_NUMBER = r"[+\-−]?(\d[\d.]*(e[+-]?\d+)?|inf|nan)%?"
NUMERIC = re.compile(
    rf"–?|n too small|{_NUMBER}( \({_NUMBER}\))?|({_NUMBER} )?\[{_NUMBER}, {_NUMBER}\]( .*)?"
)

#: Last line of both files, a comment in both languages, which marks a file as a report.
MARK = "<!-- tempo-mlx experiment report -->\n"

#: Rows of the tables that grow with the suite: prompts, texts, influence.
MOST_ROWS = 60


def write_report(analysis: Analysis, folder: Path, measure: str = "token") -> list[Path]:
    """Draw the pictures and write both files.

    Args:
        analysis: to report.
        folder: of the suite.
        measure: that the pictures show.

    Returns:
        The HTML and the Markdown file.

    Raises:
        TempoError: for an unknown measure.
    """
    drawn = {path.stem: path for path in plot_experiment(analysis, folder / PLOTS, measure)}
    title = str(analysis.info["suite"].get("name") or "Experiment")
    markdown = to_markdown(
        analysis, title, {stem: f"{PLOTS}/{p.name}" for stem, p in drawn.items()}
    )
    written = []
    for name, text in ((HTML, to_html(markdown, title, folder)), (MARKDOWN, markdown)):
        write_atomically(folder / name, f"{text.rstrip()}\n\n{MARK}")
        written.append(folder / name)
    return written


def to_markdown(analysis: Analysis, title: str, pictures: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        analysis: to report.
        title: of the report.
        pictures: path of each picture, by its name.
    """

    def rows(table: str, **equal: str) -> list[Any]:
        found = analysis[table]
        for column, value in equal.items():
            found = found[found[column] == value]
        return records(found)

    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({pictures[name]})" if name in pictures else ""

    influence = analysis["influence"]
    text = (
        _environment(autoescape=False)
        .get_template(f"{MARKDOWN}.j2")
        .render(
            title=title,
            info=analysis.info,
            n_seeds=analysis["runs"]["seed"].nunique(),
            rows=rows,
            picture=picture,
            first_token=records(_extreme_layers(analysis["first_token"])),
            flagged=records(
                influence[influence[["outlier", "influential"]].fillna(False).any(axis=1)]
            ),
            most_rows=MOST_ROWS,
            interval=interval,
            with_holm=with_holm,
        )
    )
    return right_aligned(re.sub(r"\n{3,}", "\n\n", text))


def right_aligned(markdown: str) -> str:
    """The Markdown with every column of a table that holds only numbers aligned to the right."""
    lines = markdown.split("\n")
    for i, line in enumerate(lines):
        if not RULE.fullmatch(line):
            continue
        rows = list(takewhile(lambda row: row.startswith("|"), lines[i + 1 :]))
        cells = ([cell.strip() for cell in CELLS.split(row)[1:-1]] for row in rows)
        columns = zip(*cells, strict=True)
        marks = ("---:" if all(map(NUMERIC.fullmatch, column)) else "---" for column in columns)
        lines[i] = f"|{'|'.join(marks)}|"
    return "\n".join(lines)


def to_html(markdown: str, title: str, folder: Path) -> str:
    """The report as one HTML file.

    Args:
        markdown: the report.
        title: of the page.
        folder: that the paths of pictures start from.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    headings = []
    for token, content in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open" and token.tag == "h2":
            headings.append(content.content)
            token.attrSet("id", f"section-{len(headings)}")
        elif token.type in ("td_open", "paragraph_open"):
            # A text may be in a script that runs from right to left.
            token.attrSet("dir", "auto")
        for child in content.children or []:
            if child.type == "image":
                # Inline SVG would not do: names inside several pictures of a page collide.
                data = b64encode((folder / str(child.attrs["src"])).read_bytes()).decode("ascii")
                child.attrSet("src", f"data:image/svg+xml;base64,{data}")
    body = parser.renderer.render(tokens, parser.options, {})
    template = _environment(autoescape=True).get_template(f"{HTML}.j2")
    return template.render(title=title, headings=headings, body=body)


def _environment(autoescape: bool) -> Environment:
    """The templates. Control characters of texts are shown as symbols."""
    found = Environment(
        loader=PackageLoader("tempo_mlx.experiments"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: running(value) if type(value) is str else value,
    )
    found.filters |= {
        "cell": markdown_cell,
        "flat": flat,
        "given": lambda value, otherwise: otherwise if pd.isna(value) else value,
        "number": number,
        "percent": lambda value: "–" if pd.isna(value) else f"{value:.0%}",
        "signed": lambda value: number(value, signed=True),
    }
    return found


def records(table: DataFrame) -> list[Any]:
    """The rows of a table, with columns as attributes."""
    return list(each(table))


def markdown_cell(value: Any) -> str:
    """A text for a table cell in Markdown: on one line, without markup."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|#~$&":
        text = text.replace(sign, f"\\{sign}")
    return text


def flat(tree: Mapping[str, Any], before: str = "", leave_out: str = "") -> list[list[str]]:
    """Names and values of a nested mapping; names are joined by points."""
    rows = []
    for name, value in tree.items():
        if name == leave_out:
            continue
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value, 1)}
        if isinstance(value, Mapping):
            rows += flat(value, f"{before}{name}.")
        else:
            joined = isinstance(value, list | tuple)
            rows.append([f"{before}{name}", ", ".join(map(str, value)) if joined else str(value)])
    return rows


def _extreme_layers(first: DataFrame) -> DataFrame:
    """The layers of each condition with the lowest, the median and the highest attention."""
    ranked = first.sort_values("attention")
    grouped = ranked.groupby("condition", sort=False)
    place, size = grouped.cumcount(), grouped["layer"].transform("size")
    return ranked[(place == 0) | (place == (size - 1) // 2) | (place == size - 1)].sort_values(
        "condition", kind="stable"
    )
