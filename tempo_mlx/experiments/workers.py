"""Groups of runs in other processes, here or on a cluster. Each process loads the model."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from typing import Any

import mlx.core as mx

from ..errors import MissingExtraError, TempoError
from ..models import PositionedModel
from ..weights import load
from ..weights.fingerprint import identify
from .running import Group, Outcome, run_group

#: How often a group is tried if its process dies every time.
ATTEMPTS = 3

#: Share of the free memory that workers may take.
MEMORY_SHARE = 0.9

#: Environment variables that set how many threads a process computes with.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

#: Seconds to wait for a cluster's scheduler.
PATIENCE = 10

#: Held while a group runs: a process has one model, and mlx computes for one caller at a time.
_ALONE = threading.Lock()


class ClusterError(TempoError):
    """A cluster cannot be used."""


@lru_cache(maxsize=1)
def _model(name: str, identity: str) -> tuple[PositionedModel, Any]:
    """The process's model, loaded once.

    Raises:
        TempoError: if the name stands for another model on this machine.
    """
    model, tokenizer = load(name)
    found = identify(model, tokenizer)
    if found != identity:
        raise TempoError(f"{name} is another model on {os.uname().nodename}: {found}")
    return PositionedModel.of(model), tokenizer


def perform(name: str, identity: str, group: Group) -> Outcome:
    """Run a group in this process, with the model of that name.

    Args:
        name: recipe, folder or Hub id.
        identity: fingerprint that the model must have.
        group: runs that differ in visibility only.
    """
    with _ALONE:
        model, tokenizer = _model(name, identity)
        return run_group(model, tokenizer, group)


def run_in_workers(
    name: str,
    identity: str,
    groups: Sequence[Group],
    workers: int,
    begin: Callable[[int], None],
) -> Iterator[tuple[int, Outcome]]:
    """Run groups in processes on this machine; yields (number, outcome) as they finish.

    A process that dies is replaced, and its group is run again.

    Args:
        name, identity: see :func:`perform`.
        groups: at least one.
        workers: processes, at least 1.
        begin: called with the number of a group before it is run.
    """
    waiting = deque(range(len(groups)))
    attempts = [0] * len(groups)
    threads = max(1, (os.cpu_count() or 1) // workers)
    idle = [_Worker(threads) for _ in range(min(workers, len(groups)))]
    busy: dict[Future[Outcome], tuple[_Worker, int]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker, number = idle.pop(), waiting.popleft()
                attempts[number] += 1
                begin(number)
                future = worker.submit(name, identity, groups[number])
                busy[future] = worker, number
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, number = busy.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    worker.close()
                    worker = _Worker(threads)
                    if attempts[number] < ATTEMPTS:
                        waiting.appendleft(number)
                    else:
                        error = f"the process that ran it died {ATTEMPTS} times"
                        yield number, Outcome([error] * len(groups[number]), [])
                else:
                    yield number, outcome
                idle.append(worker)
    finally:
        for worker in [*idle, *(each for each, _ in busy.values())]:
            worker.close()


class _Worker:
    """One process, which ends when this one does.

    Args:
        threads: that it computes with, unless the environment says how many.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # Not by fork: it would not copy the threads of mlx and BLAS.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_obey_parent)

    def submit(self, name: str, identity: str, group: Group) -> "Future[Outcome]":
        # The first call starts the process, which inherits the environment.
        missing = {name: str(self._threads) for name in THREADS if name not in os.environ}
        os.environ.update(missing)
        try:
            return self._pool.submit(perform, name, identity, group)
        finally:
            for variable in missing:
                del os.environ[variable]

    def close(self) -> None:
        """End the process after its current group."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _obey_parent() -> None:
    """Leave Ctrl-C to the parent process, and end when that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_on_cluster(
    address: str,
    name: str,
    identity: str,
    groups: Sequence[Group],
    begin: Callable[[int], None],
) -> Iterator[tuple[int, Outcome]]:
    """Run groups as tasks of a Dask cluster; yields (number, outcome) as they finish.

    Dask chooses the workers, and retries the tasks of workers that are lost.

    Args:
        address: of the scheduler, "tcp://host:port".
        name, identity, groups: as for :func:`run_in_workers`; every worker loads the model.
        begin: called with the number of each group when it is submitted.

    Raises:
        ClusterError: if there is no scheduler, or a worker cannot run a task.
        MissingExtraError: without the extra ``cluster``.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
    except ImportError as error:
        raise MissingExtraError(
            "--scheduler needs Dask: pip install 'tempo-mlx[cluster]'"
        ) from error
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"--scheduler {address} cannot be reached: {error}") from error
    with client:
        futures = {}
        for number, group in enumerate(groups):
            begin(number)
            futures[client.submit(perform, name, identity, group, pure=False)] = number
        finished = as_completed(list(futures), loop=client.loop)
        for future in finished:
            number = futures.pop(future)
            try:
                outcome = future.result()
            except KilledWorker as lost:
                why = f"the workers that ran it were lost: {lost}"
                outcome = Outcome([why] * len(groups[number]), [])
            except (TempoError, ImportError, OSError) as error:
                raise ClusterError(f"a worker of {address} failed: {error}") from error
            future.release()
            yield number, outcome


def require_memory(workers: int) -> None:
    """Raise TempoError unless there is memory for so many processes like this one.

    Call it once the model is loaded: a worker will need as much memory as this process has.
    """
    import psutil

    held = max(psutil.Process().memory_info().rss, mx.get_active_memory())
    free = psutil.virtual_memory().available
    if workers * held > MEMORY_SHARE * free:
        most = int(MEMORY_SHARE * free // held)
        advice = f"use workers={most} or batched" if most else "use batched"
        raise TempoError(
            f"--runner workers={workers} needs {workers * held / 1e9:.1f} GB, "
            f"{held / 1e9:.1f} GB each, and {free / 1e9:.1f} GB are free; {advice}"
        )
