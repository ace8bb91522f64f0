"""Entry point of the command line: ``tempo-mlx`` and ``python -m tempo_mlx``."""

from tempo_mlx.interrupts import leave_on_interrupt


def main() -> None:
    """Import the command line and run it."""
    with leave_on_interrupt():
        from tempo_mlx import cli

    cli.main()


if __name__ == "__main__":
    main()
