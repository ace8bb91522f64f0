"""Groups of runs in other processes, here or on a cluster, each with a model of its own."""

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

#: Times that a group is begun before it is given up, because the process died every time.
ATTEMPTS = 3

#: Share of the memory which is free that workers may take.
MEMORY_SHARE = 0.9

#: Variables that say how many threads a process computes with.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

#: Seconds to wait for a cluster's scheduler.
PATIENCE = 10

#: A process has one model, and mlx computes for one caller at a time.
_ALONE = threading.Lock()


class ClusterError(TempoError):
    """A cluster that cannot be used; one line that says why."""


@lru_cache(maxsize=1)
def _model(name: str, identity: str) -> tuple[PositionedModel, Any]:
    """The process's model, loaded once.

    Raises:
        ValueError: if what goes by that name here is another model.
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
        identity: what :func:`tempo_mlx.weights.fingerprint.identify` must be there.
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
    """Run groups in processes of this machine; yields (number, outcome) as they finish.

    A process that dies is replaced, and its group is run again.

    Args:
        name, identity: as of :func:`perform`.
        groups: at least one.
        workers: processes, at least 1.
        begin: called with the number of a group before it is run.
    """
    waiting = deque(range(len(groups)))
    attempts = [0] * len(groups)
    idle = [_Worker() for _ in range(min(workers, len(groups)))]
    busy: dict[Future[Outcome], tuple[_Worker, int]] = {}
    # What the processes are started with; each computes with its share of the processors.
    given = {variable: os.environ.get(variable) for variable in THREADS}
    share = str(max(1, (os.cpu_count() or 1) // workers))
    os.environ.update({variable: given[variable] or share for variable in THREADS})
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
                    worker = _Worker()
                    if attempts[number] < ATTEMPTS:
                        waiting.appendleft(number)
                    else:
                        error = f"the process that ran it died {ATTEMPTS} times"
                        yield number, Outcome([error] * len(groups[number]), [])
                else:
                    yield number, outcome
                idle.append(worker)
    finally:
        for variable, value in given.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value
        for worker in [*idle, *(each for each, _ in busy.values())]:
            worker.close()


class _Worker:
    """One process, which ends when this one does."""

    def __init__(self) -> None:
        # Not by fork: mlx and BLAS have threads, of which a fork copies none.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_obey_parent)

    def submit(self, name: str, identity: str, group: Group) -> "Future[Outcome]":
        return self._pool.submit(perform, name, identity, group)

    def close(self) -> None:
        """End the process after what it is doing."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _obey_parent() -> None:
    """Leave Ctrl-C to the process that started this one, and end when it is gone."""
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

    Which worker runs what, and what becomes of the tasks of workers that are lost, is Dask's.

    Args:
        address: of the scheduler, "tcp://host:port".
        name, identity, groups: as of :func:`run_in_workers`; every worker loads the model by that
            name.
        begin: called with the number of each group when it is handed over.

    Raises:
        ClusterError: if there is no scheduler, or a task failed.
        ImportError: without the extra ``cluster``.
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
            except Exception as error:
                raise ClusterError(f"a worker of {address} failed: {error}") from error
            future.release()
            yield number, outcome


def require_memory(workers: int) -> None:
    """Raise ValueError unless there is memory for so many processes like this one.

    Called once the model is loaded here: what this process holds, a worker will need.
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
