"""What is measured, on what: the model's weights, the prompt, the machine."""

from importlib import metadata
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import blas
from ..arguments import check_count
from ..errors import TempoError
from ..models import PositionedModel

TEXT = (
    "The harbour was quiet when the boats came back. Nets lay along the wall, and the women who "
    "mended them talked about the weather, the price of fish, and a lighthouse that nobody had "
    "lit for years. A boy counted the gulls on the roof of the church and lost his place twice. "
)

#: Tokens of a prompt and steps of a run, and tokens of a step, that are measured at most.
MOST_TOKENS, MOST_WIDTH = 10**6, 4096


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all of them, a tied embedding table once.

    Of an embedding table that is no output layer, a step reads a few rows, which do not count. Of
    a mixture of experts all experts count, though a step of few tokens does not read all.
    """
    total = _nbytes(model)
    modules = model.modules()
    outputs = {
        module.weight.shape[0]
        for module in modules
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    for module in modules:
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            untied = module.weight.shape[0] in outputs
            total -= untied * _nbytes(module)
    return total


def _nbytes(module: nn.Module) -> int:
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))
    return sum(array.nbytes for _, array in parameters)


def prompt_of(tokenizer: Any, length: int) -> list[int]:
    """The first ``length`` token ids of a text that repeats."""
    ids = list(tokenizer.encode(TEXT))
    return (ids * -(-length // len(ids)))[:length]


def require_room(model: PositionedModel, prompt_tokens: int, steps: int) -> None:
    """Raise TempoError unless the model's context holds a prompt and the steps behind it."""
    check_count("prompt_tokens", prompt_tokens, most=MOST_TOKENS)
    length = model.context_length
    if length is not None and prompt_tokens + steps > length:
        raise TempoError(
            f"{prompt_tokens} prompt tokens and {steps} steps exceed the model's context of "
            f"{length}"
        )


def visibility_of_sets(model: PositionedModel) -> str:
    """Of sets that are measured: "isolated", or "recombined" where layers are recurrent."""
    return "recombined" if model.is_recurrent else "isolated"


def describe(
    model: PositionedModel, prompt_tokens: int | None, max_tokens: int | None, rounds: int
) -> dict[str, Any]:
    """Where and how it was measured; None is left out."""
    library = blas.info().library
    sizes = {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "rounds": rounds}
    return {
        "architecture": model.architecture,
        "dtype": model.precision,
        **{name: size for name, size in sizes.items() if size is not None},
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm")},
        "blas": str(library) if library is not None else "mlx's own",
    }
