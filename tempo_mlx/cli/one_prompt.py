"""Read a command's prompt from an argument, an option, a file or standard input."""

from pathlib import Path

from ..arguments import check_text
from ..errors import TempoError
from ..io.inputs import HYPHEN, read_text

#: Help on files and standard input.
AS_IN_AN_EDITOR = "A byte order mark and one final newline are removed."


def read_prompt(prompt: str | None, option: str | None, file: Path | None) -> str:
    """The prompt's text.

    Args:
        prompt: the argument; "-" is standard input.
        option: value of --prompt, in the same form.
        file: value of --prompt-file.

    Raises:
        TempoError: unless exactly one is given, and it can be read and is Unicode text.
    """
    given = [each for each in (prompt, option, file) if each is not None]
    if len(given) != 1:
        raise TempoError("give one prompt: as the argument, '-' for standard input, or a file")
    (where,) = given
    if isinstance(where, Path):
        return read_text(where, "--prompt-file ")
    if where == HYPHEN:
        return read_text(where)
    check_text("the prompt", where)
    return where
