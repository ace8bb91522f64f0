"""Report and pictures of an analysis, and the commands that write them."""

import base64
import itertools
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

from tempo_mlx.cli import experiment_analysis
from tempo_mlx.experiments import analysis as analysis_module
from tempo_mlx.experiments import tables as tables_module
from tempo_mlx.experiments.analysis import analyze, save
from tempo_mlx.experiments.matching import Rules
from tempo_mlx.experiments.numbers import interval, number
from tempo_mlx.experiments.pictures import (
    PICTURES,
    categories_figure,
    distances_figure,
    heads_figure,
    kl_figure,
    plot_experiment,
    prompts_figure,
)
from tempo_mlx.experiments.report import (
    MOST_ROWS,
    markdown_cell,
    right_aligned,
    to_markdown,
    write_report,
)
from tempo_mlx.plots.figure import look
from tests.synthetic_experiment import CATEGORIES, Planted

import numpy as np
import pytest
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

#: In one process, which makes the analyses once.
pytestmark = pytest.mark.xdist_group("analyses of the report")

MARKUP = 'a <b>bold</b> | pipe & "quotes" $x$ [link](x)'
REORDERING = "user \u202etxt.exe\u2066 \x1b[2J"
SUITE = Planted(effect=0.006, condition_effect=0.004, prompt_sd=0.002, layers=3, heads=2)


@pytest.fixture(scope="module")
def tables():
    tables = SUITE.tables(1)
    runs = tables.runs.copy()
    runs.loc[runs["prompt_id"] == "narrative-1", "prompt"] = MARKUP
    runs.loc[runs["prompt_id"] == "narrative-2", "prompt"] = REORDERING
    return replace(tables, runs=runs)


@pytest.fixture(scope="module")
def analysis(tables):
    return analyze(tables, resamples=99)


@pytest.fixture(scope="module")
def wide():
    """An analysis of three conditions, one with a long name, and many layers."""
    conditions = ("isolated", "visible", "hidden, combine=mean, threshold=0.05, schedule=constant")
    return analyze(replace(SUITE, conditions=conditions, layers=30).tables(4), resamples=99)


@pytest.fixture(scope="module")
def folder(analysis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    save(analysis, folder)
    write_report(analysis, folder)
    return folder


class Page(HTMLParser):
    """What a page holds: its tags in order, and whether each was closed where it should be."""

    VOID = frozenset(["meta", "img", "br", "link"])

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_whole_and_needs_no_other_file(folder, analysis):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == len(PICTURES) and "script" not in page.tags
    for tag, attributes in page.attributes:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/svg+xml;base64,", "#section-"))
    assert "url(" not in text and "@import" not in text
    places = [a["id"] for tag, a in page.attributes if tag == "h2"]
    links = [a["href"].removeprefix("#") for tag, a in page.attributes if tag == "a"]
    assert links == places and len(links) == len(set(links)) > 5
    for match in re.findall(r"base64,([^\"]+)", text):
        assert ElementTree.fromstring(base64.b64decode(match)).tag.endswith("svg")


def test_rows_of_a_table_are_as_long_as_its_head(folder, analysis):
    lines = (folder / "report.md").read_text().splitlines()
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    tables = 0
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|(---:?\|)+", line):
            tables += 1
            assert widths[i - 1] == widths[i] and lines[i - 2] == ""
            rows = list(itertools.takewhile(lambda row: row > 0, widths[i + 1 :]))
            assert rows and set(rows) == {widths[i]}, lines[i - 1]
    page = Page((folder / "report.html").read_text())
    assert tables == page.tags.count("table") > 12


def test_the_report_begins_with_its_answer_and_one_picture(folder, analysis):
    text = (folder / "report.md").read_text()
    answer = text.split("## ")[1]
    assert answer.startswith("Answer") and answer.count("![") == 1 and "|" not in answer
    effects = analysis["effects"]
    whole = effects[(effects["grouping"] == "overall") & (effects["measure"] == "token")]
    contrasts = analysis["contrasts"]
    pairs = contrasts[(contrasts["grouping"] == "overall") & (contrasts["measure"] == "token")]
    assert len(whole) + len(pairs) == answer.count("\n- ") and len(whole) > 1 and len(pairs)
    for row in whole.itertuples():
        assert f"- {row.condition}: more, {number(row.mean, signed=True)} of" in answer
    for row in pairs.itertuples():
        assert (
            f"- {row.condition_b}, compared with {row.condition_a} in the same prompts: " in answer
        )
    # What only a machine asks for stands at the end.
    assert text.index("## Limits") < text.index("Where it was run") < text.index("## All tables")


def test_columns_of_numbers_are_aligned_to_the_right():
    table = """
| a | b | c | d |
|---|---|---|---|
| x\\|1 | +0.1 | [-0.1, +2e-05] | 0.01 (0.2) |
| 1 | – | n too small | 7% |
"""
    assert right_aligned(table) == table.replace("|---|---|---|---|", "|---|---:|---:|---:|")


@pytest.mark.slow
def test_texts_of_prompts_are_no_markup(folder):
    html, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    assert "<b>" not in html and MARKUP in "".join(Page(html).text)
    assert markdown_cell(MARKUP) in markdown and "<b>" not in markdown
    assert markdown_cell("a|b\n*c* <d>") == r"a\|b \*c\* \<d\>"


@pytest.mark.slow
def test_no_text_reorders_what_stands_beside_it(folder):
    html, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    for text in (html, markdown):
        assert not set(text) & set("\u202e\u2066\x1b")
    assert '<td dir="auto">user ⟨U+202E⟩txt.exe⟨U+2066⟩ ␛[2J</td>' in html


def test_pictures_of_the_markdown_are_beside_it(folder):
    text = (folder / "report.md").read_text()
    files = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert sorted(files) == sorted(f"plots/{name}.svg" for name in PICTURES)
    for file in files:
        ElementTree.parse(folder / file)


def test_report_shows_the_numbers_of_the_analysis_naive_beside_controlled(folder, analysis):
    lines = (folder / "report.md").read_text().splitlines()
    effects = analysis["effects"]
    for cell in effects[effects["grouping"] == "overall"].to_dict("records"):
        start = f"| {cell['measure']} | {cell['condition']} | {cell['n']} | "
        start += number(cell["naive"], True)
        (line,) = [line for line in lines if line.startswith(start)]
        cells = [part.strip().replace("\\", "") for part in line.split(" | ")]
        assert cells[5] == number(cell["mean"], True)
        assert cells[6] == interval(cell["low"], cell["high"])
        assert cells[10] == f"{number(cell['p_t'])} ({number(cell['p_t_holm'])})"


@pytest.mark.usefixtures("without_checks")
def test_report_says_what_it_cannot_say(folder, analysis):
    text = (folder / "report.md").read_text()
    for words in ("n too small", "observed, not intervened", "their sets may differ", "copies"):
        assert words in text, words
    assert all(markdown_cell(note) in text for note in analysis.info["notes"])
    few = analyze(Planted(prompts=1, categories=("any",)).tables(2), resamples=9)
    lines = to_markdown(few, "few", {}).splitlines()
    assert sum(" n too small |" in line for line in lines) > 10
    assert not any(
        re.search(r"\bnan\b|<NA>|\bNone \|", line.replace("/None", "")) for line in lines
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_long_tables_are_cut_and_say_so():
    suite = Planted(prompts=7, layers=1, heads=1, steps=6, categories=CATEGORIES)
    many = analyze(suite.tables(3), resamples=9)
    lines = to_markdown(many, "many", {}).splitlines()
    start = lines.index(f"Texts (the first {MOST_ROWS} of 70)") + 4
    assert lines[start - 1].startswith("|---") and lines[start + MOST_ROWS] == ""
    assert all(line.startswith("|") for line in lines[start : start + MOST_ROWS])


def test_numbers_have_three_digits_and_a_dash_where_there_are_none():
    assert [number(x) for x in (0.0123456, 1.5e-9, None, np.nan, 12)] == [
        "0.0123",
        "1.5e-09",
        "–",
        "–",
        "12",
    ]
    assert number(0.5, signed=True) == "+0.5"
    assert interval(-1, 2) == "[-1, +2]" and interval(np.nan, 2, "n too small") == "n too small"


# Pictures.


def boxes(figure):
    """Every text that is drawn, with its box in dots."""
    figure.set_dpi(100)
    with look():
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        found = []
        for axes in figure.axes:
            labels = [axes.xaxis.label, axes.yaxis.label]
            low_x, high_x = sorted(axes.get_xlim())
            low_y, high_y = sorted(axes.get_ylim())
            for axis, low, high in ((axes.xaxis, low_x, high_x), (axes.yaxis, low_y, high_y)):
                for tick in axis.get_major_ticks():
                    if low <= tick.get_loc() <= high and tick.label1.get_visible():
                        labels.append(tick.label1)
            titles = [axes._left_title, axes.title]
            found += [text for text in [*labels, *titles, *axes.texts] if text.get_text()]
        for legend in figure.legends:
            found += legend.get_texts()
        return [(text.get_text(), text.get_window_extent(renderer)) for text in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw", [heads_figure, prompts_figure, categories_figure, distances_figure, kl_figure]
)
@pytest.mark.parametrize("conditions", [2, 3])
def test_no_text_of_a_picture_overlaps_another_or_leaves_it(draw, conditions, analysis, wide):
    found = {2: analysis, 3: wide}[conditions]
    with look():
        figure = draw(found, "token")
    drawn = boxes(figure)
    assert len(drawn) > 8
    page = figure.bbox
    for text, box in drawn:
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 <= box.y1 <= page.y1
        assert inside, text
    for (text, a), (other, b) in itertools.combinations(drawn, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, (text, other)


def test_heads_are_drawn_as_they_are_numbered(analysis):
    with look():
        figure = heads_figure(analysis, "token")
    heads = analysis["heads"]
    for axes, condition in zip(figure.axes, ("isolated", "visible"), strict=False):
        image = axes.images[0]
        mine = heads[(heads["measure"] == "token") & (heads["condition"] == condition)]
        for row in mine.to_dict("records"):
            assert image.get_array()[row["layer"], row["head"]] == row["effect"]
        low, high = image.get_clim()
        assert low == -high and high == heads.loc[heads["measure"] == "token", "effect"].abs().max()


def test_every_prompt_has_its_point(analysis):
    with look():
        figure = prompts_figure(analysis, "token")
    drawn = np.concatenate([line.get_xdata() for line in figure.axes[0].lines])
    intervals = analysis["intervals"]
    for effect in intervals.loc[intervals["measure"] == "token", "effect"]:
        assert np.isclose(drawn, effect, rtol=0, atol=1e-15).any()


@pytest.mark.usefixtures("without_checks")
def test_pictures_without_data_are_left_out(tmp_path):
    one = analyze(Planted(conditions=("isolated",)).tables(5), resamples=9)
    names = [path.name for path in plot_experiment(one, tmp_path / "plots", ending=".png")]
    assert names == [f"{name}.png" for name in PICTURES if name != "kl"]
    write_report(one, tmp_path)
    assert "kl.svg" not in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="measure must be one of token, set, alone, got 'head'"):
        plot_experiment(one, tmp_path, "head")


def test_pictures_are_the_same_again(analysis, tmp_path):
    first, second = (plot_experiment(analysis, tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


# Commands.


@pytest.fixture(scope="module")
def made():
    """Analyses that commands made, by their settings."""
    return {}


@pytest.fixture
def run(tables, made, monkeypatch, without_checks):
    """Call the commands with these tables for any folder's; returns Typer's result."""
    monkeypatch.setattr(tables_module, "load_tables", lambda folder: tables)

    def analyze_once(tables, *settings):
        if settings not in made:
            made[settings] = analyze(tables, *settings)
        return made[settings]

    monkeypatch.setattr(analysis_module, "analyze", analyze_once)
    app = typer.Typer()
    for command in ("analyze", "plot", "report"):
        app.command(command)(getattr(experiment_analysis, command))
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.slow
def test_commands_follow_one_another(run, tmp_path):
    first = run("report", tmp_path)
    assert isinstance(first.exception, ValueError) and "analyze" in str(first.exception)
    result = run("analyze", tmp_path, "--resamples", 99, "--caliper", "any", "--window", "2")
    assert result.exit_code == 0, result.exception
    assert "siblings minus controls" in result.output and "had no control" in result.output
    assert '"caliper": null' in (tmp_path / "analysis" / "analysis.json").read_text()
    result = run("plot", tmp_path, "--format", "png", "--measure", "set")
    assert result.exit_code == 0 and (tmp_path / "plots" / "heads.png").is_file()
    result = run("report", tmp_path)
    assert result.exit_code == 0 and (tmp_path / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_tables_of_someone_else_are_kept_unless_they_may_be_overwritten(run, tmp_path):
    analyze_it = ["analyze", tmp_path, "--resamples", 99]
    paths = [tmp_path / "analysis" / name for name in ("effects.csv", "heads.parquet")]
    paths[0].parent.mkdir()
    for path in paths[::-1]:
        path.write_text("precious")
        message = str(run(*analyze_it).exception)
        assert f"{path} exists and this command did not write it" in message
    assert {path.read_text() for path in paths} == {"precious"}
    assert run(*analyze_it, "--overwrite").exit_code == 0
    assert b"precious" not in {path.read_bytes() for path in paths}
    # What the command itself wrote, it may write again.
    assert run(*analyze_it).exit_code == 0


@pytest.mark.slow
def test_reports_of_someone_else_are_kept_unless_they_may_be_overwritten(run, tmp_path):
    assert run("analyze", tmp_path, "--resamples", 99).exit_code == 0
    (tmp_path / "plots").mkdir()
    for command, names in {
        "plot": ["plots/heads.svg"],
        "report": ["plots/prompts.svg", "report.html", "report.md"],
    }.items():
        paths = [tmp_path / name for name in names]
        for path in paths:
            path.write_text("precious")
            message = str(run(command, tmp_path).exception)
            assert f"{paths[0]} exists and this command did not write it" in message
        assert {path.read_text() for path in paths} == {"precious"}
        assert run(command, tmp_path, "--overwrite").exit_code == 0
        assert "precious" not in {path.read_text() for path in paths}
        assert run(command, tmp_path).exit_code == 0
    for path in paths[1:]:
        path.write_text(path.read_text() + "a note")
        assert str(path) in str(run("report", tmp_path).exception)
        path.unlink()


@pytest.mark.slow
def test_runs_that_the_analysis_does_not_know_are_noticed(run, tmp_path, tables):
    assert run("analyze", tmp_path, "--resamples", 99).exit_code == 0
    assert run("plot", tmp_path, "--format", "png").exit_code == 0
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "0123456789abcdef.parquet").touch()
    for command in ("plot", "report"):
        message = str(run(command, tmp_path).exception)
        assert "lacks 1 of" in message and "tempo-mlx experiment analyze" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "FOLDER", "--caliper", "wide"], ["--caliper", "wide", "any"]),
        (["analyze", "FOLDER", "--caliper", "0"], ["caliper", "above 0"]),
        (["analyze", "FOLDER", "--window", "1.5"], ["--window", "1.5"]),
        (["analyze", "FOLDER", "--resamples", "0"], ["--resamples", "at least 1", "0"]),
        (["analyze", "FOLDER", "--seed", "-1"], ["seed", "[0, 2^63)", "-1"]),
        (["analyze", "no/such/folder"], ["no/such/folder"]),
        (["plot", "FOLDER", "--format", "gif"], ["--format", "svg", "gif"]),
        (["plot", "FOLDER"], ["no analysis", "tempo-mlx experiment analyze"]),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, words):
    result = run(*(tmp_path if word == "FOLDER" else word for word in arguments))
    # What the command line prints as one line, with exit code 2.
    assert isinstance(result.exception, ValueError)
    message = str(result.exception)
    assert "\n" not in message and all(word in message for word in words), message


def test_missing_packages_are_named_with_the_extra(run, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("tempo_mlx.experiments"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "statsmodels.api", None)
    result = run("analyze", tmp_path)
    assert isinstance(result.exception, ImportError)
    assert "pip install 'tempo-mlx[experiments]'" in str(result.exception)


@pytest.mark.usefixtures("without_checks")
def test_a_suite_in_which_nothing_matched_has_a_report(tmp_path):
    tables = Planted(conditions=("isolated",)).tables(5)
    found = analyze(tables, Rules(caliper=1e-12, window=0), resamples=9)
    assert found["influence"].empty or found["influence"]["value"].notna().all()
    write_report(found, tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 0
