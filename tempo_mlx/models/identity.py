"""What makes two loaded models the same: their parameters, to the bit."""

import hashlib
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

#: Unsigned type of each width in bytes, to look at parameters as integers.
_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

_ATTRIBUTE = "_tempo_mlx_fingerprint"


def fingerprint(model: nn.Module) -> str:
    """A hexadecimal number of the model's architecture and all its parameters, 32 digits.

    Every parameter counts by its name, shape, type, and a sum of its bits in which each place has
    a factor of its own, modulo 2^32: integers, so the same on every device. Computed once; a
    model whose parameters are changed afterwards keeps its number.
    """
    known = getattr(model, _ATTRIBUTE, None)
    if known is None:
        digest = hashlib.sha256(type(model).__module__.encode())
        parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
        for name, parameter in sorted(parameters):
            total = int(_checksum(parameter))
            digest.update(f"{name} {parameter.shape} {parameter.dtype} {total}\n".encode())
        known = digest.hexdigest()[:32]
        object.__setattr__(model, _ATTRIBUTE, known)
    return str(known)


def _checksum(parameter: mx.array) -> mx.array:
    words = parameter.reshape(-1).view(_WORDS[min(parameter.dtype.size, 4)]).astype(mx.uint32)
    places = mx.arange(words.size, dtype=mx.uint32) * 2 + 1
    return (words * places * mx.array(2654435761, mx.uint32)).sum()
