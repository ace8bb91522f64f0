"""What is known of mlx-lm's architectures beyond what a model shows by itself."""

import mlx.nn as nn

#: Architectures that the sweep in tests/unit/test_architectures.py found exact.
EXACT: frozenset[str] = frozenset({"llama"})

#: Architectures refused although nothing fails when they run: file name -> reason.
REFUSED: dict[str, str] = {}


def refusal(model: nn.Module) -> str | None:
    """Why this model cannot hold parallel tokens exactly, or None."""
    architecture = type(model).__module__.removeprefix("mlx_lm.models.")
    if architecture in REFUSED:
        return REFUSED[architecture]
    for name, module in model.named_modules():
        if type(module).__name__ == "DynamicNTKScalingRoPE":
            return (
                f"{name} rescales its frequencies with the length of the sequence "
                "(dynamic NTK), so a position has no fixed rotation"
            )
    return None
