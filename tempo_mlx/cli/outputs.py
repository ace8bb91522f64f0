"""A command's output files: checked before its work starts, written at its end."""

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
    """An output file of a command.

    Args:
        argument: that names it, for messages.
        path: None if the output is not requested.
        ours: whether an existing file is an earlier output of the same command, which may be
            replaced; raises OSError if the file cannot be read.
    """

    argument: str
    path: Path | None
    ours: Callable[[Path], bool] = lambda path: False


def check_outputs(
    outputs: Sequence[Output], inputs: Mapping[str, Path | None], overwrite: bool
) -> None:
    """Refuse outputs that would destroy something.

    Args:
        outputs: of the command.
        inputs: its input files by argument; None for those not given.
        overwrite: whether files that this command did not write may be replaced.

    Raises:
        TempoError: if an output cannot be written; if it is also an input, another output, or the
            target of a redirected standard stream; if it exists and this command did not write it;
            or if ``overwrite`` has no effect.
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
    """Whether an output is standard output, so nothing else may be printed there."""
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
    """Recognises files by their first bytes, or fewer if the file was cut short."""

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
    """Writes all outputs of a command even if some fail, and prints a note for each.

    Args:
        notes: console for the notes.
    """

    def __init__(self, notes: Console):
        self._notes = notes
        self._errors: list[OSError] = []

    @contextmanager
    def output(self, path: Path, what: str = "written") -> Iterator[None]:
        """Context for writing an output; an error is postponed until :meth:`finish`."""
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
