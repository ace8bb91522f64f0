"""Make text from a model, a file or a user safe to print.

Control characters can command the terminal: clear the screen, write to the clipboard (OSC 52) or
make a misleading link (OSC 8). Bidirectional controls reorder the text around them. Both are
replaced by symbols.
"""

import codecs
import json
import re
import unicodedata
from math import isfinite
from typing import Any

#: Characters that reorder the text around them.
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_SEPARATORS = "\u2028\u2029"
_CONTROL = "\x00-\x1f\x7f-\x9f"
_SURROGATES = "\ud800-\udfff"

_UNSAFE = re.compile(f"[{_CONTROL}{_BIDIRECTIONAL}{_SEPARATORS}{_SURROGATES}]")
_UNSAFE_RUNNING = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDIRECTIONAL}{_SEPARATORS}{_SURROGATES}]"
)
_BYTES = re.compile("[\udc80-\udcff]+")
_UNSAFE_JSON = re.compile(f"[\x7f-\x9f{_BIDIRECTIONAL}{_SEPARATORS}{_SURROGATES}]")

#: Symbols for the most common control characters.
_SYMBOLS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}


def visible(text: str) -> str:
    """The text on one line, with control characters, newlines and tabs shown as symbols."""
    return _UNSAFE.sub(_symbol, text)


def running(text: str) -> str:
    """The text with its newlines and tabs; other control characters are shown as symbols."""
    return _UNSAFE_RUNNING.sub(_symbol, text)


def quoted(text: str) -> str:
    """The text on one line, in quotes."""
    return f"'{visible(text)}'" if "'" not in text else f'"{visible(text)}"'


def spelled(raw: bytes) -> str:
    """UTF-8 as text; incomplete characters are shown as their bytes, ``⟨e4 bb⟩``."""
    # Surrogates mark the bytes; they cannot occur in the text itself.
    text = raw.decode(errors="surrogateescape")
    return _BYTES.sub(lambda run: f"⟨{run[0].encode(errors='surrogateescape').hex(' ')}⟩", text)


def unfinished(raw: bytes) -> int:
    """Number of bytes at the end that belong to an incomplete character, 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return len(decoder.getstate()[0])


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON with control characters escaped, so it is safe to print. Other characters stay readable.

    Raises:
        ValueError: for NaN and infinity, which JSON does not support.
    """
    text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)
    # These characters only occur in strings, where an escape is equivalent.
    return _UNSAFE_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def finite(data: Any) -> Any:
    """JSON-ready data with None for NaN and infinity, which JSON does not support."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data


def _symbol(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) == "Cs":
        return "\ufffd"
    return f"⟨U+{code:04X}⟩"
