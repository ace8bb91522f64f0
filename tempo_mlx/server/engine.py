"""The thread that owns MLX: requests of many clients in one running batch."""

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from mlx_lm.generate import generation_stream, wired_limit

from ..decode.request import Request
from ..decode.result import GenerationResult
from ..decode.scheduler import BATCH_SIZE, BatchStatus, Scheduler, default_budget
from ..errors import TempoError
from ..generation import begin
from ..models import PositionedModel
from ..settings import Settings
from ..text.vocabulary import Prompt, Vocabulary

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds for which the thread sleeps when there is no request.
IDLE = 3600.0


class QueueFullError(TempoError):
    """More requests wait than the server lets wait."""


class FailedRequestError(TempoError):
    """A request failed by a fault of ours, which the log has."""


class EngineStoppedError(RuntimeError):
    """The thread that owns the model has ended."""


class Listener(Protocol):
    """Hears of one request, on the engine's thread: it must return at once."""

    def stepped(self, request: Request) -> None:
        """The request has taken a step."""
        ...

    def ended(self, outcome: GenerationResult | Exception) -> None:
        """The request has its result, or has failed."""
        ...


@dataclass(frozen=True)
class Counts:
    """What has happened since the start.

    Args:
        requests, failed, cancelled: generations.
        prompt_tokens, cached_tokens: of prompts, and those of them that had been read before.
        generated_tokens: tokens in sets.
    """

    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Engine:
    """Runs generations and other work on the model, on a thread of its own.

    Methods may be called from any thread.

    Args:
        model: reads the tokens.
        tokenizer: mlx-lm's wrapper.
        name: of the model, in results.
        batch_size: generations that run at the same time, at least 1.
        max_kv_bytes: bytes that keys, values and states may take; None is half of the memory that
            the model leaves.
        max_queue: generations that may wait for a place, at least 0.
    """

    def __init__(
        self,
        model: PositionedModel,
        tokenizer: Any,
        name: str,
        batch_size: int = BATCH_SIZE,
        max_kv_bytes: int | None = None,
        max_queue: int = 256,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.vocabulary = Vocabulary(tokenizer)
        self._batch_size = batch_size
        self._budget = max_kv_bytes or default_budget()
        self._max_queue = max_queue
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scheduler = self._new_scheduler()
        self._listeners: dict[int, Listener] = {}
        self._numbers = itertools.count()
        self._ending = False
        self._lock = threading.Lock()
        self._open = 0  # generations without an outcome
        self._counts = Counts()
        self._thread = threading.Thread(target=self._run, name="tempo-mlx engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what still runs, and end the thread; returns once it has ended."""

        def end() -> None:
            for number in list(self._listeners):
                self._cancel(number)
            self._ending = True

        self._commands.put(end)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def status(self) -> BatchStatus:
        """How full the batch is."""
        return self._scheduler.status

    @property
    def prefix_bytes(self) -> int:
        """Bytes of what is kept of prompts and answers."""
        prefixes = self._scheduler.prefixes
        return 0 if prefixes is None else prefixes.nbytes

    @property
    def counts(self) -> Counts:
        return self._counts

    def generate(
        self,
        prompt: Prompt,
        settings: Settings,
        listener: Listener,
        logprobs: bool = False,
        paths: int = 0,
    ) -> int:
        """Submit a generation; returns its number, for :meth:`cancel`.

        Args:
            prompt, settings, paths: as in :func:`tempo_mlx.generate`.
            listener: hears of its steps and its outcome; what is wrong with the prompt or the
                settings is an outcome.
            logprobs: keep each step's log-probabilities in ``request.logprobs`` for the listener.

        Raises:
            QueueFullError: if too many wait.
            EngineStoppedError: if the thread has ended.
        """
        self._require_alive()
        with self._lock:
            if self._open >= self._batch_size + self._max_queue:
                raise QueueFullError(f"{self._open} requests run or wait; try again later")
            self._open += 1
        number = next(self._numbers)

        def make() -> Request:
            try:
                result = begin(
                    self.model, self.tokenizer, prompt, settings, self.name, self.vocabulary
                )
                return Request(result, paths=paths, logprobs=logprobs)
            except TempoError:
                raise
            except Exception as error:
                logger.exception("a request could not begin")
                raise FailedRequestError(f"{type(error).__name__}: {error}") from error

        def submit() -> None:
            self._listeners[number] = listener
            self._scheduler.submit(number, make)

        self._commands.put(submit)
        return number

    def cancel(self, number: int) -> None:
        """Let a generation go at the next step; nothing happens where it has ended."""
        self._commands.put(partial(self._cancel, number))

    def _cancel(self, number: int) -> None:
        if self._listeners.pop(number, None) is not None:
            self._scheduler.cancel(number)
            self._close(cancelled=1)

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Do other work with the model between two steps; returns what it gives.

        Raises:
            EngineStoppedError: if the thread has ended.
        """
        self._require_alive()
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # It belongs to whoever asked.
                future.set_exception(error)

        self._commands.put(run)
        return future

    def _require_alive(self) -> None:
        if not self._thread.is_alive():
            raise EngineStoppedError("the thread that owns the model has ended")

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.model, self._batch_size, self._budget, keeps_prefixes=True)

    def _run(self) -> None:
        with wired_limit(self.model.model, cast(Any, [generation_stream])):
            while not self._ending or self._scheduler.left:
                self._do_commands()
                if self._scheduler.left:
                    self._tick()

    def _do_commands(self) -> None:
        """Everything that was asked for; waits for something where no generation runs."""
        try:
            wait = not self._scheduler.left and not self._ending
            self._commands.get(block=wait, timeout=IDLE if wait else None)()
            while True:
                self._commands.get(block=False)()
        except queue.Empty:
            pass

    def _tick(self) -> None:
        try:
            outcomes = self._scheduler.tick()
        except Exception as error:
            # Nobody knows whose it is: all that run fail, and those to come find a working batch.
            logger.exception("a step failed; %d requests end", len(self._listeners))
            self._scheduler = self._new_scheduler()
            outcomes = [(number, error) for number in self._listeners]
        for key, request in self._scheduler.stepped:
            if request.error is None and key in self._listeners:
                self._listeners[key].stepped(request)
        for key, outcome in outcomes:
            listener = self._listeners.pop(cast(int, key))
            if isinstance(outcome, GenerationResult):
                lattice = outcome.lattice
                self._close(
                    prompt=len(lattice.prompt_tokens),
                    cached=outcome.stats.cached_tokens,
                    generated=lattice.n_tokens,
                )
            else:
                self._close(failed=1)
            listener.ended(outcome)

    def _close(
        self,
        failed: int = 0,
        cancelled: int = 0,
        prompt: int = 0,
        cached: int = 0,
        generated: int = 0,
    ) -> None:
        with self._lock:
            self._open -= 1
        counts = self._counts
        self._counts = Counts(
            counts.requests + 1,
            counts.failed + failed,
            counts.cancelled + cancelled,
            counts.prompt_tokens + prompt,
            counts.cached_tokens + cached,
            counts.generated_tokens + generated,
        )
