"""``python -m tempo_mlx``."""

from .cli import main

main()
