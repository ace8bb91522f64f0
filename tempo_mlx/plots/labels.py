"""Token texts as pictures show them: visible whitespace, and escapes for what no font can draw."""

import re
import unicodedata
from functools import cache, lru_cache

#: Families in order of preference. Matplotlib brings the first; the others know more scripts, those
#: of Chinese, Japanese and Korean among them, on macOS, Linux and Windows.
FAMILIES = (
    "DejaVu Sans",
    "Arial Unicode MS",
    "Hiragino Sans GB",
    "Apple SD Gothic Neo",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Malgun Gothic",
)

WEIGHTS = ("normal", "bold")

BEFORE_WORD = "·"
WHITESPACE = {"\n": "⏎", "\t": "⇥"}

#: What a label has in place of whitespace.
SIGNS = {*WHITESPACE.values(), "␣"}

#: What a tokenizer decodes bytes to that are only a part of a character.
PARTIAL = "\ufffd"

#: Characters of a label at most.
LONGEST = 24

#: Equal characters in a row that are counted instead.
REPEATED = re.compile(r"(.)\1{6,}", re.DOTALL)


def label(text: str, id: int) -> str:
    """A token's text for a picture: a dot for the space before a word, signs for other whitespace.

    Args:
        text: as the tokenizer decodes it.
        id: tells tokens apart whose texts do not.
    """
    word = text.removeprefix(" ")
    start = BEFORE_WORD if word != text and word[:1].strip() else ""
    short = REPEATED.sub(lambda run: f"{run[1]}×{len(run[0])}", word if start else text)
    # Not in the bytes of a part of a character, ⟨e4 bb⟩.
    visible = readable(re.sub(r" (?![^⟨]*⟩)", "␣", short))
    if unicodedata.combining(visible[:1] or " "):
        # A mark that stands alone needs something to stand on.
        visible = f"◌{visible}"
    if len(visible) > LONGEST:
        visible = visible[: LONGEST - 1] + "…"
    return f"{start}{visible}#{id}" if PARTIAL in text or not text else start + visible


def aside(label: str) -> str:
    """A label that stands alone or is struck through: in quotes if all of it is punctuation.

    A full stop next to a row of a mask, or a comma with a line through it, is easily missed.
    """
    marks = label.removeprefix(BEFORE_WORD)
    alone = bool(marks) and all(unicodedata.category(mark)[0] in "PS" for mark in marks)
    return f"“{label}”" if alone and marks not in SIGNS else label


def readable(text: str) -> str:
    """The text in one line, with escapes for what is invisible or in no font."""
    return "".join(_escape(WHITESPACE.get(character, character)) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    hidden = unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    if character.isprintable() and not hidden and code in _glyphs():
        return character
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@cache
def fonts() -> tuple[str, ...]:
    """The families of :data:`FAMILIES` that are installed, in that order."""
    from matplotlib.font_manager import fontManager

    here = {font.name for font in fontManager.ttflist}
    return tuple(family for family in FAMILIES if family in here)


@cache
def _glyphs() -> frozenset[int]:
    """The characters that our fonts can draw, both plain and bold."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    codes: set[int] = set()
    for family in fonts():
        files = [findfont(FontProperties(family=family, weight=weight)) for weight in WEIGHTS]
        codes.update(set.intersection(*(set(get_font(file).get_charmap()) for file in files)))
    return frozenset(codes)


@lru_cache(maxsize=4096)
def width(text: str, bold: bool = False) -> float:
    """Width of the text in our fonts, in multiples of the font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=list(fonts()), size=100, weight=WEIGHTS[bold])
    measured, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return measured / 100
