"""Plots of an analysis: by layer and head, prompt, category, distance and step."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TempoError
from ..plots.figure import (
    COMPARED,
    GREY,
    INK,
    PALE,
    check_plot,
    cut,
    look,
    save,
)
from ..plots.labels import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from .analysis import Analysis

#: Kind of picture, in the metadata of the files.
KIND = "experiment"

#: Markers of the conditions. They and the colours are the same in every picture, and repeat after
#: the last.
MARKS = "osD^vP"
#: Opacity of bands and of single prompts.
FAINT = 0.18
#: Panels in a row.
COLUMNS = 2
#: Width of a picture, in inches.
WIDTH = 7.6
#: Longest text of a prompt, in font sizes.
PROMPT_ROOM = 22.0
#: Most rows of the picture by prompt; of more prompts, those with middling effects are left out.
MOST_ROWS = 60
#: Label of each measure's axis.
DIFFERENCE = {
    "token": "attention per sibling − matched controls",
    "set": "attention of the set − matched controls",
    "alone": "attention per sibling, siblings left out − matched controls",
}
#: Longest title of a panel, and longest name of a condition in a legend, in font sizes.
TITLE_ROOM, CONDITION_ROOM = 23.0, 12.0


def plot_experiment(
    analysis: "Analysis", folder: Path, measure: str = "token", ending: str = ".svg"
) -> list[Path]:
    """Draw the pictures that the analysis has data for.

    Args:
        analysis: to draw.
        folder: created if it does not exist.
        measure: a key of :data:`tempo_mlx.experiments.measures.MEASURES`.
        ending: .svg, .png or .pdf.

    Returns:
        The files, in the order of :data:`PICTURES`.

    Raises:
        TempoError: for another measure or ending.
        MissingExtraError: if Matplotlib is missing.
    """
    if measure not in analysis.info["measures"]:
        known = ", ".join(analysis.info["measures"])
        raise TempoError(f"measure must be one of {known}, got {measure!r}")
    folder.mkdir(exist_ok=True)
    written = []
    for path, draw in zip(files_of(folder, ending), PICTURES.values(), strict=True):
        check_plot(path, "picture")
        with look():
            figure = draw(analysis, measure)
            if figure is not None:
                save(figure, path, KIND)
                written.append(path)
    return written


def files_of(folder: Path, ending: str = ".svg") -> list[Path]:
    """The file of each picture, in the order of :data:`PICTURES`."""
    return [folder / f"{name}{ending}" for name in PICTURES]


def heads_figure(analysis: "Analysis", measure: str) -> "Figure | None":
    """Siblings minus controls by layer and head: a panel for each condition, one scale."""
    heads = _of(analysis["heads"], measure)
    if not len(heads):
        return None
    conditions = _conditions(analysis, heads)
    largest = float(heads["effect"].abs().max()) or 1.0
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    figure, panels = _panels(len(conditions), 1.6 + 0.115 * max(n_layers, 12))
    shown: Any = None
    for axes, condition in zip(panels, conditions, strict=True):
        mine = heads[heads["condition"] == condition].sort_values(["layer", "head"])
        values = mine["effect"].to_numpy().reshape(n_layers, n_heads)
        shown = axes.imshow(
            values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", origin="lower"
        )
        count = int(mine["prompts"].iloc[0])
        _title(axes, cut(f"{count} prompts, {condition}", TITLE_ROOM))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        _whole(axes.xaxis)
        _whole(axes.yaxis)
    bar = figure.colorbar(shown, ax=panels, shrink=0.8)
    bar.set_label(DIFFERENCE[measure])
    bar.outline.set_edgecolor(GREY)
    return figure


def prompts_figure(analysis: "Analysis", measure: str) -> "Figure | None":
    """The effect in each prompt with its interval, and in the last row the means over prompts."""
    found = _of(analysis["intervals"], measure)
    if not len(found):
        return None
    conditions = _conditions(analysis, found)
    order = _in_order(analysis, found).drop_duplicates("prompt_id")
    left_out = len(order) - MOST_ROWS
    if left_out > 0:
        ranked = found.groupby("prompt_id")["effect"].mean().sort_values().index
        ends = {*ranked[: MOST_ROWS // 2], *ranked[-(MOST_ROWS // 2) :]}
        order = order[order["prompt_id"].isin(ends)]
    # Prompts of one category stand together.
    ranks = {name: i for i, name in enumerate(dict.fromkeys(order["category"]))}
    order = order.assign(rank=order["category"].map(ranks)).sort_values("rank", kind="stable")
    from .summary import each

    rows, names, y = {}, [], 0.0
    before = None
    for row in each(order):
        if before is not None and row.category != before:
            y += 0.5
        rows[row.prompt_id] = y
        names.append((y, cut(readable(f"{row.category}: {row.prompt}"), PROMPT_ROOM)))
        y, before = y + 1, row.category
    bottom = y + 0.8
    names.append((bottom, "mean over prompts"))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.5 + 0.26 * (bottom + 1)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axhline(y + 0.1, color=PALE, linewidth=1)
    gap = 0.5 / max(1, len(conditions))
    for i, condition in enumerate(conditions):
        style = _style(analysis, condition)
        shift = (i - (len(conditions) - 1) / 2) * gap
        mine = found[(found["condition"] == condition) & found["prompt_id"].isin(rows)]
        heights = mine["prompt_id"].map(rows).to_numpy(float) + shift
        _intervals(axes, mine, heights, style)
        pooled = _whole_effects(analysis, measure)
        pooled = pooled[pooled["condition"] == condition].rename(columns={"mean": "effect"})
        _intervals(axes, pooled, np.full(len(pooled), bottom + shift), style, condition, size=6.5)
    axes.set_yticks([y for y, _ in names], [name for _, name in names], parse_math=False)
    axes.set_ylim(bottom + 0.7, -0.7)
    axes.set_xlabel(DIFFERENCE[measure])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    over = " and ".join(dict.fromkeys(found["over"]))
    few = analysis.info["fewest_prompts"]["interval"]
    note = f"95% t-intervals: over the prompt's {over}, from {few} on; in the last row over prompts"
    if left_out > 0:
        note += f"\n{left_out} prompts in the middle of the order are left out"
    _title(axes, note)
    _open(axes, "x")
    _key(figure, len(conditions))
    return figure


def categories_figure(analysis: "Analysis", measure: str) -> "Figure | None":
    """Each prompt's effect by category, with the mean and, from three prompts on, its interval."""
    found = _of(analysis["intervals"], measure)
    if not len(found):
        return None
    conditions = _conditions(analysis, found)
    effects = _of(analysis["effects"], measure)
    cells = effects[effects["grouping"] == "by category"]
    categories = list(dict.fromkeys(_in_order(analysis, found)["category"]))

    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=0.8)
    width = 0.8 / max(1, len(conditions))
    for i, condition in enumerate(conditions):
        style = _style(analysis, condition)
        for place, category in enumerate(categories):
            middle = place + (i - (len(conditions) - 1) / 2) * width
            mine = found[(found["condition"] == condition) & (found["category"] == category)]
            spread = np.linspace(-0.25, 0.05, len(mine)) if len(mine) > 1 else np.array([-0.1])
            axes.plot(
                middle + width * spread,
                mine["effect"],
                style["marker"],
                color=style["color"],
                markersize=4,
                alpha=0.6,
                markeredgewidth=0,
            )
            cell = cells[(cells["condition"] == condition) & (cells["category"] == category)]
            if len(cell) and np.isfinite(cell["mean"].iloc[0]):
                across = middle + 0.24 * width
                _bar(axes, across, cell.iloc[0], style["color"], 0.12 * width)
        axes.plot([], [], style["marker"], color=style["color"], label=condition)
    counts = found.groupby("category")["prompt_id"].nunique()
    names = [f"{category}\n{counts[category]} prompts" for category in categories]
    axes.set_xticks(range(len(categories)), names, parse_math=False)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_ylabel(DIFFERENCE[measure])
    few = analysis.info["fewest_prompts"]["interval"]
    _title(axes, f"points: prompts; lines: means, with 95% t-intervals from {few} prompts")
    _open(axes, "y")
    _key(figure, len(conditions))
    return figure


def distances_figure(analysis: "Analysis", measure: str) -> "Figure | None":
    """Attention to matched siblings and their controls by distance, a panel for each condition.

    It is always by token.
    """
    found = analysis["distances"]
    if not len(found):
        return None
    conditions = _conditions(analysis, found)
    figure, panels = _panels(len(conditions), 3.0, share=True)
    for axes, condition in zip(panels, conditions, strict=True):
        mine = found[found["condition"] == condition].sort_values("distance")
        siblings, controls = _style(analysis, condition), {"color": GREY, "marker": "x"}
        for name, style in (("siblings", siblings), ("controls", controls)):
            _band(axes, mine["distance"], mine, name, style, name)
        _title(axes, cut(condition, TITLE_ROOM))
        axes.set_xlabel("distance from the query, in steps")
        _whole(axes.xaxis)
        _open(axes, "both")
    # Set after drawing, since the panels share the axis. Attention is never below 0.
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("attention of one token; bands: 95% t-intervals", size=7)
    _key(figure, 2, panels[0])
    return figure


def kl_figure(analysis: "Analysis", measure: str) -> "Figure | None":
    """Divergence of two conditions' next distributions over the steps, a panel for each pair."""
    found = analysis["kl"]
    if not len(found):
        return None
    pairs = list(dict.fromkeys(zip(found["condition_a"], found["condition_b"], strict=True)))
    figure, panels = _panels(len(pairs), 3.0, share=True)
    for axes, (first, second) in zip(panels, pairs, strict=True):
        mine = found[(found["condition_a"] == first) & (found["condition_b"] == second)]
        mine = mine.sort_values("step")
        a, b = cut(first, CONDITION_ROOM), cut(second, CONDITION_ROOM)
        for name, label, condition in (
            ("kl_ab", f"KL({a} ‖ {b})", first),
            ("kl_ba", f"KL({b} ‖ {a})", second),
        ):
            # Of the condition whose distribution the divergence is an average over.
            _band(axes, mine["step"], mine, name, _style(analysis, condition), label)
        axes.set_xlabel("step (after step 0 the sets may differ)")
        axes.legend(frameon=False, loc="upper left", labelcolor=INK)
        _whole(axes.xaxis)
        _open(axes, "both")
    # Divergences are never below 0; this leaves room for markers at 0.
    panels[0].set_ylim(bottom=-0.02 * panels[0].get_ylim()[1])
    panels[0].set_ylabel("nats; bands: 95% t-intervals over prompts", size=7)
    return figure


#: Names of files, and the functions that draw them.
PICTURES: dict[str, Callable[["Analysis", str], "Figure | None"]] = {
    "heads": heads_figure,
    "prompts": prompts_figure,
    "categories": categories_figure,
    "distances": distances_figure,
    "kl": kl_figure,
}


def _of(table: "DataFrame", measure: str) -> "DataFrame":
    return table[table["measure"] == measure]


def _in_order(analysis: "Analysis", table: "DataFrame") -> "DataFrame":
    """The runs of the table's prompts, in the order of the suite."""
    runs = analysis["runs"]
    return runs[runs["prompt_id"].isin(table["prompt_id"])]


def _conditions(analysis: "Analysis", table: "DataFrame") -> list[str]:
    there = set(table["condition"])
    return [condition for condition in analysis.info["conditions"] if condition in there]


def _whole_effects(analysis: "Analysis", measure: str) -> "DataFrame":
    effects = _of(analysis["effects"], measure)
    return effects[(effects["grouping"] == "overall") & effects["mean"].notna()]


def _style(analysis: "Analysis", condition: str) -> dict[str, Any]:
    i = list(analysis.info["conditions"]).index(condition)
    return {"color": COMPARED[i % len(COMPARED)], "marker": MARKS[i % len(MARKS)]}


def _panels(count: int, height: float, share: bool = False) -> tuple["Figure", list[Any]]:
    """A figure and its panels."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    width = WIDTH if columns > 1 else 0.65 * WIDTH
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share).ravel()
    for spare in grid[count:]:
        spare.set_axis_off()
    return figure, list(grid[:count])


def _intervals(
    axes: Any,
    rows: "DataFrame",
    heights: np.ndarray,
    style: dict[str, Any],
    label: str | None = None,
    size: float = 4.5,
) -> None:
    """Draw effects as markers, with lines for intervals."""
    axes.hlines(heights, rows["low"], rows["high"], color=style["color"], linewidth=1.2)
    axes.plot(rows["effect"], heights, style["marker"], ms=size, color=style["color"], label=label)


def _bar(axes: Any, x: float, cell: Any, colour: str, half: float) -> None:
    axes.hlines(cell["mean"], x - half, x + half, color=colour, linewidth=2)
    if np.isfinite(cell["low"]):
        axes.vlines(x, cell["low"], cell["high"], color=colour, linewidth=1.2)


def _band(
    axes: Any, x: Any, rows: "DataFrame", name: str, style: dict[str, Any], label: str
) -> None:
    """Draw means as a line and their intervals as a band."""
    axes.plot(x, rows[name], "-", ms=3.5, linewidth=1.4, label=label, **style)
    low, high = rows[f"{name}_low"], rows[f"{name}_high"]
    axes.fill_between(x, low, high, color=style["color"], alpha=FAINT, linewidth=0)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, size=8.5, parse_math=False)


def _key(figure: "Figure", columns: int, axes: Any = None) -> None:
    """Draw one legend for all panels, below them."""
    handles, labels = (axes or figure.axes[0]).get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, max(1, columns)),
        frameon=False,
        labelcolor=INK,
    )


def _open(axes: Any, grid: str) -> None:
    axes.grid(color=PALE, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
