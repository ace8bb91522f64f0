"""Options that several commands have."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import TempoError


def flag_of(parameter: Any) -> str:
    """An option as messages name it: "--rounds" of "-n" and "--rounds"."""
    return str(next(each for each in parameter.opts if each.startswith("--")))


def at_least(least: int) -> Callable[[typer.CallbackParam, int], int]:
    """A check of an option's number, made before the command begins."""

    def check(parameter: typer.CallbackParam, value: int) -> int:
        if value < least:
            raise TempoError(f"{flag_of(parameter)} must be at least {least}, got {value}")
        return value

    return check


Model = Annotated[
    str, typer.Option(help="Recipe name, folder in mlx-lm layout, or Hugging Face Hub id.")
]

PromptTokens = Annotated[
    int,
    typer.Option(
        "--prompt-tokens", "-p", callback=at_least(1), help="Tokens of the prompt, at least 1."
    ),
]

Rounds = Annotated[
    int,
    typer.Option(
        "--rounds", "-n", callback=at_least(1), help="Runs of each variant that count, at least 1."
    ),
]

Measurements = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the measurements as JSON.")
]
