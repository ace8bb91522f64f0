"""Token texts as pictures show them: whitespace visible, nothing that a font cannot draw."""

import re
import unicodedata
from functools import cache

#: Families in order of preference. Matplotlib brings the first; the others know more scripts.
FONTS = ("DejaVu Sans", "Arial Unicode MS", "Noto Sans CJK JP", "Noto Sans CJK SC")

BEFORE_WORD = "·"
WHITESPACE = {"\n": "⏎", "\t": "⇥"}

#: What a tokenizer decodes bytes to that are only a part of a character.
PARTIAL = "\ufffd"

#: Characters of a label at most.
LONGEST = 24

#: Equal characters in a row that are counted instead.
REPEATED = re.compile(r"(.)\1{6,}")


def label(text: str, id: int) -> str:
    """A token's text for a picture: a point for the space before a word, signs for other space.

    Args:
        text: as the tokenizer decodes it.
        id: tells tokens apart whose texts do not.
    """
    word = text.removeprefix(" ")
    start = BEFORE_WORD if word != text and word[:1].strip() else ""
    visible = readable(word.replace(" ", "␣")) if start else readable(text.replace(" ", "␣"))
    visible = REPEATED.sub(lambda found: f"{found[1]}×{len(found[0])}", visible)
    if len(visible) > LONGEST:
        visible = visible[: LONGEST - 1] + "…"
    return f"{start}{visible}#{id}" if PARTIAL in text or not text else start + visible


def readable(text: str) -> str:
    """The text in one line, with escapes for what is invisible or in no font."""
    return "".join(_escape(WHITESPACE.get(character, character)) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    if character.isprintable() and code in _glyphs():
        # A mark that stands alone needs something to stand on.
        return f"◌{character}" if unicodedata.combining(character) else character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def installed(families: tuple[str, ...]) -> list[str]:
    """Those of the font families that are here."""
    from matplotlib.font_manager import fontManager

    here = {font.name for font in fontManager.ttflist}
    return [family for family in families if family in here]


@cache
def _glyphs() -> frozenset[int]:
    """The characters that our fonts can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    codes: set[int] = set()
    for family in installed(FONTS):
        codes.update(get_font(findfont(FontProperties(family=family))).get_charmap())
    return frozenset(codes)


@cache
def width(text: str, bold: bool = False) -> float:
    """Width of the text in our fonts, in multiples of the font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=installed(FONTS), size=100, weight="bold" if bold else "normal")
    measured, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return measured / 100
