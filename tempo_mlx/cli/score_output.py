"""Scored rows as text: on standard output, in a file, or as a table on a terminal."""

import json
import os
import re
from pathlib import Path
from typing import Any, Self

from rich.table import Table
from rich.text import Text

from ..io.console import Console
from ..io.files import Stream, write_atomically
from ..io.resumable_jsonl import ResultsFile
from ..text.printable import quoted, visible

#: A line of text: context, word, score, rank, and perhaps tokens.
LINE = re.compile(rb"[^\t\n]*\t[^\t\n]*\t(-?\d+\.\d{6}|-?inf|nan)\t\d+(\t\[.*\])?\n")


def text_lines(data: dict[str, Any]) -> str:
    """A record as lines of context, word, score, rank; and in JSON, if it has details, what the
    word's log-probability sums up.

    A row that could not be scored has no lines.
    """
    if "error" in data:
        return ""
    lines = []
    for i, word in enumerate(data["candidates"]):
        columns = [data["context"], word, f"{data['scores'][i]:.6f}", str(data["ranks"][i])]
        if "details" in data:
            columns.append(json.dumps(summands(data["details"][i]), ensure_ascii=False))
        lines.append("\t".join(columns) + "\n")
    return "".join(lines)


def summands(detail: dict[str, Any]) -> list[tuple[str, float]]:
    """What a word's log-probability sums up: its tokens, and "" for where it ends, if corrected."""
    parts = [(token["text"], token["logprob"]) for token in detail["tokens"]]
    return parts if detail["boundary"] is None else [*parts, ("", detail["boundary"])]


def is_text(path: Path) -> bool:
    """Whether a file holds nothing but such lines."""
    with path.open("rb") as file:
        return all(LINE.fullmatch(line) for line in file)


class TextStream(Stream):
    """Prints records as text."""

    def __init__(self, path: Path | None = None):
        super().__init__(path)
        self.done: set[int] = set()

    def add(self, row: int, data: dict[str, Any]) -> None:
        self.write(text_lines(data))


class TextFile:
    """Text that is written when all of it is there; until then, records wait in a file beside it.

    Args:
        path: of the text.
        keys, overwrite: as for :class:`ResultsFile`.
    """

    def __init__(self, path: Path, keys: list[str], overwrite: bool = False):
        # Whatever link leads to it, a file has one place where records wait.
        path = Path(os.path.realpath(path))
        self._path, self._total = path, len(keys)
        self._waiting_path = path.with_name(f".{path.name}.jsonl")
        self._waiting = ResultsFile(self._waiting_path, keys, overwrite)

    @property
    def done(self) -> set[int]:
        return self._waiting.done

    def add(self, row: int, data: dict[str, Any]) -> None:
        self._waiting.add(row, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        with self._waiting:
            if len(self.done) == self._total:
                with self._waiting_path.open(encoding="utf-8", newline="\n") as file:
                    records = sorted(map(json.loads, file), key=lambda record: record["row"])
                write_atomically(self._path, "".join(map(text_lines, records)))
                self._waiting_path.unlink()


class Tables:
    """Prints records as one table, at the end."""

    def __init__(self, console: Console):
        self.done: set[int] = set()
        self._console = console
        self._table = Table("context", "word")
        for name in ("score", "rank"):
            self._table.add_column(name, justify="right")

    def add(self, row: int, data: dict[str, Any]) -> None:
        if "error" in data:
            return
        if "details" in data and len(self._table.columns) == 4:
            self._table.add_column("tokens, nats")
        context = Text(visible(data["context"])) if data["context"] else Text("(empty)", "dim")
        ranks = data["ranks"]
        for i in sorted(range(len(ranks)), key=ranks.__getitem__):
            word = data["candidates"][i]
            cells = [
                context,
                Text(
                    visible(word if isinstance(word, str) else " / ".join(word)),
                    "bold green" if ranks[i] == 1 else "",
                ),
                Text(f"{data['scores'][i]:.3f}"),
                Text(str(ranks[i])),
            ]
            if "details" in data:
                parts = summands(data["details"][i])
                cells.append(Text(", ".join(f"{quoted(text)} {nats:.2f}" for text, nats in parts)))
            self._table.add_row(*cells)
            context = Text()
        if not ranks:
            self._table.add_row(context, Text("no candidates", "dim"))
        self._table.add_section()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._console.print(self._table)
