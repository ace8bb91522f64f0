"""The commands and Python code of README.md and docs/*.md, as tests read them.

A fence ``sh`` holds commands, which run in order in one folder for each page; ``text`` behind it is
their output, in which a line ``...`` stands for any lines. A fence ``python`` continues the
Python of the page. ``<!-- not run: reason -->`` before a fence says why it does not run; lines
``pip install`` do not, since they need a network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: docs/extending.md has a test of its own, which runs its files, too.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "extending.md"),
]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass
class Block:
    """A fence of a page.

    Args:
        kind: "sh", "python" or "text".
        text: what it holds.
        reason: why it does not run; None where it does.
        output: of commands, where the page shows it.
    """

    kind: str
    text: str
    reason: str | None = None
    output: str | None = None

    @property
    def commands(self) -> list[str]:
        """Its lines, those that go on joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The fences of a page that hold commands or Python, in order."""
    made: list[Block] = []
    commands, end = None, 0
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        block = Block(found["kind"], found["text"], found["reason"])
        if block.kind == "text" and commands is not None and not text[end : found.start()].strip():
            commands.output = block.text
        end, commands = found.end(), block if block.kind == "sh" else None
        if block.kind in ("sh", "python"):
            made.append(block)
    return made


def differences(shown: str, printed: str) -> str | None:
    """What differs between a page's output and a command's, decimals up to rounding; or None."""
    expected, found = shown.splitlines(), printed.splitlines()
    for i, line in enumerate(expected):
        if line == "...":
            return None
        if i >= len(found) or not _alike(line, found[i]):
            return f"the page has {line!r}, printed was {found[i] if i < len(found) else None!r}"
    return None if len(found) == len(expected) else f"printed was more: {found[len(expected)]!r}"


def _alike(shown: str, printed: str) -> bool:
    if _NUMBER.sub("0", shown) != _NUMBER.sub("0", printed):
        return False
    numbers = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= 0.002 * max(1, abs(float(a))) for a, b in numbers)
