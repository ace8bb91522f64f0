"""A picture of a schedule: the threshold over the steps of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..rules.schedules import Bezier, Relu, Schedule
from .figure import BLUE, GREY, INK, PALE, check_plot, look, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Runs up to this long have a dot for each step.
DOTTED = 60


def plot_schedule(schedule: Schedule, total_steps: int, base: float, path: Path) -> None:
    """Draw base x f(step / total_steps) and save it as SVG, PNG or PDF.

    Args:
        schedule: f.
        total_steps: steps of the run, at least 1.
        base: the threshold where f is 1.
        path: the file; its ending names the format.

    Raises:
        ValueError: for a path that cannot be written or has another ending.
        ImportError: if Matplotlib is missing.
    """
    check_plot(path)
    with look():
        save(schedule_figure(schedule, total_steps, base), path, "schedule")


def control_points(schedule: Schedule) -> list[tuple[float, float]]:
    """The points (t, f) that shape the curve, if any."""
    if isinstance(schedule, Bezier):
        # A cubic whose times are spaced evenly runs through t evenly.
        return [(0.0, 0.0), (1 / 3, schedule.p1), (2 / 3, schedule.p2), (1.0, 1.0)]
    if isinstance(schedule, Relu):
        return [(0.0, 0.0), (schedule.activation, 0.0), (1.0, 1.0)]
    return []


def schedule_figure(schedule: Schedule, total_steps: int, base: float) -> "Figure":
    """The figure that :func:`plot_schedule` saves, made inside :func:`~.figure.look`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(
        xlim=(0, total_steps), ylim=(-0.08 * base, 1.08 * base), xlabel="step", ylabel="threshold"
    )
    moments = np.linspace(0, 1, 401)
    axes.plot(moments * total_steps, [base * schedule(t) for t in moments], color=BLUE, linewidth=2)
    if total_steps <= DOTTED:
        steps = range(total_steps + 1)
        heights = [base * schedule(step / total_steps) for step in steps]
        axes.plot(steps, heights, "o", color=BLUE, markersize=3, clip_on=False, gid="steps")
    points = [(t * total_steps, base * f) for t, f in control_points(schedule)]
    if points:
        axes.plot(*zip(*points, strict=True), "--", color=GREY, linewidth=1, zorder=1)
    for i, (t, f) in enumerate(control_points(schedule)[1:-1], start=1):
        point = (t * total_steps, base * f)
        axes.plot(*[[value] for value in point], "s", color=GREY, markersize=5, gid="control")
        name = f"p{i} = {f:g}" if isinstance(schedule, Bezier) else f"activation {t:g}"
        # On the side where the curve is not.
        above = f >= schedule(t)
        axes.annotate(
            name,
            point,
            (-5, 3) if above else (5, -3),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            color=INK,
        )
    axes.grid(color=PALE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"threshold = {base:g} × {schedule}, {total_steps} steps", loc="left", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(color=GREY)
    return figure
