"""The scheduler of a batch: which prompts are in it, and which wait."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..errors import TempoError
from ..lattice.result import GenerationResult
from ..models import BatchedKVCache, PositionedModel
from .decoder import BatchDecoder, CacheBudgetError
from .prompt_cache import PromptCache
from .request import Request

#: Prompts that generate at the same time, unless the caller says how many.
BATCH_SIZE = 32

#: Share of the device's memory that keys and values may take, unless the caller says how much.
MEMORY_SHARE = 0.5


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
