"""How a threshold moves over a run: the fraction f(t) of the way at t = step / total steps."""

import re
from dataclasses import dataclass, fields
from typing import Protocol

from ..arguments import check_range, check_text, shown
from ..errors import TempoError


class Schedule(Protocol):
    """A fraction in [0, 1] for each time t in [0, 1]."""

    def __call__(self, t: float) -> float:
        """The fraction at t in [0, 1]."""
        ...


@dataclass(frozen=True)
class Constant:
    """f(t) = 1: the threshold is the same at every step."""

    def __call__(self, t: float) -> float:
        return 1.0

    def __str__(self) -> str:
        return "constant"


@dataclass(frozen=True)
class Bezier:
    """f(t) = 3 t (1-t)^2 p1 + 3 t^2 (1-t) p2 + t^3, the cubic Bezier with endpoints 0 and 1.

    Args:
        p1, p2: heights of the inner control points, in [0, 1]; monotone if p1 <= p2.

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
        return f"bezier({_written(self.p1)},{_written(self.p2)})"


@dataclass(frozen=True)
class Relu:
    """f(t) = max(0, t - activation) / (1 - activation): 0 at first, then linear.

    Args:
        activation: the time at which it starts to rise, in [0, 1).
    """

    activation: float = 0.5

    def __post_init__(self) -> None:
        check_range("activation", self.activation, 0.0, 1.0)
        if self.activation == 1.0:
            raise TempoError("activation must be in [0, 1), got 1.0")

    def __call__(self, t: float) -> float:
        return max(0.0, t - self.activation) / (1.0 - self.activation)

    def __str__(self) -> str:
        return f"relu({_written(self.activation)})"


#: Name -> schedule class; the class's fields are the numbers in parentheses.
SCHEDULES: dict[str, type] = {"constant": Constant, "bezier": Bezier, "relu": Relu}

#: The accepted forms of a schedule, for messages.
FORMS = "constant, bezier(p1,p2) with both in [0, 1], or relu(activation) with it in [0, 1)"

#: A number in parentheses; excludes NaN and infinity.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def parse_schedule(text: str) -> Schedule:
    """Parse a schedule such as ``constant``, ``bezier(0.2,0.8)`` or ``relu(0.5)``.

    Raises:
        TempoError: for an unknown name, the wrong number of arguments or one out of range.
    """
    check_text("schedule", text)
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    kind = SCHEDULES.get(match[1]) if match else None
    if match is None or kind is None:
        raise TempoError(f"schedule must be {FORMS}, got {shown(text)}")
    parts = [] if match[2] is None else [part.strip() for part in match[2].split(",")]
    numbers = all(NUMBER.fullmatch(part) for part in parts)
    if not numbers or len(parts) != len(fields(kind)):
        raise TempoError(f"schedule must be {FORMS}, got {shown(text)}")
    try:
        made: Schedule = kind(*map(float, parts))
    except TempoError as error:
        raise TempoError(f"schedule {shown(text)}: {error}") from error
    return made


def interpolate(start: float, end: float, schedule: Schedule, step: int, total: int) -> float:
    """start + (end - start) f(step / total)."""
    return start + (end - start) * schedule(step / total)


def _written(number: float) -> str:
    """The shortest text that parses to the same number."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
