"""Generation from one prompt, or from many in one batch."""

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from .arguments import MOST_BYTES, check_count, shown
from .decode.decoder import BatchDecoder
from .decode.observation import Observer
from .decode.paths import find_paths
from .decode.prompt_cache import PromptCache, ReadTokens
from .decode.replication import RowTree
from .decode.request import Request
from .decode.result import BEAM, GenerationResult
from .decode.scheduler import BATCH_SIZE, BatchStatus, Scheduler, default_budget
from .errors import TempoError
from .keywords import BatchKeywords, GenerateKeywords, SettingsKeywords
from .lattice.lattice import Lattice, Step
from .lattice.rendering import StepWriter, plain
from .models import KVQuantization, PlainModel, PositionedModel
from .settings import Settings, given
from .text.vocabulary import Prompt, Vocabulary, encode_prompt, require_tokenizer


@dataclass(frozen=True)
class StepResponse:
    """The response of :func:`stream_generate` after each step.

    Args:
        step: the latest step; its tokens are final except for ``pruned_at``.
        result: the run so far; complete in the last response.
        slots_held: slots in the cache, with those of pruned tokens until it is compacted.
        cache_bytes: bytes allocated for keys, values and states.
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
    **kwargs: Unpack[GenerateKeywords],
) -> GenerationResult:
    """Generate with parallel sets and return the whole result.

    Args:
        model: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns it.
        tokenizer: the model's tokenizer.
        prompt: text, token ids, or chat messages for the model's template.
        verbose: print the sets as they are generated.
        kwargs: arguments of :func:`stream_generate`, including ``settings``, or fields of
            :class:`Settings`.

    Raises:
        ValueError: for an argument out of range, or a prompt that is empty or too long.
        UnsupportedModelError: if the model does not support parallel tokens exactly.
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
    paths: int = 1,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    settings: Settings | None = None,
    **kwargs: Unpack[SettingsKeywords],
) -> Generator[StepResponse, None, None]:
    """Generate with parallel sets, one response for each step.

    Args:
        model, tokenizer, prompt: as in :func:`generate`.
        verify: after the last step, replay the run (see :func:`.verification.verify`) and store the
            largest difference in ``result.verification``. Keeps the logits of all steps in memory.
            Refused for a custom visibility without ``sees``.
        model_name: name of the model in the result.
        prompt_cache: a prompt that has been read. A prompt that begins with its tokens continues
            from there; any other is appended to its text, see :meth:`PromptCache.join`.
        paths: number of paths to prepare for ``result.paths``. If the run does not score them
            itself, they are found before the last response, while the prompt is still in the cache.
            With 0, not even ``result.text`` is available in that case.
        prompt_progress_callback: called with (prompt tokens read, prompt tokens).
        settings: of the run; None builds them from ``kwargs``.
        kwargs: fields of :class:`Settings`, if ``settings`` is None.

    Yields:
        :class:`StepResponse`; the last one has a ``finish_reason``.

    Raises:
        As :func:`generate`.
    """
    chosen = given(settings, kwargs, Settings)
    check_count("paths", paths, 0)
    if chosen.branching == "replicate":
        if verify or prompt_cache is not None:
            raise TempoError("branching replicate supports neither prompt_cache nor verify")
        plain = PlainModel(model)
        result = begin(plain, tokenizer, prompt, chosen, model_name)
        yield from steps_by_rows(result, prompt_progress_callback)
        return
    positioned = PositionedModel.of(model)
    known = PromptCache.of(prompt_cache, positioned, tokenizer)
    _require_verifiable(verify, chosen)
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
    """The result of a run that has not started: its prompt is encoded and its seed chosen.

    Its model is the one to run, with quantised caches if the settings ask for them.
    """
    if isinstance(model, PositionedModel):
        model = model.quantizing(settings.kv_quantization)
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
        settings=settings.resolved(model),
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
    yield from steps_of(run, BatchDecoder(result.model), progress, prompt_cache, paths)


def steps_of(
    run: Request,
    decoder: BatchDecoder,
    progress: Callable[[int, int], None] | None = None,
    known: ReadTokens | None = None,
    paths: int = 0,
) -> Generator[StepResponse, None, None]:
    """Read a run's prompt and make its steps in a separate decoder.

    Args:
        run: not started yet.
        decoder: without other runs; a caller may remove the run from it between two steps.
        known: tokens that have already been read; the prompt may begin with them.
    """
    result = run.result
    mx.reset_peak_memory()
    with wired_limit(decoder.model.model, cast(Any, [generation_stream])):
        shared = known.covers(run.lattice.prompt_tokens) if known else 0
        decoder.start([run], known.first(shared) if known and shared else None)
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
                run.sequence.n_held + run.sequence.n_dropped,
                decoder.batch.cache.nbytes,
                result.finish_reason,
            )


def steps_by_rows(
    result: GenerationResult, progress: Callable[[int, int], None] | None = None
) -> Generator[StepResponse, None, None]:
    """As :func:`steps`, with one row for each branch of the tree."""
    run = Request(result)
    tree = RowTree(result.model.model, run)
    mx.reset_peak_memory()
    with wired_limit(result.model.model, cast(Any, [generation_stream])):
        tree.read(result.settings.prefill_step_size, progress)
        while not run.finished:
            tree.step()
            yield StepResponse(
                run.lattice.steps[-1], result, tree.slots, tree.nbytes, result.finish_reason
            )


@dataclass(frozen=True)
class Failure:
    """A prompt that failed.

    Args:
        prompt: as given.
        error: the reason, in one line.
    """

    prompt: Prompt
    error: str

    def to_dict(self) -> dict[str, Any]:
        """The failure as JSON-ready data; values that JSON does not support are shown by repr."""
        prompt = json.loads(json.dumps(self.prompt, default=_as_python_writes))
        return {"prompt": prompt, "error": self.error}


@dataclass
class BatchResult:
    """The result of :func:`batch_generate`.

    Args:
        results: one for each prompt, in order.
        status: at the end.
    """

    results: list[GenerationResult | Failure]
    status: BatchStatus = field(default_factory=BatchStatus)

    @property
    def texts(self) -> list[str | None]:
        """The best text of each prompt; None if the prompt failed."""
        return [each.text if isinstance(each, GenerationResult) else None for each in self.results]


def batch_generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings] | None = None,
    verbose: bool = False,
    **kwargs: Unpack[BatchKeywords],
) -> BatchResult:
    """Generate from many prompts in one batch, with one forward pass for each step.

    Result i equals that of ``generate`` with the same settings for prompt i alone.

    Args:
        model, tokenizer: as in :func:`tempo_mlx.generate`.
        prompts: each a text, token ids, or chat messages.
        settings: for all prompts, or one for each; None builds them from ``kwargs``.
        verbose: print the progress.
        kwargs: arguments of :func:`stream_batch_generate`, and fields of :class:`Settings` if
            ``settings`` is None.

    Returns:
        a result or a :class:`Failure` for each prompt, in order.

    Raises:
        ValueError: for an argument out of range. An invalid prompt fails only that prompt.
    """
    results: dict[int, GenerationResult | Failure] = {}
    status = BatchStatus()
    tell = kwargs.get("progress")

    def progress(now: BatchStatus) -> None:
        nonlocal status
        if verbose and now.done > status.done:
            print(f"{now.done}/{now.total} prompts, {now.tokens / now.seconds:.1f} tokens/s")
        status = BatchStatus(**vars(now))
        if tell is not None:
            tell(now)

    kwargs["progress"] = progress
    for i, result in stream_batch_generate(model, tokenizer, prompts, settings, **kwargs):
        results[i] = result
    return BatchResult([results[i] for i in range(len(prompts))], status)


def stream_batch_generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    max_kv_bytes: int | None = None,
    prompt_cache: PromptCache | None = None,
    paths: int = 1,
    verify: bool = False,
    model_name: str | None = None,
    observe: Callable[[int], Observer | None] | None = None,
    progress: Callable[[BatchStatus], None] | None = None,
    **kwargs: Unpack[SettingsKeywords],
) -> Generator[tuple[int, GenerationResult | Failure], None, None]:
    """As :func:`batch_generate`; yields (number of the prompt, result) as they finish.

    A prompt that ends immediately makes room for the next one. Prompts are read while others
    generate, in chunks of at most ``prefill_step_size`` tokens between two steps. Identical prompts
    are read once.

    Args:
        model, tokenizer, prompts, settings: as in :func:`batch_generate`.
        batch_size: most prompts that generate at the same time, at least 1.
        max_kv_bytes: most bytes of keys, values and recurrent states. Prompts wait until they fit;
            a prompt that does not fit alone fails. None is half of the available memory.
        prompt_cache: a prompt that has been read. Prompts that begin with its tokens continue from
            there; others are appended to its text, see :meth:`PromptCache.join`.
        paths: as in :func:`tempo_mlx.stream_generate`; found for ``batch_size`` results at a time.
        verify: as in :func:`tempo_mlx.stream_generate`.
        model_name: name of the model in the results.
        observe: called with the number of a prompt whenever its run starts; returns the observer of
            its steps. A run that has to restart gets a new observer.
        progress: called after every step.
        kwargs: fields of :class:`Settings`, if ``settings`` is None.

    Raises:
        As :func:`batch_generate`.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TempoError(f"prompts must be a list of prompts, got {shown(prompts)}")
    check_count("batch_size", batch_size)
    if max_kv_bytes is not None:
        check_count("max_kv_bytes", max_kv_bytes, most=MOST_BYTES)
    check_count("paths", paths, 0)
    if isinstance(settings, Sequence) and not isinstance(settings, str):
        each = [given(one, kwargs, Settings) for one in settings]
    else:
        each = [given(settings, kwargs, Settings)] * len(prompts)
    if len(each) != len(prompts):
        raise TempoError(
            f"settings must be one for each of {len(prompts)} prompts, got {len(each)}"
        )
    positioned = PositionedModel.of(model).quantizing(_common_quantization(each, batch_size))
    prompt_cache = PromptCache.of(prompt_cache, positioned, tokenizer)
    require_tokenizer(tokenizer)
    for one in each:
        _require_verifiable(verify, one)
    vocabulary = Vocabulary(tokenizer)

    def new_request(i: int) -> Request:
        if each[i].branching == "replicate":
            raise TempoError("branching replicate generates from one prompt at a time")
        result = begin(
            positioned, tokenizer, prompts[i], each[i], model_name, vocabulary, prompt_cache
        )
        observer = None if observe is None else observe(i)
        return Request(result, keep_logits=verify, paths=paths, observer=observer)

    budget = max_kv_bytes or default_budget()
    scheduler = Scheduler(positioned, batch_size, budget, prompt_cache)
    mx.reset_peak_memory()
    for i in range(len(prompts)):
        scheduler.submit(i, partial(new_request, i))
    # Finished runs whose paths have not been found yet.
    held: list[tuple[int, GenerationResult]] = []
    with wired_limit(positioned.model, cast(Any, [generation_stream])):
        for key, outcome in scheduler.outcomes(progress or (lambda status: None)):
            i = cast(int, key)
            if not isinstance(outcome, GenerationResult):
                yield i, Failure(prompts[i], str(outcome))
            elif paths and not outcome.settings.has_parents:
                held.append((i, outcome))
            else:
                yield i, outcome
            if held and (len(held) == batch_size or scheduler.left == 0):
                finished = [result for _, result in held]
                slots = [scheduler.prompts.pop(result, None) for result in finished]
                find_paths(finished, max(paths, BEAM), slots)
                yield from held
                held = []


def _require_verifiable(verify: bool, settings: Settings) -> None:
    if verify and settings.kv_bits is not None:
        raise TempoError(
            "verify replays a run with keys and values in full precision, which kv_bits changes; "
            "leave one of them out"
        )


def _common_quantization(each: Sequence[Settings], batch_size: int) -> KVQuantization | None:
    """How the keys and values of a batch are quantised."""
    found = {settings.kv_quantization for settings in each}
    if len(found) > 1:
        raise TempoError(
            "kv_bits, kv_group_size and quantized_kv_start must be the same for all prompts of a "
            "batch, which share their arrays"
        )
    [common] = found or {None}
    if common is not None and common.start > 0 and min(batch_size, len(each)) > 1:
        raise TempoError(
            "quantized_kv_start must be 0 in a batch, whose prompts share arrays and reach a "
            f"number of tokens at different times, got {common.start}; or use batch_size 1"
        )
    return common


def _as_python_writes(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
