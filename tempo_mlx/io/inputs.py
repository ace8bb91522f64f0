"""Reading users' files and standard input: with a size limit, decoded, parsed as JSON."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import TempoError

#: Most bytes of one prompt and of a file of rows, so an endless input is not read forever.
PROMPT_BYTES = 16 * 2**20
ROWS_BYTES = 256 * 2**20

#: Most levels of nested lists and objects in a line of JSON.
LEVELS = 100

#: Stands for standard input in place of a file's name.
HYPHEN = "-"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def name_of(file: str | Path) -> str:
    """The name of a file in messages."""
    return "standard input" if file == HYPHEN else str(file)


def read_bytes(file: str | Path, most: int, option: str = "") -> bytes:
    """All bytes of a file, or of standard input ("-"), without a byte order mark.

    Args:
        file: its name.
        most: bytes.
        option: text before the name in messages, such as "--prompt-file ".

    Raises:
        TempoError: if it cannot be read or has more than ``most`` bytes.
    """
    name = option + name_of(file)
    try:
        data = _standard_input(most + 1) if file == HYPHEN else _file(Path(file), most + 1)
    except OSError as error:
        raise TempoError(f"{name} cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise TempoError(f"{name} has more than {most // 2**20} MiB; give it in smaller parts")
    return data.removeprefix(BYTE_ORDER_MARK)


def read_text(file: str | Path, option: str = "") -> str:
    """The text of a file or of standard input, as an editor shows it.

    A byte order mark and one final newline are removed.

    Raises:
        TempoError: if it cannot be read, is too long or not UTF-8.
    """
    data = read_bytes(file, PROMPT_BYTES, option)
    try:
        text = text_of(data)
    except TempoError as error:
        raise TempoError(f"{option}{name_of(file)} is {error}") from error
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def read_lines(file: str | Path) -> list[tuple[int, bytes]]:
    """The lines of a file or of standard input that are not blank, and their numbers from 1.

    Raises:
        TempoError: if it cannot be read, is too long, or has no such line.
    """
    # Split as bytes: str.splitlines also splits at other characters.
    lines = read_bytes(file, ROWS_BYTES).splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def text_of(data: bytes) -> str:
    """Bytes decoded as UTF-8; TempoError if they are not."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TempoError("not UTF-8 text") from error


def object_of(line: bytes, example: str) -> dict[str, Any]:
    """Parse a line as a strict JSON object: unique keys and finite numbers.

    Args:
        line: in UTF-8.
        example: of such an object, for the message.

    Raises:
        TempoError: if the line is anything else.
    """
    text = text_of(line)
    try:
        given = json.loads(
            text, object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_no_number
        )
        if not isinstance(given, dict):
            raise TempoError(f"not a JSON object such as {example}")
        _require_shallow(given)
        json.dumps(given, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise TempoError(f"not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise TempoError(r"half a surrogate pair (\ud800 to \udfff), which is not text") from error
    except TempoError:
        raise
    except (ValueError, RecursionError) as error:  # integers or nesting beyond Python's limits
        raise TempoError(f"not JSON that can be read: {error}") from error
    return given


def shown_json(value: Any, most: int = 80) -> str:
    """A value of a user's file for a message, as JSON cut to one line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # recursive lists, keys that are not strings
        return shown(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _file(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _standard_input(most: int) -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise TempoError("standard input is closed; give the text as an argument or a file")
    # Read bytes, because text decoding depends on the locale. A replacement may only have text.
    data = getattr(sys.stdin, "buffer", sys.stdin).read(most)
    return data.encode() if isinstance(data, str) else data


def _require_shallow(value: Any) -> None:
    """Raise TempoError if the nesting is so deep that writing it could fail."""
    level = [value]
    for _ in range(LEVELS):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [one for each in inside for one in each if isinstance(one, (dict, list))]
        if not level:
            return
    raise TempoError(f"lists and objects nested more than {LEVELS} levels deep")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise TempoError(f"the key {shown_json(twice)} occurs twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise TempoError(f"the number {text[:40]} is too large")
    return number


def _no_number(text: str) -> float:
    raise TempoError(f"{text} is not a number in JSON")
