"""How a threshold moves over a run: fractions f(t) of the way, t = step / total steps in [0, 1]."""

import re
from dataclasses import dataclass, fields
from typing import Protocol

from .arguments import check_range, check_text, shown
from .errors import TempoError


class Schedule(Protocol):
    """A fraction in [0, 1] for each moment of a run."""

    def __call__(self, t: float) -> float:
        """The fraction at t in [0, 1]."""
        ...


@dataclass(frozen=True)
class Constant:
    """f(t) = 1: the threshold is what it is from the first step on."""

    def __call__(self, t: float) -> float:
        return 1.0

    def __str__(self) -> str:
        return "constant"


@dataclass(frozen=True)
class Bezier:
    """f(t) = 3 t (1-t)^2 p1 + 3 t^2 (1-t) p2 + t^3, the cubic Bezier with endpoints 0 and 1.

    Args:
        p1, p2: heights of the inner control points, in [0, 1]; p1 <= p2 never falls.

    Source: Bernstein form of a cubic with control values 0, p1, p2, 1.
    """

    p1: float = 0.2
    p2: float = 0.8

    def __post_init__(self) -> None:
        for name, value in (("p1", self.p1), ("p2", self.p2)):
            check_range(name, value, 0.0, 1.0)

    def __call__(self, t: float) -> float:
        u = 1.0 - t
        return 3 * t * u * u * self.p1 + 3 * t * t * u * self.p2 + t * t * t

    def __str__(self) -> str:
        return f"bezier({self.p1:g},{self.p2:g})"


@dataclass(frozen=True)
class Relu:
    """f(t) = max(0, t - activation) / (1 - activation): nothing at first, then linear.

    Args:
        activation: the moment at which it starts to rise, in [0, 1).
    """

    activation: float = 0.5

    def __post_init__(self) -> None:
        check_range("activation", self.activation, 0.0, 1.0)
        if self.activation == 1.0:
            raise TempoError("activation must be in [0, 1), got 1.0")

    def __call__(self, t: float) -> float:
        return max(0.0, t - self.activation) / (1.0 - self.activation)

    def __str__(self) -> str:
        return f"relu({self.activation:g})"


#: Name -> schedule class; the classes' fields are the arguments in parentheses.
SCHEDULES: dict[str, type] = {"constant": Constant, "bezier": Bezier, "relu": Relu}


def parse_schedule(text: str) -> Schedule:
    """The schedule written as ``constant``, ``bezier(0.2,0.8)`` or ``relu(0.5)``.

    Raises:
        TempoError: for an unknown name, a wrong number of arguments or one out of range.
    """
    check_text("schedule", text)
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    if match is None or match[1] not in SCHEDULES:
        raise TempoError(
            f"schedule must be constant, bezier(p1,p2) or relu(activation), got {shown(text)}"
        )
    kind = SCHEDULES[match[1]]
    try:
        inside = (match[2] or "").strip()
        values = [float(part) for part in inside.split(",")] if inside else []
    except ValueError as error:
        raise TempoError(f"schedule {shown(text)}: {error}") from error
    if len(values) > len(fields(kind)):
        raise TempoError(f"schedule {shown(text)} has a wrong number of arguments")
    try:
        return kind(*values)
    except TempoError as error:
        raise TempoError(f"schedule {shown(text)}: {error}") from error


def interpolate(start: float, end: float, schedule: Schedule, step: int, total: int) -> float:
    """start + (end - start) f(step / total)."""
    return start + (end - start) * schedule(step / total)
