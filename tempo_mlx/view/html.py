"""HTML around the view's module and the data of one run."""

import json
from html import escape
from pathlib import Path
from typing import Any

from ..text.printable import finite, running, visible

#: The ES module that draws; it exports ``render(element, data, actions)``.
MODULE = Path(__file__).parent / "view.js"

#: How every page begins, by which a page that was written here is recognised.
BEGINNING = "<!doctype html>\n<!-- tempo-mlx view -->\n"

_CLASS = "tempo-mlx-view"

#: Draws what has not been drawn: where several snippets stand on one page, each only once.
_START = f"""
for (const element of document.querySelectorAll(".{_CLASS}:not([data-drawn])")) {{
  element.dataset.drawn = "yes";
  render(element, JSON.parse(element.querySelector("script").textContent));
}}
"""


def snippet(data: dict[str, Any], fallback: str) -> str:
    """HTML that draws a run or a search in the page that it is put into.

    Args:
        data: as :meth:`GenerationResult.to_dict` or :meth:`SearchResult.to_dict` gives it; a run's
            needs only ``steps``.
        fallback: the text that is shown where scripts do not run.

    Returns:
        HTML in ASCII: it means the same in every encoding.
    """
    # In a script element nothing ends a string but "</script": no "<" is left in it.
    text = json.dumps(finite(data)).replace("<", "\\u003c")
    shown = escape(running(fallback)).encode("ascii", "xmlcharrefreplace").decode()
    module = MODULE.read_text(encoding="utf-8")
    return (
        f'<div class="{_CLASS}">'
        f'<pre style="white-space: pre-wrap">{shown}</pre>'
        f'<script type="application/json">{text}</script></div>\n'
        f'<script type="module">\n{_ascii(module)}{_START}</script>\n'
    )


def page(data: dict[str, Any], fallback: str) -> str:
    """A page of its own around :func:`snippet`, for a file."""
    title = escape(visible(str(data.get("prompt", "tempo-mlx"))[:80]))
    title = title.encode("ascii", "xmlcharrefreplace").decode()
    return (
        f'{BEGINNING}<html lang="und"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title></head>\n<body>\n{snippet(data, fallback)}</body></html>\n"
    )


def _ascii(module: str) -> str:
    """The module with escapes for its few other characters, which stand in strings and comments."""
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" for c in module)
