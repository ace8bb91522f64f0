"""The one prompt of a command, from where the user put it."""

from pathlib import Path

from ..arguments import check_text
from ..errors import TempoError
from ..io.inputs import HYPHEN, read_text

#: What the help says of files and standard input.
AS_IN_AN_EDITOR = "A byte order mark and one final newline, as editors write them, are left out."


def read_prompt(prompt: str | None, option: str | None, file: Path | None) -> str:
    """The prompt's text.

    Args:
        prompt: the argument; "-" stands for standard input.
        option: what --prompt says, the same.
        file: what --prompt-file says.

    Raises:
        TempoError: if there is none or more than one, it cannot be read, or is not Unicode text.
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
