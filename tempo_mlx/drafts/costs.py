"""What a pass over several tokens costs beside a pass over one, measured on this device."""

import hashlib
import json
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream

from .. import blas
from ..errors import TempoError
from ..io.files import write_atomically
from ..models import PositionedModel
from ..weights.recipes import cache_folder

#: Tokens of the passes that are timed.
SIZES = (1, 2, 4, 8, 16)

#: Passes of each size that count; a first one warms up.
ROUNDS = 4

#: Tokens that are read before.
CONTEXT = 64

#: Seconds after which no further round begins, once there are two.
MOST_SECONDS = 1.5

#: Costs of the models of this process.
_known: "weakref.WeakKeyDictionary[PositionedModel, PassCosts]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class PassCosts:
    """Time of a pass by its tokens.

    Args:
        sizes: tokens, ascending, the first one 1.
        seconds: of a pass over so many tokens, each.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        """Time of a pass over so many tokens, over that of a pass over one.

        Interpolated between the sizes; beyond them as the last two go on. It never falls: what was
        measured so is noise.
        """
        costs = np.maximum.accumulate(np.array(self.seconds) / self.seconds[0])
        if tokens <= self.sizes[-1]:
            return float(np.interp(tokens, self.sizes, costs))
        slope = (costs[-1] - costs[-2]) / (self.sizes[-1] - self.sizes[-2])
        return float(costs[-1] + slope * (tokens - self.sizes[-1]))


def pass_costs(model: PositionedModel) -> PassCosts:
    """The costs of a model on this device: known, read from the user's cache, or measured now."""
    if model not in _known:
        _known[model] = known_costs(model) or _measured(model)
    return _known[model]


def known_costs(model: PositionedModel) -> PassCosts | None:
    """What was measured earlier, in this process or another one; None if nothing was."""
    if model in _known:
        return _known[model]
    try:
        found = json.loads(_file(model).read_bytes())
        return PassCosts(tuple(found["sizes"]), tuple(found["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        # A file that is missing or damaged is measured again.
        return None


def measured_costs() -> list[tuple[dict[str, str], PassCosts]]:
    """All that is kept of earlier measurements: of what on what, and the costs."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(file.read_bytes())
            costs = PassCosts(tuple(data.pop("sizes")), tuple(data.pop("seconds")))
            found.append((data, costs))
    return found


def measure(model: PositionedModel, sizes: Sequence[int] = SIZES) -> PassCosts:
    """Time passes over so many tokens, by turns: about a second and a half at most."""
    with mx.stream(generation_stream):
        cache = model.make_cache(1)
        context = mx.zeros((1, CONTEXT), mx.int32)
        mx.eval(model(context, np.arange(CONTEXT)[None], "causal", cache), cache.state)
        taken: dict[int, list[float]] = {size: [] for size in sizes}
        began = time.perf_counter()
        for turn in range(ROUNDS + 1):
            for size in sizes:
                start = time.perf_counter()
                positions = np.arange(CONTEXT, CONTEXT + size)[None]
                logits = model(mx.zeros((1, size), mx.int32), positions, "causal", cache)
                mx.eval(mx.argmax(logits, axis=-1), cache.state)
                taken[size].append(time.perf_counter() - start)
                cache.truncate(CONTEXT)
            if turn >= 2 and time.perf_counter() - began > MOST_SECONDS:
                break
    # The fastest one: whatever else the machine does makes passes slower, never faster.
    return PassCosts(tuple(sizes), tuple(min(each[1:]) for each in taken.values()))


def _measured(model: PositionedModel) -> PassCosts:
    costs = measure(model)
    if model.name is not None:
        # A model that no name finds again is measured again.
        data = {"sizes": costs.sizes, "seconds": costs.seconds, **_identity(model)}
        file = _file(model)
        # Where the cache cannot be written, the next process measures again.
        with suppress(OSError, TempoError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(data, indent=1) + "\n")
    return costs


def _identity(model: PositionedModel) -> dict[str, str]:
    """What the time of a pass depends on: shapes and types, not the values of weights."""
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.model.parameters()))
    shapes = sorted([name, array.shape, str(array.dtype)] for name, array in flat)
    return {
        "architecture": model.architecture,
        "precision": model.precision,
        "parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "mlx": metadata.version("mlx"),
        "blas": str(blas.info().library or "mlx's own"),
    }


def _file(model: PositionedModel) -> Path:
    digest = hashlib.sha256(json.dumps(_identity(model)).encode()).hexdigest()[:16]
    return _folder() / f"{digest}.json"


def _folder() -> Path:
    return cache_folder() / "pass-costs"
