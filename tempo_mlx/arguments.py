"""Argument checks whose messages give the name, the value and what is allowed."""

import re
from collections.abc import Collection
from fractions import Fraction
from reprlib import Repr
from typing import Any

from .errors import TempoError

#: Largest count accepted by default; mlx uses int32.
MOST = 2**31 - 1

#: Largest number of bytes accepted.
MOST_BYTES = 2**63 - 1

UNITS = {"": 1} | {letter: 10 ** (3 * n) for n, letter in enumerate("kmgt", 1)}
UNITS |= {f"{letter}i": 2 ** (10 * n) for n, letter in enumerate("kmgt", 1)}

_repr = Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 10


def check_count(name: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raise TempoError unless the value is an integer in [least, most]."""
    if type(value) is not int:
        raise TempoError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    if value < least:
        raise TempoError(f"{name} must be at least {least}, got {shown(value)}")
    if value > most:
        raise TempoError(f"{name} must be at most {most}, got {shown(value)}")


def check_seed(value: Any) -> None:
    """Raise TempoError unless the value is a seed, an integer in [0, 2^63)."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise TempoError(f"seed must be in [0, 2^63), an integer, got {shown(value)}")


def check_range(
    name: str, value: Any, low: float, high: float, low_open: bool = False, words: str = ""
) -> None:
    """Raise TempoError unless the value is a number in [low, high], or (low, high].

    Args:
        words: text before the range in the message, such as "above 0, ".
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value <= high if low_open else low <= value <= high):
        kind = words if number else "a number "
        allowed = f"{'(' if low_open else '['}{low:g}, {high:g}]"
        raise TempoError(f"{name} must be {kind}in {allowed}, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise TempoError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise TempoError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def check_text(name: str, value: Any) -> None:
    """Raise TempoError unless the value is a text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise TempoError(f"{name} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TempoError(
            f"{name} is not Unicode text: character {error.start + 1} is half a surrogate pair, "
            "as left by decoding bytes that are not UTF-8"
        ) from error


def shown(value: Any) -> str:
    """A value's repr on one line, cut in the middle if it is long."""
    try:
        return " ".join(_repr.repr(value).split())
    except ValueError:
        return "an integer of thousands of digits"


def parse_bytes(text: str, argument: str = "--max-kv-bytes") -> int:
    """Parse a size such as 800M, 2GB or 1.5GiB into bytes.

    Raises:
        ValueError: if the text is not a size in [1, 2^63) bytes.
    """
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)([a-z]*?)b?", text.strip().lower(), re.ASCII)
    size = int(Fraction(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if not 1 <= size <= MOST_BYTES:
        raise TempoError(f"{argument} must be a size such as 800MB or 2GiB, got {shown(text)}")
    return size
