"""Many prompts in one batch: who is in it, who waits, and what becomes of those that fail."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from ..arguments import MOST_BYTES, check_count, shown
from ..errors import TempoError
from ..generation import begin
from ..lattice.result import BEAM, GenerationResult, find_paths
from ..models import BatchedKVCache, PositionedModel
from ..settings import Settings
from ..text.vocabulary import Prompt, Vocabulary, require_tokenizer
from .decoder import BatchDecoder, CacheBudgetError
from .observation import Observer
from .prompt_cache import PromptCache
from .request import Request

#: Prompts that generate at the same time, unless the caller says how many.
BATCH_SIZE = 32

#: Share of the device's memory that keys and values may take, unless the caller says how much.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Failure:
    """What became of a prompt that gave no result.

    Args:
        prompt: as it was given.
        error: why, in one line.
    """

    prompt: Prompt
    error: str

    def to_dict(self) -> dict[str, Any]:
        """The failure as JSON-ready data; what JSON does not have is as Python writes it."""
        prompt = json.loads(json.dumps(self.prompt, default=_as_python_writes))
        return {"prompt": prompt, "error": self.error}


@dataclass
class BatchStatus:
    """How far a batch has come.

    Args:
        total, done, failed: prompts; ``done`` counts those that failed, too.
        running, reading, waiting: prompts that generate, whose text is being read, and the rest.
        waiting_for_memory: whether prompts wait although there are free places, for want of memory.
        preempted: times that a prompt had to start again because others needed its memory.
        steps, passes, tokens: logical steps of all prompts, forward passes, and tokens in sets.
        seconds: since the start.
        cache_bytes: of the keys, values and states, room for more included.
        waste: share of the slots held that no running prompt uses; its largest value so far is
            ``largest_waste``.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    running: int = 0
    reading: int = 0
    waiting: int = 0
    waiting_for_memory: bool = False
    preempted: int = 0
    steps: int = 0
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0
    waste: float = 0.0
    largest_waste: float = 0.0


@dataclass
class BatchResult:
    """What :func:`batch_generate` returns.

    Args:
        results: of each prompt, in order.
        status: as it was at the end.
    """

    results: list[GenerationResult | Failure]
    status: BatchStatus = field(default_factory=BatchStatus)

    @property
    def texts(self) -> list[str | None]:
        """The best text of each prompt, None where it failed."""
        finished = [each for each in self.results if isinstance(each, GenerationResult)]
        if finished:
            find_paths(finished)
        return [each.text if isinstance(each, GenerationResult) else None for each in self.results]


def batch_generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings | Sequence[Settings] | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> BatchResult:
    """Generate from many prompts, in one forward pass for each step of all.

    Row i is what ``generate`` with the same settings gives for prompt i alone.

    Args:
        model, tokenizer: as in :func:`tempo_mlx.generate`.
        prompts: each a text, token ids, or chat messages.
        settings: for all prompts, or one for each; None makes them of ``kwargs``.
        verbose: print how far it has come.
        kwargs: arguments of :func:`stream_batch_generate`; and of :class:`Settings` if
            ``settings`` is None.

    Returns:
        a result or a :class:`Failure` for each prompt, in order.

    Raises:
        ValueError: for an argument out of range. What is wrong with one prompt fails that prompt.
    """
    results: dict[int, GenerationResult | Failure] = {}
    status = BatchStatus()
    tell = kwargs.pop("progress", None)

    def progress(now: BatchStatus) -> None:
        nonlocal status
        if verbose and now.done > status.done:
            print(f"{now.done}/{now.total} prompts, {now.tokens / now.seconds:.1f} tokens/s")
        status = BatchStatus(**vars(now))
        if tell is not None:
            tell(now)

    for i, result in stream_batch_generate(
        model, tokenizer, prompts, settings, progress=progress, **kwargs
    ):
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
    paths: int = 0,
    verify: bool = False,
    model_name: str | None = None,
    observe: Callable[[int], Observer | None] | None = None,
    progress: Callable[[BatchStatus], None] | None = None,
    **kwargs: Any,
) -> Generator[tuple[int, GenerationResult | Failure], None, None]:
    """As :func:`batch_generate`; yields (number of the prompt, result) as they finish.

    A prompt that ends makes room for the next one at once. Prompts are read while the others
    generate, a chunk of at most ``prefill_step_size`` tokens between two steps; prompts that are
    alike are read once.

    Args:
        model, tokenizer, prompts, settings: as in :func:`batch_generate`.
        batch_size: prompts that generate at the same time, at least 1.
        max_kv_bytes: bytes that keys, values and recurrent states may take; prompts wait while
            they do not fit, and one that does not fit alone fails. None is half of the memory that
            is left.
        prompt_cache: read already; prompts that begin with its tokens go on from there, others
            are appended to its text: see :meth:`PromptCache.join`.
        paths: if above 0, paths that are found for each result before it is yielded; where the run
            did not score them itself, for ``batch_size`` results together.
        verify: as in :func:`tempo_mlx.stream_generate`.
        model_name: what the results call the model.
        observe: called with the number of a prompt whenever its run begins; returns what is to see
            its steps. A run that has to start again gets another observer.
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
    if settings is None:
        settings = Settings.of(kwargs)
    elif kwargs:
        raise TypeError(f"{sorted(kwargs)[0]!r} beside settings; put it into the settings")
    if isinstance(settings, Settings):
        each = [settings] * len(prompts)
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        each = list(settings)
    else:
        raise TempoError(
            f"settings must be Settings, or one for each prompt, got {shown(settings)}"
        )
    if len(each) != len(prompts):
        raise TempoError(
            f"settings must be one for each of {len(prompts)} prompts, got {len(each)}"
        )
    for one in each:
        if not isinstance(one, Settings):
            raise TempoError(f"settings must be Settings, got {shown(one)}")
    positioned = PositionedModel.of(model)
    prompt_cache = PromptCache.of(prompt_cache, positioned, tokenizer)
    require_tokenizer(tokenizer)
    vocabulary = Vocabulary(tokenizer)

    def new_run(i: int) -> Request:
        if each[i].branching == "replicate":
            raise TempoError("branching replicate generates from one prompt at a time")
        result = begin(
            positioned, tokenizer, prompts[i], each[i], model_name, vocabulary, prompt_cache
        )
        observer = None if observe is None else observe(i)
        return Request(result, keep_logits=verify, paths=paths, observer=observer)

    budget = max_kv_bytes or default_budget()
    schedule = Scheduler(positioned, new_run, len(prompts), batch_size, budget, prompt_cache)
    # Finished, but their paths are still to be found.
    held: list[tuple[int, GenerationResult]] = []
    with wired_limit(positioned.model, cast(Any, [generation_stream])):
        for i, outcome in schedule.outcomes(progress or (lambda status: None)):
            if not isinstance(outcome, GenerationResult):
                yield i, Failure(prompts[i], outcome)
            elif paths and not outcome.settings.has_parents:
                held.append((i, outcome))
            else:
                yield i, outcome
            if held and (len(held) == batch_size or schedule.left == 0):
                finished = [result for _, result in held]
                slots = [schedule.prompts.pop(id(result), None) for result in finished]
                find_paths(finished, max(paths, BEAM), slots)
                yield from held
                held = []


def default_budget() -> int:
    """Bytes for keys and values: half of the memory that the model has left."""
    info = mx.device_info()
    total = info.get("max_recommended_working_set_size") or info.get("memory_size")
    if not total:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, int(MEMORY_SHARE * (int(total) - mx.get_active_memory())))


class Scheduler:
    """Lets runs into a decoder while they fit, in order.

    Args:
        model: reads the tokens.
        new_run: makes the run of a prompt; ValueError fails it.
        total: prompts.
        batch_size: runs that generate at the same time.
        max_kv_bytes: bytes of keys, values and recurrent states.
        prompt_cache: of a beginning that prompts may have.
    """

    def __init__(
        self,
        model: PositionedModel,
        new_run: Callable[[int], Request],
        total: int,
        batch_size: int,
        max_kv_bytes: int,
        prompt_cache: PromptCache | None = None,
    ):
        self._decoder = BatchDecoder(model, max_kv_bytes)
        self._new_run = new_run
        self._batch_size = batch_size
        self._max_kv_bytes = max_kv_bytes
        self._prompt_cache = prompt_cache
        self._waiting = deque(range(total))
        self._ready: dict[int, Request] = {}  # runs that were made and could not start yet
        self._numbers: dict[Request, int] = {}
        #: runs in the batch when one was preempted: nobody is let in before one has left
        self._full_at: int | None = None
        self.status = BatchStatus(total=total, waiting=total)
        self._started = time.perf_counter()
        #: slots of the prompts of results that will be rescored, by the result's ``id``
        self.prompts: dict[int, BatchedKVCache] = {}

    @property
    def left(self) -> int:
        """Prompts without an outcome."""
        return self.status.total - self.status.done

    def outcomes(
        self, progress: Callable[[BatchStatus], None]
    ) -> Iterator[tuple[int, GenerationResult | str]]:
        """(number of the prompt, its result or why it failed), as they finish."""
        decoder = self._decoder
        while self._waiting or decoder.requests or decoder.reading:
            if not decoder.reading:
                yield from self._admit()
            if decoder.reading:
                decoder.read()
            if decoder.requests:
                yield from self._step()
            self._note()
            progress(self.status)

    def _step(self) -> Iterator[tuple[int, GenerationResult | str]]:
        decoder = self._decoder
        made = decoder.step()
        status = self.status
        status.passes += 1
        status.steps += len(made)
        for request in made:
            status.tokens += len(request.lattice.steps[-1].tokens) if request.error is None else 0
        for request in dict.fromkeys([*made, *decoder.failed]):
            if request.prompt_slots is not None:
                self.prompts[id(request.result)] = request.prompt_slots
            if request.finished:
                yield self._close(self._numbers.pop(request), request.error or request.result)
        decoder.failed.clear()
        for request in reversed(decoder.preempted):
            self._waiting.appendleft(self._numbers.pop(request))
            self._full_at = len(decoder.requests)
            status.preempted += 1
        decoder.preempted.clear()

    def _close(
        self, i: int, outcome: GenerationResult | Exception
    ) -> tuple[int, GenerationResult | str]:
        self.status.done += 1
        if isinstance(outcome, GenerationResult):
            return i, outcome
        self.status.failed += 1
        return i, str(outcome)

    def _admit(self) -> Iterator[tuple[int, GenerationResult | str]]:
        """Start to read the prompts that come next, as many as there are places and memory for."""
        decoder = self._decoder
        running = len(decoder.requests)
        self.status.waiting_for_memory = False
        if self._full_at is not None and 0 < running >= self._full_at:
            self.status.waiting_for_memory = bool(self._waiting)
            return
        self._full_at = None
        requests: list[Request] = []
        shared = 0
        while self._waiting and running + len(requests) < self._batch_size:
            i = self._waiting[0]
            try:
                request = self._ready.pop(i, None) or self._new_run(i)
                self._require_memory(request)
            except TempoError as error:
                self._waiting.popleft()
                yield self._close(i, error)
                continue
            covered = (
                self._prompt_cache.covers(request.lattice.prompt_tokens)
                if self._prompt_cache
                else 0
            )
            if requests and (covered != shared or not self._read_together([*requests, request])):
                self._ready[i] = request
                break
            if not self._fits([*requests, request]) and (requests or decoder.requests):
                self._ready[i] = request
                self.status.waiting_for_memory = True
                break
            self._waiting.popleft()
            self._numbers[request] = i
            requests.append(request)
            shared = covered
        if requests:
            cache = self._prompt_cache.first(shared) if self._prompt_cache and shared else None
            decoder.start(requests, cache)

    def _require_memory(self, request: Request) -> None:
        """Raise CacheBudgetError if the prompt and one step do not fit, whoever else is there."""
        model = self._decoder.model
        needed = (request.length + 1) * model.slot_bytes + model.state_bytes
        if needed > self._max_kv_bytes:
            raise CacheBudgetError(
                f"the prompt's {request.length} tokens need a cache of {needed:,} bytes, "
                f"max_kv_bytes is {self._max_kv_bytes:,}; raise it, or shorten the prompt"
            )

    def _fits(self, newcomers: list[Request]) -> bool:
        """Whether all runs will probably fit to their end, sets as wide as they were so far."""
        status, requests = self.status, self._decoder.requests
        width = max(1.0, status.tokens / status.steps) if status.steps else 1.0
        slots = sum(
            len(request.sequence.held) + width * (request.limit - request.step)
            for request in requests
        )
        slots += sum(request.length + width * request.limit for request in newcomers)
        model = self._decoder.model
        # Those of a set are let go of once the next one has been read.
        states = 2 * width * (len(requests) + len(newcomers))
        return slots * model.slot_bytes + states * model.state_bytes <= self._max_kv_bytes

    def _read_together(self, requests: list[Request]) -> bool:
        """Whether the prompts fit into one forward pass; recurrent layers read one at a time."""
        prompts = {tuple(request.lattice.prompt_tokens) for request in requests}
        if self._decoder.model.is_recurrent and len(prompts) > 1:
            return False
        longest = max(request.length for request in requests)
        return longest * len(requests) <= min(
            request.settings.prefill_step_size for request in requests
        )

    def _note(self) -> None:
        decoder, status = self._decoder, self.status
        status.running, status.reading = len(decoder.requests), len(decoder.reading)
        status.waiting = len(self._waiting)
        status.seconds = time.perf_counter() - self._started
        status.cache_bytes = decoder.nbytes
        status.waste = decoder.batch.waste() if decoder.requests else 0.0
        status.largest_waste = max(status.largest_waste, status.waste)


def _as_python_writes(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
