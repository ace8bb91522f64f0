"""The files that a command writes: checked before its work starts, written at its end."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TempoError
from ..io.console import Console
from ..io.files import (
    STANDARD_ERROR,
    STANDARD_OUTPUT,
    check_writable,
    descriptor,
    replaceable,
    same_file,
    write_atomically,
)
from ..plots.figure import drawn
from ..text.printable import finite, json_text
from ..view.html import BEGINNING


@dataclass(frozen=True)
class Output:
    """A file that a command is to write.

    Args:
        argument: that names it, for messages.
        path: None where the user wants none.
        ours: whether a file that is there is an earlier output of the same command, which may be
            replaced; raises OSError if it cannot be read.
    """

    argument: str
    path: Path | None
    ours: Callable[[Path], bool] = lambda path: False


def check_outputs(
    outputs: Sequence[Output], inputs: Mapping[str, Path | None], overwrite: bool
) -> None:
    """Refuse to write where something would be lost.

    Args:
        outputs: of the command.
        inputs: its input files by argument; None where there is none.
        overwrite: whether files that this command did not write may be replaced.

    Raises:
        TempoError: if an output cannot be written, is an input, another output or a standard
            stream that goes into a file, or if it exists and this command did not write it; or
            if there is nothing to overwrite.
    """
    wanted = [(each, each.path) for each in outputs if each.path is not None]
    if overwrite and not wanted:
        names = " or ".join(dict.fromkeys(each.argument for each in outputs))
        raise TempoError(f"--overwrite has no effect without {names}; add that, or leave it out")
    read = [(name, path) for name, path in inputs.items() if path is not None]
    for i, (output, path) in enumerate(wanted):
        argument = output.argument
        check_writable(argument, path)
        others = [(each.argument, other) for each, other in wanted[:i]]
        if not path.is_char_device():
            others += read
        if replaceable(path):
            others += [("standard output", STANDARD_OUTPUT), ("standard error", STANDARD_ERROR)]
        for name, other in others:
            if same_file(path, other):
                raise TempoError(f"{argument} {path} is the same file as {name}; name another file")
        if not overwrite and _holds_something(path):
            try:
                ours = output.ours(path)
            except OSError as error:
                raise TempoError(f"{argument} {path} cannot be read: {error.strerror}") from error
            if not ours:
                raise TempoError(
                    f"{argument} {path} exists and this command did not write it; name another "
                    "file or add --overwrite"
                )


def _holds_something(path: Path) -> bool:
    return replaceable(path) and path.exists() and path.stat().st_size > 0


def is_standard_output(path: Path | None) -> bool:
    """Whether an output goes to standard output, where no other text may be mixed into it."""
    return path is not None and descriptor(path) == 1


def json_where(test: Callable[[dict[str, Any]], bool]) -> Callable[[Path], bool]:
    """Recognises files that hold one JSON object that passes the test."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return False
            try:
                data = json.loads(b"{" + file.read())
            except (ValueError, RecursionError):
                return False
        return isinstance(data, dict) and test(data)

    return ours


def beginning(*starts: bytes) -> Callable[[Path], bool]:
    """Recognises files by their first bytes, or fewer if a kill cut them short."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(max(map(len, starts)))
        return any(head.startswith(start) or start.startswith(head) for start in starts)

    return ours


def ending_with(mark: str) -> Callable[[Path], bool]:
    """Recognises files by their last characters."""
    return lambda path: path.read_bytes().endswith(mark.encode())


def picture(*kinds: str) -> Callable[[Path], bool]:
    """Recognises pictures of these kinds."""
    return lambda path: drawn(path.read_bytes(), kinds)


def check_page(path: Path) -> None:
    """Raise TempoError unless a page of :mod:`tempo_mlx.view` may have this name."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise TempoError(f"--html must end in .html, got {str(path)!r}")


#: Recognises pages of :mod:`tempo_mlx.view`.
PAGE = beginning(BEGINNING.encode())


class Written:
    """Writes the outputs of a command, each even if others fail, and says so.

    Args:
        notes: where it is said.
    """

    def __init__(self, notes: Console):
        self._notes = notes
        self._errors: list[OSError] = []

    @contextmanager
    def output(self, path: Path, what: str = "written") -> Iterator[None]:
        """Around what writes an output; an error waits for :meth:`finish`."""
        try:
            yield
        except OSError as error:
            self._errors.append(error)
        else:
            say_written(path, self._notes, what)

    def finish(self) -> None:
        """Raise the first error, if there was one."""
        if self._errors:
            raise self._errors[0]


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON; NaN and infinity, which JSON does not have, become null."""
    write_atomically(path, json_text(finite(data), indent=1) + "\n")


def say_written(path: Path, notes: Console, what: str = "written") -> None:
    """A note of what was written."""
    if not is_standard_output(path):
        notes.print(f"{what}: {path}", style="dim")
