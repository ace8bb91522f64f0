"""The scheduler of a batch: which prompts are in it, and which wait."""

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import TempoError
from ..models import PositionedModel, SlotStore
from .decoder import BatchDecoder, CacheBudgetError
from .prefix_cache import PrefixCache
from .prompt_cache import PromptCache, read_by
from .request import Request
from .result import GenerationResult

#: What names a request.
Key = Hashable

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
    """Lets requests into a decoder while they fit, in the order in which they were submitted.

    Args:
        model: reads the tokens.
        batch_size: requests that generate at the same time.
        max_kv_bytes: bytes of keys, values and recurrent states.
        prompt_cache: of a beginning that prompts may have.
        keeps_prefixes: keep what requests have read, for those that begin with it, in the bytes
            that those that run leave.
    """

    def __init__(
        self,
        model: PositionedModel,
        batch_size: int,
        max_kv_bytes: int,
        prompt_cache: PromptCache | None = None,
        keeps_prefixes: bool = False,
    ):
        #: what requests have read; None where it is not kept
        self.prefixes = PrefixCache() if keeps_prefixes else None
        self._decoder = BatchDecoder(model, max_kv_bytes, self.prefixes)
        self._batch_size = batch_size
        self._max_kv_bytes = max_kv_bytes
        self._prompt_cache = prompt_cache
        self._waiting: deque[Key] = deque()
        self._makers: dict[Key, Callable[[], Request]] = {}  # of all without an outcome
        self._ready: dict[Key, Request] = {}  # requests that were made and could not start yet
        self._keys: dict[Request, Key] = {}
        #: requests in the batch when one was preempted: none is admitted until one has left
        self._full_at: int | None = None
        self.status = BatchStatus()
        self._started = time.perf_counter()
        #: requests that took a step in the last :meth:`tick`, and their keys
        self.stepped: list[tuple[Key, Request]] = []
        #: slots of the prompts of results that will be rescored
        self.prompts: dict[GenerationResult, SlotStore] = {}

    def submit(self, key: Key, make: Callable[[], Request]) -> None:
        """Let a request wait for its place.

        Args:
            key: names it; different from those without an outcome.
            make: makes the request when its turn comes, and again where it has to start again;
                TempoError fails it.
        """
        self._makers[key] = make
        self._waiting.append(key)
        self.status.total += 1
        self.status.waiting += 1

    def cancel(self, key: Key) -> None:
        """Forget a request; where its prompt is being read, as soon as that is done."""
        if self._makers.pop(key, None) is None:
            return
        self._ready.pop(key, None)
        if key in self._waiting:
            self._waiting.remove(key)
        for request, known in list(self._keys.items()):
            if known == key and request in self._decoder.requests:
                del self._keys[request]
                self._decoder.leave(request)
        self.status.done += 1
        self._note()

    @property
    def left(self) -> int:
        """Requests without an outcome."""
        return self.status.total - self.status.done

    def outcomes(
        self, progress: Callable[[BatchStatus], None]
    ) -> Iterator[tuple[Key, GenerationResult | Exception]]:
        """(key, result or what failed) of all requests, as they finish."""
        while self.left:
            yield from self.tick()
            progress(self.status)

    def tick(self) -> list[tuple[Key, GenerationResult | Exception]]:
        """Admit who fits, read a chunk of prompts, take a step; the outcomes of those that finish.

        Does nothing if no requests are left.
        """
        decoder = self._decoder
        self.stepped = []
        finished: list[tuple[Key, GenerationResult | Exception]] = []
        if not decoder.reading:
            finished += self._admit()
        if decoder.reading:
            decoder.read()
            self._drop_cancelled()
        if decoder.requests:
            finished += self._step()
        self._note()
        return finished

    def _drop_cancelled(self) -> None:
        for request in [each for each in self._decoder.requests if each in self._keys]:
            if self._keys[request] not in self._makers:
                del self._keys[request]
                self._decoder.leave(request)

    def _step(self) -> Iterator[tuple[Key, GenerationResult | Exception]]:
        decoder = self._decoder
        made = decoder.step()
        self.stepped = [(self._keys[request], request) for request in made]
        status = self.status
        status.passes += 1
        status.steps += len(made)
        for request in made:
            status.tokens += len(request.lattice.steps[-1].tokens) if request.error is None else 0
        for request in dict.fromkeys([*made, *decoder.failed]):
            if request.prompt_slots is not None:
                self.prompts[request.result] = request.prompt_slots
            if request.finished:
                self._keep_prefix(request)
                yield self._close(self._keys.pop(request), request.error or request.result)
        decoder.failed.clear()
        for request in reversed(decoder.preempted):
            self._waiting.appendleft(self._keys.pop(request))
            self._full_at = len(decoder.requests)
            status.preempted += 1
        decoder.preempted.clear()

    def _keep_prefix(self, request: Request) -> None:
        """Hold what a run has read and said."""
        if self.prefixes is None or request.error is not None or request.slots is None:
            return
        read = read_by(request, request.slots, request.result.known_best() or [])
        request.slots = None
        if read is not None:
            slots = np.arange(len(read.tokens))
            self.prefixes.insert(read.tokens, read.cache, 0, slots)
            self._shrink_prefixes()

    def _close(
        self, key: Key, outcome: GenerationResult | Exception
    ) -> tuple[Key, GenerationResult | Exception]:
        del self._makers[key]
        self.status.done += 1
        self.status.failed += isinstance(outcome, Exception)
        return key, outcome

    def _admit(self) -> Iterator[tuple[Key, GenerationResult | Exception]]:
        """Start to read the prompts that come next, as many as there are places and memory for."""
        decoder = self._decoder
        running = len(decoder.requests)
        self.status.waiting_for_memory = False
        if self._full_at is not None and 0 < running >= self._full_at:
            self.status.waiting_for_memory = bool(self._waiting)
            return
        self._full_at = None
        requests: list[Request] = []
        shared: list[int] = []
        while self._waiting and running + len(requests) < self._batch_size:
            key = self._waiting[0]
            try:
                request = self._ready.pop(key, None) or self._makers[key]()
                self._require_memory(request)
            except TempoError as error:
                self._waiting.popleft()
                yield self._close(key, error)
                continue
            known = self._known(request.lattice.prompt_tokens)
            if requests and (known != shared or not self._read_together([*requests, request])):
                self._ready[key] = request
                break
            if not self._fits([*requests, request]) and (requests or decoder.requests):
                self._ready[key] = request
                self.status.waiting_for_memory = True
                break
            self._waiting.popleft()
            self._keys[request] = key
            requests.append(request)
            shared = known
            request.result.stats.cached_tokens = len(known)
            request.keeps_slots = self.prefixes is not None
        if requests:
            cache = self._read_before(shared)
            self._shrink_prefixes()
            decoder.start(requests, cache)

    def _known(self, prompt: list[int]) -> list[int]:
        """The first tokens of a prompt that need not be read."""
        known = self._prompt_cache if self.prefixes is None else self.prefixes
        return [] if known is None else prompt[: known.covers(prompt)]

    def _read_before(self, known: list[int]) -> SlotStore | None:
        """A cache of one row that has read these tokens; None where there are none."""
        if not known:
            return None
        if self.prefixes is not None:
            return self.prefixes.first(known, len(known))
        assert self._prompt_cache is not None
        return self._prompt_cache.first(len(known))

    def _shrink_prefixes(self) -> None:
        """Leave the memory to those that run, as much as they will probably need."""
        if self.prefixes is not None:
            taken = max(self._decoder.nbytes, self._needed(list(self._keys)))
            self.prefixes.shrink(self._max_kv_bytes - taken)

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
        return self._needed([*self._decoder.requests, *newcomers]) <= self._max_kv_bytes

    def _needed(self, requests: list[Request]) -> int:
        """Bytes that runs will probably need to their end, sets as wide as they were so far."""
        status, model = self.status, self._decoder.model
        width = max(1.0, status.tokens / status.steps) if status.steps else 1.0
        slots = sum(
            max(request.length, request.sequence.n_held) + width * (request.limit - request.step)
            for request in requests
        )
        # A set's states are dropped once the next set has been read.
        states = 2 * width * len(requests)
        return int(slots * model.slot_bytes + states * model.state_bytes)

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
