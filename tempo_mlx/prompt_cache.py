"""A prompt that has been read once, for many runs and for later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .arguments import check_count
from .errors import TempoError
from .files import writing
from .lattice import Lattice
from .models import BatchedKVCache, PositionedModel
from .models.identity import fingerprint
from .sequences import Batch, SequenceState
from .tokens import Prompt, encode_prompt

#: Version of the file.
VERSION = 1
FORMAT = "tempo-mlx prompt cache"


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of a prompt's tokens.

    Args:
        tokens: ids of the prompt.
        cache: of one row, a slot for each token.
        fingerprint: of the model that read them; see :func:`tempo_mlx.models.identity.fingerprint`.
    """

    tokens: list[int]
    cache: BatchedKVCache
    fingerprint: str

    @classmethod
    def read(
        cls,
        model: Any,
        tokenizer: Any,
        prompt: Prompt,
        prefill_step_size: int = 2048,
        progress: Callable[[int, int], None] | None = None,
    ) -> "PromptCache":
        """Read a prompt.

        Args:
            model, tokenizer, prompt: as in :func:`tempo_mlx.generate`.
            prefill_step_size: tokens in one forward pass, at least 1.
            progress: called with (tokens read, tokens).

        Raises:
            ValueError: if the prompt is empty or too long.
        """
        check_count("prefill_step_size", prefill_step_size)
        positioned = PositionedModel.of(model)
        tokens = encode_prompt(tokenizer, prompt, positioned)
        batch = Batch(positioned, [SequenceState(Lattice(tokens))])
        mx.eval(batch.prefill(prefill_step_size, progress), batch.cache.state)
        return cls(tokens, batch.cache.extract(0), fingerprint(positioned.model))

    def covers(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens need not be read; its last one always must be."""
        n = len(self.tokens)
        if list(tokens[:n]) != self.tokens:
            return 0
        return min(n, len(tokens) - 1)

    def first(self, n: int) -> BatchedKVCache:
        """A cache of one row with the first n slots."""
        cache = self.cache.extract(0)
        if n < cache.n_slots:
            cache.compact(np.arange(n))
        return cache

    @classmethod
    def of(cls, given: Any, model: PositionedModel) -> "PromptCache | None":
        """The prompt cache that a caller gave, or None.

        Raises:
            TempoError: if it is something else, or another model has read the prompt.
        """
        if given is None:
            return None
        if not isinstance(given, cls):
            raise TempoError(
                f"prompt_cache must be a PromptCache, as PromptCache.read makes one, got "
                f"{type(given).__name__}"
            )
        given.require(model)
        return given

    def require(self, model: PositionedModel) -> None:
        """Raise TempoError unless this model has read the prompt."""
        found = fingerprint(model.model)
        if found != self.fingerprint:
            raise TempoError(
                f"the prompt cache was made by another model ({self.fingerprint[:8]}..., this one "
                f"is {found[:8]}...); make it anew with this model"
            )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: keys and values of each layer, and the tokens.

        Raises:
            OSError: if it cannot be written.
        """
        arrays = {"tokens": mx.array(self.tokens, mx.int32)}
        count = self.cache.n_slots
        for i, layer in enumerate(self.cache.layers):
            if layer.keys is not None and layer.values is not None:
                arrays[f"layers.{i}.keys"] = mx.contiguous(layer.keys[..., :count, :])
                arrays[f"layers.{i}.values"] = mx.contiguous(layer.values[..., :count, :])
        metadata = {"format": FORMAT, "version": str(VERSION), "model": self.fingerprint}
        with writing(Path(path)) as file:
            mx.save_safetensors(file, arrays, metadata)

    @classmethod
    def load(cls, path: Path | str, model: Any) -> "PromptCache":
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: if the file is none, of another version, or of another model.
        """
        positioned = PositionedModel.of(model)
        try:
            loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        except (RuntimeError, OSError, ValueError) as error:
            raise TempoError(f"prompt cache {path} cannot be read: {error}") from error
        arrays, metadata = loaded
        if metadata.get("format") != FORMAT:
            raise TempoError(f"{path} is no prompt cache of tempo-mlx")
        if metadata.get("version") != str(VERSION):
            raise TempoError(
                f"prompt cache {path} has version {metadata.get('version')}, this is version "
                f"{VERSION}; make it anew"
            )
        tokens = [int(id) for id in arrays.pop("tokens").tolist()]
        cache = positioned.make_cache(1)
        found = cls(tokens, cache, str(metadata.get("model")))
        found.require(positioned)
        cache.fill(arrays, np.arange(len(tokens))[None])
        return found
