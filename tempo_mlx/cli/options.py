"""Options shared by several commands."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..arguments import MOST, check_count
from ..errors import TempoError
from ..io.files import STANDARD_OUTPUT


def output_file(text: str) -> Path:
    """The path of an output; "-" is standard output."""
    return STANDARD_OUTPUT if text == "-" else Path(text)


def flag_of(parameter: Any) -> str:
    """The long form of an option, for messages: "--rounds" for "-n" and "--rounds"."""
    return str(next(each for each in parameter.opts if each.startswith("--")))


def at_least(least: int, most: int = MOST) -> Callable[[typer.CallbackParam, int], int]:
    """A callback that checks before the command starts that an option is in [least, most]."""

    def check(parameter: typer.CallbackParam, value: int) -> int:
        check_count(flag_of(parameter), value, least, most)
        return value

    return check


Model = Annotated[
    str, typer.Option(help="Recipe name, folder in mlx-lm layout, or Hugging Face Hub id.")
]

AdapterPath = Annotated[
    str | None, typer.Option(help="Folder of trained adapter weights and their config.")
]

ExtraEosToken = Annotated[
    list[str] | None,
    typer.Option(help="Treat this token, its text or its id, as an end of text, too. Repeatable."),
]

TemplateConfig = Annotated[
    str | None,
    typer.Option(
        "--chat-template-config",
        metavar="JSON",
        help="Further arguments of the chat template, such as '{\"enable_thinking\": false}'.",
    ),
]


def _refuse_max_kv_size(value: int | None) -> None:
    if value is not None:
        raise TempoError(
            "--max-kv-size is not there: a cache that forgets its beginning is not the model that "
            "texts are scored by; --kv-bits 8 needs less memory and forgets nothing"
        )


#: An option of mlx-lm that users will try.
MaxKvSize = Annotated[
    int | None, typer.Option("--max-kv-size", hidden=True, callback=_refuse_max_kv_size)
]

Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace existing output files even if this command did not write them."
    ),
]

StartOfText = Annotated[
    str,
    typer.Option(
        "--start",
        metavar="auto|none|TEXT",
        help="Text before every context; by default the one that the model was trained with, such "
        "as <|endoftext|>.",
    ),
]

Separator = Annotated[
    str,
    typer.Option(
        help="Text between context and word; '' for Chinese, Japanese and Thai, and for contexts "
        "that end with their own separator."
    ),
]

KeepBlanks = Annotated[
    bool,
    typer.Option(
        "--keep-blanks",
        help="Keep blanks after a context and around a word; no separator is added next to them.",
    ),
]


#: Value of --start for no text.
NO_START = "none"


def start_of(given: str) -> str | None:
    """The text that --start asks for; None for none."""
    return None if given == NO_START else given
