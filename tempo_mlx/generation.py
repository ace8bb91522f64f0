"""Generation from one prompt."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, cast

import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from .arguments import check_count
from .decode.decoder import BatchDecoder
from .decode.prompt_cache import PromptCache
from .decode.replication import RowTree
from .decode.request import Request
from .errors import TempoError
from .lattice.lattice import Lattice, Step
from .lattice.result import BEAM, GenerationResult, find_paths
from .models import PlainModel, PositionedModel
from .settings import Settings
from .text.rendering import StepWriter, plain
from .text.vocabulary import Prompt, Vocabulary, encode_prompt


@dataclass(frozen=True)
class StepResponse:
    """What :func:`stream_generate` yields after each step.

    Args:
        step: the step just made; its tokens are final except for ``pruned_at``.
        result: the run so far; complete with the last response.
        slots_held: slots in the cache.
        cache_bytes: bytes of its keys, values and states, room for more included.
        finish_reason: None, or "stop" (end of text or a stop text), "length" (``max_tokens``) or
            "context" (the model's context is full).
    """

    step: Step
    result: GenerationResult
    slots_held: int
    cache_bytes: int
    finish_reason: str | None = None


def generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    verbose: bool = False,
    **kwargs: Any,
) -> GenerationResult:
    """Generate with parallel sets and return the whole result.

    Args:
        model: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns it.
        tokenizer: the model's tokenizer.
        prompt: text, token ids, or chat messages for the model's template.
        verbose: print the sets as they come.
        kwargs: arguments of :func:`stream_generate`, which are those of :class:`Settings`.

    Raises:
        ValueError: for an argument out of range or a prompt that is empty or too long.
        UnsupportedModelError: for a model that cannot hold parallel tokens exactly.
        NonFiniteLogitsError: if the model returns NaN.
    """
    writer = StepWriter()
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        if verbose:
            print(plain(writer.write(response.step)), end="", flush=True)
    if verbose:
        print(plain(writer.finish()))
    return response.result


def stream_generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    verify: bool = False,
    model_name: str | None = None,
    prompt_cache: PromptCache | None = None,
    paths: int = 0,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Generator[StepResponse, None, None]:
    """Generate with parallel sets, one response for each step.

    Args:
        model, tokenizer, prompt: as in :func:`generate`.
        verify: after the last step, replay the run (see :func:`.verification.verify`) and put the
            largest difference into ``result.verification``. Keeps every step's logits in memory.
            Refused for visibilities that are not among :data:`.verification.KNOWN`.
        model_name: what the result calls the model.
        prompt_cache: read already; a prompt that begins with its tokens goes on from there, any
            other one is appended to its text: see :meth:`PromptCache.join`.
        paths: paths that ``result.paths`` will be asked for; they are found before the last
            response, while the prompt is still in the cache, instead of when they are asked for.
        prompt_progress_callback: called with (prompt tokens read, prompt tokens).
        settings: fields of :class:`Settings`.

    Yields:
        :class:`StepResponse`; the last one has a ``finish_reason``.

    Raises:
        As :func:`generate`.
    """
    chosen = Settings.of(settings)
    check_count("paths", paths, 0)
    if chosen.branching == "replicate":
        if verify or prompt_cache is not None:
            raise TempoError("branching replicate takes no prompt_cache and has nothing to verify")
        plain = PlainModel(model)
        result = begin(plain, tokenizer, prompt, chosen, model_name)
        yield from steps_by_rows(result, prompt_progress_callback)
        return
    positioned = PositionedModel.of(model)
    known = PromptCache.of(prompt_cache, positioned, tokenizer)
    result = begin(positioned, tokenizer, prompt, chosen, model_name, prompt_cache=known)
    yield from steps(result, verify, prompt_progress_callback, known, paths)


def begin(
    model: PositionedModel | PlainModel,
    tokenizer: Any,
    prompt: Prompt,
    settings: Settings,
    model_name: str | None = None,
    vocabulary: Vocabulary | None = None,
    prompt_cache: PromptCache | None = None,
) -> GenerationResult:
    """The result of a run that has not begun: its prompt is encoded, its seed is chosen."""
    if prompt_cache is not None:
        assert isinstance(model, PositionedModel)
        joined = prompt_cache.join(model, tokenizer, prompt)
        prompt_tokens, text = joined.tokens, joined.text
    else:
        prompt_tokens = encode_prompt(tokenizer, prompt, model)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_tokens)
    return GenerationResult(
        model=model,
        vocabulary=vocabulary or Vocabulary(tokenizer),
        model_name=model_name or model.name or str(getattr(tokenizer, "name_or_path", "")),
        prompt=text,
        lattice=Lattice(prompt_tokens),
        settings=settings.seeded(),
    )


def steps(
    result: GenerationResult,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
    prompt_cache: PromptCache | None = None,
    paths: int = 0,
) -> Generator[StepResponse, None, None]:
    """Extend the result's lattice step by step; see :func:`stream_generate`."""
    assert isinstance(result.model, PositionedModel)
    run = Request(result, keep_logits=verify, paths=paths)
    decoder = BatchDecoder(result.model)
    with wired_limit(result.model.model, cast(Any, [generation_stream])):
        shared = prompt_cache.covers(run.lattice.prompt_tokens) if prompt_cache else 0
        decoder.start([run], prompt_cache.first(shared) if prompt_cache and shared else None)
        while decoder.reading:
            done = decoder.read()
            if progress is not None:
                progress(*done)
        while not run.finished:
            decoder.step()
            if run.error is not None:
                raise run.error
            if run.finished and paths:
                find_paths([result], max(paths, BEAM), [run.prompt_slots])
            yield StepResponse(
                run.lattice.steps[-1],
                result,
                len(run.sequence.held),
                decoder.batch.cache.nbytes,
                result.finish_reason,
            )


def steps_by_rows(
    result: GenerationResult, progress: Callable[[int, int], None] | None = None
) -> Generator[StepResponse, None, None]:
    """As :func:`steps`, each branch of the tree in a row of its own."""
    run = Request(result)
    tree = RowTree(result.model.model, run)
    with wired_limit(result.model.model, cast(Any, [generation_stream])):
        tree.read(result.settings.prefill_step_size, progress)
        while not run.finished:
            tree.step()
            yield StepResponse(
                run.lattice.steps[-1], result, tree.slots, tree.nbytes, result.finish_reason
            )
