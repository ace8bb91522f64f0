"""``tempo-mlx experiment analyze``, ``plot`` and ``report``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..arguments import check_count, check_seed
from ..errors import MissingExtraError, TempoError
from ..io.console import Console
from .options import Overwrite
from .outputs import Output, check_outputs, ending_with, json_where, picture

if TYPE_CHECKING:
    from pandas import DataFrame

    from ..experiments.analysis import Analysis

#: Message if the extra is not installed.
MISSING = "experiments need {}: pip install 'tempo-mlx[experiments]'"

#: The word for no limit.
ANY = "any"

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a suite.")]
Measure = Annotated[
    str,
    typer.Option(
        metavar="MEASURE",
        help="Measure in the pictures: attention per sibling (token), of the set (set), or per "
        "sibling as if its siblings did not exist (alone).",
    ),
]


def analyze(
    folder: Folder,
    caliper: Annotated[
        str,
        typer.Option(
            metavar="LOGITS",
            help="Largest difference between the logits of a sibling's and a control's "
            "probabilities, above 0, or 'any'.",
        ),
    ] = "0.5",
    window: Annotated[
        str,
        typer.Option(
            metavar="STEPS",
            help="Largest difference between their query steps, at least 0, or 'any'.",
        ),
    ] = "3",
    adjustment: Annotated[
        str,
        typer.Option(
            metavar="linear|none",
            help="How to adjust for differences that remain after matching; linear: along fitted "
            "slopes.",
        ),
    ] = "linear",
    resamples: Annotated[int, typer.Option(help="Samples of each bootstrap, at least 1.")] = 9999,
    seed: Annotated[int, typer.Option(help="Seed of the bootstraps, at least 0.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare siblings with matched single tokens, and conditions with each other.

    Writes every table to FOLDER/analysis as CSV and Parquet, and analysis.json.
    """
    with _packages():
        from ..experiments.analysis import MOST_RESAMPLES, files_of, save
        from ..experiments.analysis import analyze as analyze_tables
        from ..experiments.matching import Rules
        from ..experiments.tables import load_tables
    rules = Rules(_limit("--caliper", caliper, float), _limit("--window", window, int), adjustment)
    check_count("--resamples", resamples, most=MOST_RESAMPLES)
    check_seed(seed)
    _check_folder(folder)
    files = files_of(folder)
    # Tables have no mark of ours, but analysis.json, which is written last, identifies them.
    whole = files[-1].is_file() and is_analysis(files[-1])
    _check_files(files, lambda path: whole, overwrite)
    with _working("Analysing"):
        analysis = analyze_tables(load_tables(folder), rules, resamples, seed)
        target = save(analysis, folder)
    _print(analysis)
    _say(f"written: {target}")


def plot(
    folder: Folder,
    measure: Measure = "token",
    ending: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="svg, png or pdf.")
    ] = "svg",
    overwrite: Overwrite = False,
) -> None:
    """Draw the analysis into FOLDER/plots: layers and heads, prompts, categories, distances, KL."""
    if f".{ending}" not in (".svg", ".png", ".pdf"):
        raise TempoError(f"--format must be svg, png or pdf, got {ending!r}")
    with _packages():
        from ..experiments.analysis import load_analysis
        from ..experiments.pictures import KIND, files_of, plot_experiment
        from ..experiments.report import PLOTS
    _check_folder(folder)
    analysis = load_analysis(folder)
    _check_files(files_of(folder / PLOTS, f".{ending}"), picture(KIND), overwrite)
    with _working("Drawing"):
        written = plot_experiment(analysis, folder / PLOTS, measure, f".{ending}")
    for path in written:
        _say(f"drawn: {path}")


def report(folder: Folder, measure: Measure = "token", overwrite: Overwrite = False) -> None:
    """Write FOLDER/report.html, one file with embedded pictures, and FOLDER/report.md."""
    with _packages():
        from ..experiments.analysis import load_analysis
        from ..experiments.pictures import KIND, files_of
        from ..experiments.report import HTML, MARK, MARKDOWN, PLOTS, write_report
    _check_folder(folder)
    analysis = load_analysis(folder)
    _check_files(files_of(folder / PLOTS), picture(KIND), overwrite)
    _check_files([folder / HTML, folder / MARKDOWN], ending_with(MARK), overwrite)
    with _working("Writing"):
        written = write_report(analysis, folder, measure)
    for path in written:
        _say(f"written: {path}")


@contextmanager
def _packages() -> Iterator[None]:
    """Turn missing packages into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tempo_mlx"):
            raise
        raise MissingExtraError(MISSING.format(error.name)) from error


@contextmanager
def _working(what: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield


def _limit(name: str, text: str, kind: type) -> Any:
    if text == ANY:
        return None
    try:
        return kind(text)
    except ValueError as error:
        raise TempoError(f"{name} must be a number or {ANY!r}, got {text!r}") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise TempoError(f"FOLDER must be the folder of a suite, but {folder} is not a folder")


#: Recognises the file that :func:`analyze` writes last.
is_analysis = json_where(lambda data: data.keys() >= {"schema", "suite", "manifest", "tables"})


def _check_files(paths: list[Path], ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Create the files' folder, and refuse to replace files that we did not write."""
    paths[0].parent.mkdir(exist_ok=True)
    check_outputs([Output("FOLDER", path, ours) for path in paths], {}, overwrite)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim")


def _print(analysis: "Analysis") -> None:
    """Print the main results: effects and contrasts over all prompts, and unmatched units."""
    from ..experiments.summary import each

    console = Console(highlight=False)
    effects = analysis["effects"].rename(columns={"mean": "controlled"})
    console.print(
        _table("siblings minus controls", effects, ["measure", "condition"], "naive", "controlled")
    )
    contrasts = analysis["contrasts"].rename(columns={"mean": "difference"})
    if len(contrasts):
        pairs = contrasts["condition_b"] + " - " + contrasts["condition_a"]
        contrasts = contrasts.assign(conditions=pairs)
        title = "condition minus condition, prompt by prompt"
        console.print(_table(title, contrasts, ["measure", "conditions"], "difference"))
    matches = analysis["matches"].groupby(["of", "condition"], sort=False, as_index=False)
    for row in each(matches[["units", "without"]].sum()):
        console.print(f"{row.condition}: {row.without} of {row.units} {row.of} had no control")
    for note in analysis.info["notes"]:
        console.print(note, style="yellow")


def _table(title: str, cells: "DataFrame", labels: list[str], *means: str) -> Table:
    """A table of the cells over all prompts: labels, means, interval and tests."""
    from ..experiments.numbers import interval, number

    table = Table(*labels, title=title)
    for name in ("n", *means, "95%", "d_z", "p (t)", "Holm"):
        table.add_column(name, justify="right")
    for cell in cells[cells["grouping"] == "overall"].to_dict("records"):
        table.add_row(
            *(cell[label] for label in labels),
            str(cell["n"]),
            *(number(cell[mean], True) for mean in means),
            interval(cell["low"], cell["high"], cell["note"]),
            number(cell["d_z"], True),
            number(cell["p_t"]),
            number(cell["p_t_holm"]),
        )
    return table
