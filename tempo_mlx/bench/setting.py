"""The subject of a bench: model, prompt and machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import blas
from ..errors import TempoError
from ..models import PositionedModel
from .timing import alternate

T = TypeVar("T")

TEXT = (
    "The harbour was quiet when the boats came back. Nets lay along the wall, and the women who "
    "mended them talked about the weather, the price of fish, and a lighthouse that nobody had "
    "lit for years. A boy counted the gulls on the roof of the church and lost his place twice. "
)

#: Limits: tokens of a prompt or steps of a run, tokens of a step, rounds.
MOST_TOKENS, MOST_WIDTH, MOST_ROUNDS = 10**6, 4096, 10_000


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads, counting a tied embedding table once.

    An embedding table that is not also the output layer is left out, because a step reads only a
    few of its rows. All experts of a mixture count, although a step of few tokens reads only some.
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
    """The first ``length`` token ids of a repeated text."""
    ids = list(tokenizer.encode(TEXT))
    return (ids * -(-length // len(ids)))[:length]


class Progress:
    """Progress of a bench; this base class reports nothing."""

    def expect(self, ticks: int) -> None:
        """Announce the number of measurements."""

    def tick(self, what: str) -> None:
        """Announce the next measurement."""


@dataclass(frozen=True)
class Subject:
    """The model that a bench measures, and how often.

    Args:
        model: to measure.
        tokenizer: mlx-lm's tokenizer wrapper.
        name: of the model, as given to ``load``.
        rounds: measured runs of each variant, at least 1; one more warms up.
        progress: reports what is measured.
    """

    model: PositionedModel
    tokenizer: Any
    name: str
    rounds: int
    progress: Progress

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        rounds: int,
        progress: Progress | None = None,
    ) -> "Subject":
        """The subject for a model from ``load``."""
        return cls(PositionedModel.of(model), tokenizer, name, rounds, progress or Progress())

    def expect(self, variants: int, more: int = 0) -> None:
        """Announce the measurements: variants in every round, and ``more`` single ones."""
        self.progress.expect((self.rounds + 1) * variants + more)

    def alternate(
        self, variants: Mapping[str, Callable[[], T]], within: str = ""
    ) -> dict[str, list[T]]:
        """Run variants as :func:`.timing.alternate` does; ``within`` precedes their names."""
        return self.alternate_for(variants, self.rounds, within)

    def alternate_for(
        self, variants: Mapping[str, Callable[[], T]], rounds: int, within: str = ""
    ) -> dict[str, list[T]]:
        """The same for another number of rounds."""
        return alternate(variants, rounds, lambda name: self.progress.tick(within + name))

    def require_room(self, prompt_tokens: int, steps: int) -> None:
        """Raise TempoError unless a prompt and the steps after it fit into the model's context."""
        length = self.model.context_length
        if length is not None and prompt_tokens + steps > length:
            raise TempoError(
                f"{prompt_tokens} prompt tokens and {steps} steps exceed the model's context of "
                f"{length}"
            )

    @property
    def visibility_of_sets(self) -> str:
        """The visibility to measure sets with: "isolated", or "recombined" for recurrent models."""
        return "recombined" if self.model.is_recurrent else "isolated"

    def describe(self, **sizes: Any) -> dict[str, Any]:
        """Where and how the bench was run, with its sizes."""
        library = blas.info().library
        return {
            "architecture": self.model.architecture,
            "dtype": self.model.precision,
            **sizes,
            "rounds": self.rounds,
            "device": str(mx.device_info().get("device_name", mx.default_device())),
            "versions": {name: metadata.version(name) for name in ("mlx", "mlx-lm")},
            "blas": str(library) if library is not None else "mlx's own",
        }
