"""A prompt that has been read once, for many runs and for later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..arguments import check_count
from ..errors import TempoError
from ..io.files import writing
from ..lattice.lattice import Lattice
from ..models import PositionedModel, SlotStore
from ..text.vocabulary import Prompt, encode_prompt, is_chat, require_room, require_tokenizer
from ..weights.fingerprint import fingerprint, tokenizer_fingerprint
from .request import Request
from .sequences import Batch, SequenceState

#: Version of the file.
VERSION = 2
FORMAT = "tempo-mlx prompt cache"


@dataclass(frozen=True)
class JoinedPrompt:
    """A prompt together with a text that has been read already.

    Args:
        tokens: of both.
        text: of both.
        appended: whether the prompt was appended to the text; if not, it begins with the text.
    """

    tokens: list[int]
    text: str
    appended: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadTokens:
    """Tokens that a model has read, from which prompts that begin with them go on.

    Args:
        tokens: ids.
        cache: of one row, a slot for each token or for all but the last.
    """

    tokens: list[int]
    cache: SlotStore

    def covers(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens need not be read; its last one always must be.

        States of recurrent layers sum up all that was read: all of it or nothing can be used.
        """
        usable = min(self.cache.n_slots, len(tokens) - 1)
        pairs = enumerate(zip(self.tokens[:usable], tokens, strict=False))
        n = next((i for i, (ours, theirs) in pairs if ours != theirs), usable)
        return 0 if self.cache.states and n < self.cache.n_slots else n

    def first(self, n: int) -> SlotStore:
        """A cache of one row with the first n slots."""
        cache = self.cache.extract(0)
        if n < cache.n_slots:
            cache.compact(np.arange(n))
        return cache


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptCache(ReadTokens):
    """A prompt that has been read, with its text and what read it.

    A prompt that begins with these tokens goes on from them. Any other one is appended to them, as
    by ``mlx_lm.generate --prompt-cache-file``: see :meth:`join`.

    Args:
        tokens, cache: as :class:`ReadTokens`.
        text: of the prompt.
        fingerprint: of the model that read them, its
            :func:`~tempo_mlx.weights.fingerprint.fingerprint`.
        tokenizer: the tokenizer's
            :func:`~tempo_mlx.weights.fingerprint.tokenizer_fingerprint`.
    """

    text: str
    fingerprint: str
    tokenizer: str

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
        positioned = PositionedModel.of(model).quantizing(None)
        tokens = encode_prompt(tokenizer, prompt, positioned)
        batch = Batch(positioned, [SequenceState(Lattice(tokens))])
        if positioned.is_recurrent:
            # The last token of a prompt is always read, and a state cannot go back by one.
            for done in batch.read(prefill_step_size):
                if progress is not None:
                    progress(*done)
        else:
            batch.prefill(prefill_step_size, progress)
        mx.eval(batch.cache.state)
        return cls(
            tokens=tokens,
            cache=batch.cache.extract(0),
            text=prompt if isinstance(prompt, str) else tokenizer.decode(tokens),
            fingerprint=fingerprint(positioned.model),
            tokenizer=tokenizer_fingerprint(tokenizer),
        )

    def join(self, model: Any, tokenizer: Any, prompt: Prompt) -> JoinedPrompt:
        """The prompt as it is run with this cache.

        A prompt begins with the cached text if its tokens do; or, where it is text, if that does,
        although a token may reach over the end of the cached text. Any other prompt stands behind
        the cached text, without the tokens that the tokenizer puts at the beginning of a text.

        Args:
            model, tokenizer, prompt: as in :func:`tempo_mlx.generate`.

        Raises:
            ValueError: if the prompt is empty or together with the cached text too long, or if it
                is a conversation that does not begin with the cached text.
        """
        positioned = PositionedModel.of(model)
        own = encode_prompt(tokenizer, prompt, positioned)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(own)
        begins = own[: len(self.tokens)] == self.tokens
        if begins or (isinstance(prompt, str) and prompt.startswith(self.text)):
            joined = JoinedPrompt(own, text, appended=False)
        elif is_chat(prompt):
            raise TempoError(
                "the conversation does not begin with the text of the prompt cache, and a whole "
                "conversation cannot be appended to a text; make a cache of its beginning, or "
                "leave the chat template out"
            )
        else:
            if isinstance(prompt, str):
                own = tokenizer.encode(prompt, add_special_tokens=False)
            joined = JoinedPrompt([*self.tokens, *own], self.text + text, appended=True)
        require_room(joined.tokens, positioned)
        return joined

    @classmethod
    def of(cls, given: Any, model: PositionedModel, tokenizer: Any) -> "PromptCache | None":
        """The prompt cache that a caller gave, or None.

        Raises:
            TempoError: if it is something else, or another model or tokenizer made it.
        """
        if given is None:
            return None
        if not isinstance(given, cls):
            raise TempoError(
                f"prompt_cache must be a PromptCache, as PromptCache.read makes one, got "
                f"{type(given).__name__}"
            )
        require_tokenizer(tokenizer)
        given.require(model, tokenizer)
        return given

    def require(self, model: PositionedModel, tokenizer: Any = None) -> None:
        """Raise ValueError unless this model and, where it is given, this tokenizer made it."""
        found = fingerprint(model.model)
        if found != self.fingerprint:
            raise TempoError(
                f"the prompt cache was made by another model ({self.fingerprint[:8]}..., this one "
                f"is {found[:8]}...); make a new one with this model"
            )
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != self.tokenizer:
            raise TempoError(
                "the prompt cache was made with another tokenizer; make a new one with this one"
            )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: keys, values and states of each layer, and the tokens.

        Raises:
            OSError: if it cannot be written.
        """
        arrays = {"tokens": mx.array(self.tokens, mx.int32)}
        count = self.cache.n_slots
        for i, layer in enumerate(self.cache.kv):
            if layer.keys is not None and layer.values is not None:
                arrays[f"layers.{i}.keys"] = mx.contiguous(layer.keys[..., :count, :])
                arrays[f"layers.{i}.values"] = mx.contiguous(layer.values[..., :count, :])
        arrays |= self.cache.last_states()
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": self.fingerprint,
            "tokenizer": self.tokenizer,
            "text": self.text,
        }
        with writing(Path(path)) as file:
            mx.save_safetensors(file, arrays, metadata)

    @classmethod
    def load(cls, path: Path | str, model: Any, tokenizer: Any = None) -> "PromptCache":
        """Read a file that :meth:`save` wrote.

        Args:
            path: of the file.
            model, tokenizer: that are going to use it; without a tokenizer, only the model is
                compared with the one that made the file.

        Raises:
            ValueError: if the file is not a prompt cache of this version, model and tokenizer.
        """
        positioned = PositionedModel.of(model).quantizing(None)
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
                f"{VERSION}; make a new one"
            )
        tokens = [int(id) for id in arrays.pop("tokens").tolist()]
        cache = positioned.make_cache(1)
        found = cls(
            tokens=tokens,
            cache=cache,
            text=str(metadata.get("text")),
            fingerprint=str(metadata.get("model")),
            tokenizer=str(metadata.get("tokenizer")),
        )
        found.require(positioned, tokenizer)
        n = len(tokens) - 1 if positioned.is_recurrent else len(tokens)
        cache.fill(arrays, np.arange(n)[None])
        return found


def read_by(request: Request, store: SlotStore, ids: Sequence[int]) -> ReadTokens | None:
    """What a run has read of its prompt and of one path, as a text of its own.

    Args:
        request: the run, which has left its batch.
        store: one row, its slots in the order of the request's ``held``.
        ids: of one of its paths.
    """
    tokens, slots = list(request.lattice.prompt_tokens), list(range(request.length))
    chain = _chain(request, ids)
    tokens += ids[: len(chain)]
    slots += chain
    ending = _appended_ending(request)
    if ending is not None and len(chain) == len(ids):
        tokens.append(ending[0])
        slots.append(ending[1])
    places = {slot: at for at, slot in enumerate(request.sequence.held.tolist())}
    n = next((i for i, slot in enumerate(slots) if slot not in places), len(slots))
    at = np.array([places[slot] for slot in slots[:n]])
    if store.states:
        with_state = np.flatnonzero(store.has_state(at))
        if not with_state.size:
            return None
        at = at[: with_state[-1] + 1]
    alone = store.extract(0)
    alone.compact(at)
    return ReadTokens(tokens=tokens[: len(at)], cache=alone)


def _chain(request: Request, ids: Sequence[int]) -> list[int]:
    """Slots of a path's first tokens, as far as each saw only the tokens before it on the path.

    Args:
        request: a run that has ended.
        ids: of one of its paths.
    """
    lattice, settings = request.lattice, request.settings
    slots: list[int] = []
    last = len(lattice.prompt_tokens) - 1
    for step, id in zip(lattice.steps, ids, strict=False):
        if settings.has_parents:
            found = [t.slot for t in step.tokens if t.id == id and t.parent == last]
        elif settings.weighting == "none":
            # In merged visibilities later tokens see whole sets.
            found = [t.slot for t in step.tokens if t.id == id and len(step.tokens) == 1]
        else:
            found = []
        if not found:
            break
        last = found[0]
        slots.append(last)
    return slots


def _appended_ending(request: Request) -> tuple[int, int] | None:
    """The end token that a run of single tokens has read before it was known to be one, and its
    slot; None where it has not."""
    step = request.lattice.steps[-1]
    pending = request.sequence.pending
    ahead = pending is not None and len(pending) == 1 and int(pending.step[0]) == step.step
    if step.tokens or len(step.endings) != 1 or pending is None or not ahead:
        return None
    return step.endings[0].id, int(pending.index[0])
