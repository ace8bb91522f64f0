"""Pictures: what is drawn, where it stands, and what happens to files."""

import itertools
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from types import SimpleNamespace

from tempo_mlx.decode.result import GenerationResult
from tempo_mlx.lattice.lattice import Ending, Lattice, Step, Token
from tempo_mlx.plots import check_plot, plot_lattice, plot_mask, plot_schedule
from tempo_mlx.plots.figure import DPI, drawn, look
from tempo_mlx.plots.labels import LONGEST, aside, label
from tempo_mlx.plots.lattice import ARCS, lattice_figure
from tempo_mlx.plots.layout import MARGIN, NARROWEST_PAGE, PAGE_WIDTH
from tempo_mlx.plots.mask import PROMPT_TOKENS, mask_figure
from tempo_mlx.plots.schedule import schedule_figure
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Bezier, Constant, Relu
from tempo_mlx.rules.visibility import VISIBILITY
from tempo_mlx.settings import Settings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.path import Path as Strokes

WORDS = [" cat", "'s", "\n", " determined", ".", " environment", "She", " a", " ", "ing", ","]


def make_lattice(sets, prompt=3, pruned=(), endings=()):
    """A lattice of the texts in ``sets``; nothing was computed from the last set.

    ``pruned`` holds triples (step, rank, pruned_at), ``endings`` pairs (step, probability).
    """
    lattice = Lattice(list(range(prompt)))
    first = prompt
    for number, texts in enumerate(sets):
        ids = range(100 * number, 100 * number + len(texts))
        tokens = [
            Token(id, text, 0.9 / (rank + 1) ** 1.5, first + rank)
            for rank, (id, text) in enumerate(zip(ids, texts, strict=True))
        ]
        first += len(tokens)
        lattice.steps.append(Step(number, prompt + number, 0.05, tokens))
        if number + 1 < len(sets):
            lattice.reserve(len(tokens), number)
    for step, rank, when in pruned:
        token = lattice.steps[step].tokens[rank]
        token.pruned_at = when
    for step, probability in endings:
        lattice.steps[step].endings.append(Ending(0, probability))
    return lattice


def make_result(lattice, prompt="The cat", **chosen):
    vocabulary = SimpleNamespace(text=lambda id: f" p{id}")
    return GenerationResult(None, vocabulary, "tiny", prompt, lattice, Settings(**chosen))


def busy_lattice(steps=45):
    rng = np.random.default_rng(0)
    sets = [list(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(steps)]
    wide = [step for step in range(steps - 3) if len(sets[step]) > 2]
    pruned = [(step, rank, step + 2) for step in wide for rank in (1, 2)]
    return make_lattice(sets, 12, pruned, endings=[(4, 0.08), (9, 0.5)])


def first_live(lattice):
    return [step.live[0].id for step in lattice.steps]


def random_attention(lattice):
    rng = np.random.default_rng(1)
    return {step.step: rng.random(lattice.n_slots) for step in lattice.steps}


def draw(*arguments, **options):
    with look():
        return lattice_figure(*arguments, **options)


def named(figure, start):
    """Artists by the rest of their names."""
    found = {}
    for artist in figure.axes[0].get_children():
        name = artist.get_gid() or ""
        if name.startswith(start):
            found[name.removeprefix(start)] = artist
    return found


def svg_texts(path):
    return Counter(element.text for element in ElementTree.parse(path).iter() if element.text)


def extents(figure):
    """(text, its box in dots) of everything that is written, as a PNG has it."""
    figure.set_dpi(DPI)
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    with look():
        renderer = FigureCanvasAgg(figure).get_renderer()
        return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def assert_apart(boxes, slack=1.0):
    for (text, a), (other, b) in itertools.combinations(boxes, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= slack or down <= slack, (text, other, a, b)


# The lattice.


def test_every_token_of_the_lattice_is_text_of_the_svg(tmp_path):
    lattice = busy_lattice()
    plot_lattice(make_result(lattice), tmp_path / "lattice.svg")
    expected = Counter(
        label(token.text, token.id) if token.pruned_at is None else aside(label(token.text, 0))
        for step in lattice.steps
        for token in step.tokens
    )
    assert expected["“,”"] > 1 and expected[","] > 1
    assert expected["·determined"] > 1 and expected["⏎"] > 1
    found = svg_texts(tmp_path / "lattice.svg")
    # What else is written: the key repeats no token's text.
    assert expected <= found
    assert found["The cat"] == 1 and found["threshold 0.1, visibility recombined"] == 1
    assert found["…"] == 1 and found["·p11"] == 1 and "·p5" not in found


@pytest.mark.parametrize(
    "lattice",
    [busy_lattice(), make_lattice([[" a", "b"], ["c"]], 1, pruned=[(0, 1, 1)], endings=[(1, 0.1)])],
    ids=["busy", "small"],
)
def test_no_text_overlaps_another_or_leaves_the_page(lattice):
    options = {"best": first_live(lattice), "attention": random_attention(lattice)}
    figure = draw(make_result(lattice), **options)
    boxes = extents(figure)
    assert len(boxes) > lattice.n_tokens
    assert {"best path", "pruned", "strongest attention", "possible"} < {text for text, _ in boxes}
    assert_apart(boxes)
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text
        assert page.y0 <= box.y0 and box.y1 <= page.y1, text


@settings(max_examples=15)
@given(st.lists(st.lists(st.text(max_size=12), min_size=1, max_size=4), min_size=1, max_size=6))
def test_any_text_is_drawn_without_overlap_and_without_missing_glyphs(sets):
    with warnings.catch_warnings(), look():
        warnings.simplefilter("error")
        figure = lattice_figure(make_lattice(sets))
        assert_apart(extents(figure))
        FigureCanvasAgg(figure).draw()


@pytest.mark.parametrize("steps", [1, 5, 9, 100, 300])
def test_long_lattices_break_into_rows_of_one_page(steps):
    lattice = make_lattice([[" environment", " cat"]] * steps)
    figure = draw(lattice)
    width, height = figure.get_size_inches() * 72
    assert NARROWEST_PAGE <= width <= PAGE_WIDTH
    lines = Counter(text.get_position()[1] for text in named(figure, "token-").values())
    firsts = {height for rank, height in enumerate(sorted(lines)) if rank % 2 == 0}
    assert sum(lines[height] for height in firsts) == steps
    assert (len(firsts) > 1) == (steps > 5)
    if len(firsts) == 2:
        # The second row is not left nearly empty.
        assert min(lines.values()) >= 0.5 * max(lines.values())


def test_more_probable_tokens_are_larger_and_higher():
    lattice = make_lattice([[" a", " b", " c", " d"]], endings=[(0, 0.5)])
    texts = named(draw(lattice), "token-")
    order = [texts[str(token.slot)] for token in lattice.steps[0].tokens]
    sizes = [text.get_fontsize() for text in order]
    heights = [text.get_position()[1] for text in order]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and min(sizes) >= 7
    assert heights == sorted(heights)
    ending = next(t for t in draw(lattice).axes[0].texts if t.get_text() == "<end>")
    assert heights[0] < ending.get_position()[1] < heights[1]


def test_pruned_tokens_are_fainter_and_struck_through():
    lattice = busy_lattice()
    figure = draw(lattice)
    pruned = {
        str(token.slot)
        for step in lattice.steps
        for token in step.tokens
        if token.pruned_at is not None
    }
    texts, strikes = named(figure, "token-"), named(figure, "strike-")
    assert set(strikes) == pruned != set()
    for slot, text in texts.items():
        assert ((text.get_alpha() or 1) < 1) == (slot in pruned)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = {slot: text.get_window_extent(renderer) for slot, text in texts.items()}
    for slot, line in strikes.items():
        ends = figure.axes[0].transData.transform(line.get_xydata())
        assert ends[0, 0] <= boxes[slot].x0 + 1 and ends[1, 0] >= boxes[slot].x1 - 1
        assert boxes[slot].y0 <= ends[0, 1] <= boxes[slot].y1


def test_best_path_runs_through_one_token_of_each_set():
    lattice = busy_lattice()
    best = first_live(lattice)
    figure = draw(lattice, best)
    texts = named(figure, "token-")
    slots = [str(step.live[0].slot) for step in lattice.steps]
    bold = {slot for slot, text in texts.items() if text.get_fontweight() == "bold"}
    assert bold == set(slots)
    strokes = named(figure, "best-path")[""].get_path()
    crossings = np.flatnonzero(strokes.codes == Strokes.LINETO)
    assert len(crossings) == len(lattice.steps)
    for slot, end in zip(slots, crossings, strict=True):
        (left, height), (right, same) = strokes.vertices[end - 1 : end + 1]
        x, y = texts[slot].get_position()
        assert left < x < right and height == same == pytest.approx(y - 3.5)


def test_best_path_follows_parents_where_an_id_occurs_twice():
    lattice = make_lattice([["a", "b"], ["c", "c"]])
    first, second = (step.tokens for step in lattice.steps)
    for parent, token in zip(first, second, strict=True):
        token.id, token.parent = 7, parent.slot
    texts = named(draw(lattice, [first[1].id, 7]), "token-")
    bold = [slot for slot, text in texts.items() if text.get_fontweight() == "bold"]
    assert bold == [str(first[1].slot), str(second[1].slot)]


@pytest.mark.parametrize(
    ("best", "words"), [([0], "1 tokens"), ([0, 999], "999"), ([1, 100], "not live")]
)
def test_a_best_path_that_is_none_is_refused(best, words):
    lattice = make_lattice([["a", "b"], ["c"]], pruned=[(0, 1, 1)])
    with pytest.raises(ValueError, match=words):
        draw(lattice, best)


def test_arcs_go_to_the_strongest_tokens_of_earlier_sets_of_several():
    lattice = make_lattice([["a", "b"], ["c"], ["d", "e", "f"], ["g", "h"], ["i"]])
    attention = random_attention(lattice)
    arcs = named(draw(lattice, attention=attention), "arc-")
    several = {3: 0, 4: 0, 6: 2, 7: 2, 8: 2, 9: 3, 10: 3}  # slot -> step
    expected = set()
    for step, paid in attention.items():
        targets = [slot for slot, at in several.items() if at < step]
        targets.sort(key=lambda slot: -paid[slot])
        expected |= {f"{step}-{slot}" for slot in targets[:ARCS]}
    assert set(arcs) == expected
    weights = {name: attention[int(name.split("-")[0])][int(name.split("-")[1])] for name in arcs}
    by_weight = sorted(arcs, key=weights.get)
    widths = [arcs[name].get_linewidth() for name in by_weight]
    assert widths == sorted(widths) and len(set(widths)) == len(widths)


def test_no_attention_no_arc():
    lattice = make_lattice([["a", "b"], ["c", "d"]])
    assert not named(draw(lattice, attention={1: np.zeros(lattice.n_slots)}), "arc-")
    with pytest.raises(ValueError, match=r"attention\[9\]"):
        draw(lattice, attention={9: np.zeros(lattice.n_slots)})


def test_arcs_across_rows_leave_and_enter_the_page():
    lattice = make_lattice([[" environment", " cat"]] * 30)
    paid = np.zeros(lattice.n_slots)
    paid[3] = 1.0
    figure = draw(lattice, attention={29: paid})
    strokes = named(figure, "arc-29-")["3"].get_path()
    assert list(strokes.codes).count(Strokes.MOVETO) == 2
    width = figure.get_size_inches()[0] * 72
    assert strokes.vertices[:, 0].min() == 0
    assert strokes.vertices[:, 0].max() == pytest.approx(width)


def test_a_long_prompt_is_cut_to_the_width_of_the_page():
    lattice = make_lattice([[" a"]])
    figure = draw(make_result(lattice, "word " * 5000))
    title = figure.axes[0].texts[0]
    box = extents(figure)[0][1]
    assert title.get_text().endswith("…") and len(title.get_text()) > 20
    assert box.x1 <= figure.bbox.x1 - 0.99 * MARGIN * DPI / 72


def test_the_title_names_settings_that_differ_from_their_defaults():
    pruning = Pruning(rule="attention", lookback=5)
    result = make_result(make_lattice([[" environment"]] * 9), max_parallel=4, pruning=pruning)
    assert draw(result).axes[0].texts[1].get_text() == (
        "threshold 0.1, visibility isolated, max parallel 4, "
        "pruning (rule attention, threshold 0.5, lookback 5)"
    )


# Labels.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" cat", "·cat"),
        ("cat", "cat"),
        ("·cat", "·cat"),
        ("\n", "⏎"),
        ("\r\n\t", "\\x0d⏎⇥"),
        (" ", "␣"),
        ("   ", "␣␣␣"),
        (" " * 16, "␣×16"),
        (" a b", "·a␣b"),
        ("-" * 64, "-×64"),
        ("", "#7"),
        ("\ufffd", "\ufffd#7"),
        (" \ufffd", "·\ufffd#7"),
        ("\x00\x7f", "\\x00\\x7f"),
        ("\u200b", "\\u200b"),
        ("\ufe0f", "\\ufe0f"),
        ("\u0301", "◌\u0301"),
        (" \u0301", "·◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\x00" + "0" * 8, "\\x000×8"),
        ("\n" * 9, "⏎×9"),
        ("\U0010fffd", "\\U0010fffd"),
        ("⟨e3 81⟩", "⟨e3 81⟩"),
        ("a ⟨e3 81⟩ b", "a␣⟨e3 81⟩␣b"),
        ("$x^2$", "$x^2$"),
        ("café", "café"),
        ("abc" * 20, ("abc" * 20)[: LONGEST - 1] + "…"),
    ],
)
def test_labels(text, shown):
    assert label(text, 7) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [(",", "“,”"), (" -", "“·-”"), (" cat", "·cat"), ("'s", "'s"), ("\n", "⏎"), (" ", "␣")],
)
def test_punctuation_that_stands_apart_is_in_quotes(text, shown):
    assert aside(label(text, 7)) == shown


@given(st.text(max_size=60))
def test_labels_are_one_short_visible_line(text):
    shown = label(text, 123456)
    assert shown.isprintable() and shown.strip() == shown != ""
    assert len(shown) <= LONGEST + len("·#123456")


# Who saw whom.


def may(rule, lattice, query, key):
    """The definition, slot by slot: 0 no, 1 yes, 2 it would if it lived."""
    slots = lattice.slots
    q, k = int(slots.step[query]), int(slots.step[key])
    rules = {
        "isolated": query == key or k < q,
        "visible": k <= q,
        "hidden": query == key or (k < q and slots.set_size[key] == 1),
    }
    if not rules[rule]:
        return 0
    pruned_at = {token.slot: token.pruned_at for step in lattice.steps for token in step.tokens}
    when = pruned_at.get(key)
    return 1 if when is None or q <= when else 2


@pytest.mark.parametrize("rule", ["isolated", "visible", "hidden"])
def test_mask_is_the_definition(rule):
    assert rule in VISIBILITY
    sets = [["a", "b"], ["c"], ["d", "e", "f"], ["g"], ["h", "i"], ["j"]]
    lattice = make_lattice(sets, 11, pruned=[(0, 1, 1), (2, 0, 3), (2, 2, 4)])
    with look():
        figure = mask_figure(make_result(lattice, visibility=rule), rule)
    (image,) = figure.axes[0].images
    shown = range(11 - PROMPT_TOKENS, lattice.n_slots)
    expected = [[may(rule, lattice, query, key) for key in shown] for query in shown]
    np.testing.assert_array_equal(image.get_array(), expected)
    # Pruning hides nothing that was in sight where sets of several are hidden anyway.
    assert np.any(np.array(expected) == 2) == (rule != "hidden")
    colours = image.cmap(image.norm(np.arange(3)))
    assert len(np.unique(colours, axis=0)) == 3
    texts = Counter(text.get_text() for text in figure.axes[0].texts)
    assert all(texts[letter] == 2 for letter in "abcdefghi") and "j" not in texts
    assert texts["·p3"] == 2 and "·p2" not in texts
    assert any("first 3 prompt tokens are left out" in text for text in texts)
    assert_apart(extents(figure))


def test_masks_of_many_slots_are_numbered():
    with look():
        figure = mask_figure(make_lattice([[" a"] * 3] * 120), "isolated")
    texts = Counter(text.get_text() for text in figure.axes[0].texts)
    assert texts["50"] == texts["350"] == 2 and texts["·a"] == 0
    assert max(figure.get_size_inches()) < 16


def test_mask_refuses_an_unknown_visibility(tmp_path):
    with pytest.raises(ValueError, match="visibility must be one of isolated.*'all'"):
        plot_mask(make_lattice([["a"]]), "all", tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


# Schedules.


@pytest.mark.parametrize("schedule", [Constant(), Bezier(0.1, 0.7), Relu(0.25)])
def test_curve_is_the_schedule_times_the_base(schedule):
    with look():
        figure = schedule_figure(schedule, 20, 0.3)
    (axes,) = figure.axes
    dots = next(line for line in axes.lines if line.get_gid() == "steps")
    np.testing.assert_array_equal(dots.get_xdata(), np.arange(21))
    np.testing.assert_allclose(dots.get_ydata(), [0.3 * schedule(s / 20) for s in range(21)])
    curve = axes.lines[0]
    np.testing.assert_allclose(
        np.interp(np.arange(21), *curve.get_data()), dots.get_ydata(), atol=1e-4
    )


def test_control_points_are_marked():
    with look():
        figure = schedule_figure(Bezier(0.1, 0.7), 30, 0.5)
    points = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_gid() == "control"]
    np.testing.assert_allclose(points, [[10, 0.05], [20, 0.35]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["p1 = 0.1", "p2 = 0.7"]


# Files.

PLOTS = {
    "lattice": lambda path: plot_lattice(make_lattice([["a", "b"], ["c"]]), path),
    "mask": lambda path: plot_mask(make_lattice([["a", "b"], ["c"]]), "isolated", path),
    "schedule": lambda path: plot_schedule(Bezier(), 10, 1.0, path),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_the_ending_names_the_format_and_the_same_run_gives_the_same_file(plot, tmp_path):
    for name, start in (("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF")):
        path = tmp_path / name
        plot(path)
        first = path.read_bytes()
        plot(path)
        assert first.startswith(start) and path.read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "a.PNG", "a.pdf"}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_paths_that_cannot_be_are_refused(plot, tmp_path):
    for name, words in (
        ("a.jpg", r"--plot must end in \.svg, \.png, \.pdf, got .*a\.jpg"),
        ("a", "--plot must end in"),
        ("no/a.svg", "--plot .*cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            plot(tmp_path / name)
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ValueError, match="--plot .*is a folder"):
        plot(tmp_path / "folder.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_a_failure_leaves_the_folder_as_it_was(plot, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError("disk full")

    kept = tmp_path / "a.png"
    kept.write_text("before")
    for target in ("matplotlib.figure.Figure.savefig", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(OSError, match="disk full"):
                plot(kept)
    assert kept.read_text() == "before" and list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
@pytest.mark.parametrize("kind", ["lattice", "mask"])
def test_pictures_say_who_made_them(tmp_path, kind, ending):
    path = tmp_path / f"picture{ending}"
    PLOTS[kind](path)
    content = path.read_bytes()
    assert drawn(content, ["schedule", kind]) and not drawn(content, ["schedule"])
    assert not drawn(b"tempo-mlx lattice, tempo-mlx mask " + content, [kind])


@pytest.mark.parametrize("plot", [*PLOTS.values(), check_plot], ids=[*PLOTS, "check"])
def test_missing_matplotlib_is_one_line(plot, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as error:
        plot(tmp_path / "a.png")
    assert str(error.value) == "plots need Matplotlib: pip install 'tempo-mlx[plots]'"
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_when_a_picture_is_drawn(tmp_path):
    code = """
import sys
from pathlib import Path
from tempo_mlx.plots import plot_schedule
from tempo_mlx.rules.schedules import Constant
assert "matplotlib" not in sys.modules
plot_schedule(Constant(), 5, 1.0, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    path = tmp_path / "a.svg"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.exists()


def test_the_users_settings_of_matplotlib_neither_matter_nor_change(tmp_path):
    path = tmp_path / "a.svg"
    PLOTS["lattice"](path)
    usual = path.read_bytes()
    changed = {"font.size": 30.0, "svg.fonttype": "path", "text.color": "red"}
    before = {name: rcParams[name] for name in changed}
    try:
        rcParams.update(changed)
        PLOTS["lattice"](path)
        assert {name: rcParams[name] for name in changed} == changed
    finally:
        rcParams.update(before)
    assert path.read_bytes() == usual
