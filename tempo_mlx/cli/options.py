"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Recipe name, folder in mlx-lm layout, or Hugging Face Hub id.")
]

PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", "-p", help="Tokens of the prompt, at least 1.")
]

Rounds = Annotated[
    int, typer.Option("--rounds", "-n", help="Runs of each variant that count, at least 1.")
]

Measurements = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the measurements as JSON.")
]
