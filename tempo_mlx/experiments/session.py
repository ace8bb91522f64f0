"""Run a suite with a model: check it, run what is not done, store the results."""

import gc
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arguments import MOST_BYTES, check_choice, check_count, check_range
from ..decode.request import Request
from ..errors import TempoError
from ..generation import begin
from ..models import Capture, PositionedModel
from ..text.vocabulary import Vocabulary
from ..weights.fingerprint import identify
from .capture import Recorder
from .running import Outcome, run_batched, run_one_by_one
from .store import SCHEMA, Store, read_manifest, size_of
from .suite import Plan, RunConfig, Suite, SuiteError
from .validation import Validation, cross_validate
from .workers import require_memory, run_in_workers, run_on_cluster

RUNNERS = ("batched", "sequential", "workers")

#: Default rows of a batch. Runs of a suite are short, so many fit.
BATCH_SIZE = 64

#: Default limit of the bytes of a suite's captures.
MAX_DISK = 10 * 10**9

#: Most processes that may run a suite.
MOST_WORKERS = 1024

#: What the first :class:`Status` says.
STARTING = "starting"

PACKAGES = ("tempo-mlx", "mlx", "mlx-lm", "numpy")


@dataclass(frozen=True)
class Options:
    """How to run a suite. No option changes a run's results.

    Args:
        runner: "batched" (runs are rows of one batch), "sequential" (one after another) or
            "workers" (in several processes).
        workers: number of processes, at least 1.
        scheduler: address of a Dask cluster to use instead.
        batch_size: rows of a batch, at least 1.
        max_kv_bytes: as for :func:`tempo_mlx.stream_batch_generate`.
        cross_validate: share of the runs to repeat alone and compare, [0, 1].
        max_disk: bytes that captures may take.

    Raises:
        TempoError: naming the option, its value and the allowed range.
    """

    runner: str = "batched"
    workers: int = 1
    scheduler: str | None = None
    batch_size: int = BATCH_SIZE
    max_kv_bytes: int | None = None
    cross_validate: float = 0.0
    max_disk: int = MAX_DISK

    def __post_init__(self) -> None:
        check_choice("runner", self.runner, RUNNERS)
        check_count("workers", self.workers, most=MOST_WORKERS)
        check_count("batch_size", self.batch_size)
        check_count("max_disk", self.max_disk, most=MOST_BYTES)
        check_range("cross_validate", self.cross_validate, 0, 1)

    def __str__(self) -> str:
        if self.scheduler is not None:
            return f"cluster {self.scheduler}"
        if self.runner == "workers":
            return f"workers={self.workers}"
        return f"batched, {self.batch_size} rows" if self.runner == "batched" else self.runner


@dataclass(frozen=True)
class Status:
    """The progress of a suite.

    Args:
        total, done, failed: numbers of runs.
        what: the current work.
    """

    total: int
    done: int
    failed: int
    what: str = ""


@dataclass(frozen=True)
class Summary:
    """The result of one command.

    Args:
        total, done, failed: numbers of runs of the suite.
        made: number of runs that this command ran.
        seconds: that they took.
        nbytes: of the folder.
        errors: of failed runs, by id.
        validation: None unless requested.
    """

    total: int
    done: int
    failed: int
    made: int
    seconds: float
    nbytes: int
    errors: dict[str, str]
    validation: Validation | None


class Session:
    """A suite, checked with its model and ready to run into a folder.

    Args:
        suite: to run.
        folder: of the results; created, or continued if it exists.
        model, tokenizer: as :func:`tempo_mlx.load` returns them, of the suite's ``model``.
        options: how to run it.

    Attributes:
        plan: the runs.
        capture_bytes: bytes that captures take at most.

    Raises:
        SuiteError: if the model cannot run the suite, naming the prompt or the setting.
        TempoError: if captures would take more than ``max_disk``, or memory is short.
    """

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        model: nn.Module | PositionedModel,
        tokenizer: Any,
        options: Options | None = None,
    ):
        self.suite, self.folder = suite, folder
        self.options = options or Options()
        self.model: PositionedModel | None = PositionedModel.of(model)
        self.tokenizer = tokenizer
        self.plan: Plan = suite.expand()
        self.identity = identify(self.model.model, tokenizer)
        self._facts = _facts(self.model)
        heads = self._facts["heads"]
        if len(heads) > 1 and suite.captures != "none":
            raise SuiteError(
                f"{self.model.architecture}: its layers have {heads} heads, and captures have one "
                "axis for them; use captures none"
            )
        self.capture_bytes = self._check()
        if self.capture_bytes > self.options.max_disk:
            raise TempoError(
                f"captures {suite.captures} take up to {self.capture_bytes / 1e6:,.1f} MB, more "
                f"than --max-disk {self.options.max_disk / 1e6:,.3f} MB; raise it, or capture less"
            )
        if self.options.scheduler is None and self.options.runner == "workers":
            require_memory(self.options.workers)
            if not self.options.cross_validate:
                # The workers load it.
                self.model = None

    def _check(self) -> int:
        """Prepare every run without running it; returns the most bytes that captures take."""
        assert self.model is not None
        vocabulary = Vocabulary(self.tokenizer)
        total = 0
        for config in self.plan.runs:
            observer = None if config.captures == "none" else Recorder(False, None, 0)
            try:
                result = begin(
                    self.model, self.tokenizer, config.prompt, config.settings, "", vocabulary
                )
                run = Request(result, observer=observer)
                if observer is not None and isinstance(result.model, PositionedModel):
                    result.model.require_capture()
            except TempoError as error:
                raise SuiteError(
                    f"suite {self.suite.name}, {config.prompt_id} ({config.condition}): {error}"
                ) from error
            layers, heads = self._facts["layers"], max(self._facts["heads"])
            total += capture_bytes(config, run.length, layers, heads)
        return total

    def run(
        self,
        tell: Callable[[Status], None] = lambda status: None,
        command: list[str] | None = None,
    ) -> Summary:
        """Run what is not done yet.

        Args:
            tell: called at the start and whenever runs have been stored.
            command: that the manifest records; by default this process's.

        Raises:
            LockedError: if another command uses the folder.
            DiskFullError: if the disk is full; what is stored stays valid.
            TempoError: if the folder holds another suite or another model's runs.
        """
        with Store(self.folder, self.suite, self.identity, self.plan.runs) as store:
            return self._run(store, tell, command or ["tempo-mlx", *sys.argv[1:]])

    def _run(self, store: Store, tell: Callable[[Status], None], command: list[str]) -> Summary:
        total, known = len(store.runs), set(store.done)
        groups = [
            group
            for group in self.plan.groups
            # Divergences need all runs of a group.
            if not known.issuperset(config.id(self.identity) for config in group)
        ]
        ids = [[config.id(self.identity) for config in group] for group in groups]
        session: dict[str, Any] = {
            "started": _now(),
            "command": shlex.join(command),
            "runner": str(self.options),
        }
        done = total - sum(map(len, groups))
        manifest = self._manifest(read_manifest(self.folder), session)
        store.write_manifest(manifest | {"runs": {"total": total, "done": done}})
        made = 0
        errors: dict[str, str] = {}
        tell(Status(total, done, 0, STARTING))
        started = time.perf_counter()
        for number, outcome in self._outcomes(groups, lambda i: store.start(ids[i])):
            store.commit(ids[number], outcome)
            made += len(outcome.runs)
            errors |= {
                run_id: run
                for run_id, run in zip(ids[number], outcome.runs, strict=True)
                if isinstance(run, str)
            }
            tell(Status(total, done + made - len(errors), len(errors), "running"))
        seconds = time.perf_counter() - started
        validation = None
        if self.options.cross_validate and store.done:
            assert self.model is not None
            validation = cross_validate(
                self.model,
                self.tokenizer,
                store,
                self.options.cross_validate,
                lambda run_id: tell(
                    Status(total, len(store.done), len(errors), f"repeating {run_id}")
                ),
            )
            manifest["cross_validation"] = asdict(validation)
        now_done = len(store.done)
        session |= {"finished": _now(), "made": made, "seconds": round(seconds, 3)}
        manifest |= {"finished": _now(), "runs": {"total": total, "done": now_done}}
        store.write_manifest(manifest)
        return Summary(
            total, now_done, len(errors), made, seconds, size_of(self.folder), errors, validation
        )

    def _outcomes(
        self, groups: list[list[RunConfig]], begin: Callable[[int], None]
    ) -> Iterator[tuple[int, Outcome]]:
        options, name = self.options, self.suite.model
        if not groups:
            return iter(())
        if options.scheduler is not None:
            return run_on_cluster(options.scheduler, name, self.identity, groups, begin)
        if options.runner == "workers":
            gc.collect()
            mx.clear_cache()
            return run_in_workers(name, self.identity, groups, options.workers, begin)
        assert self.model is not None
        if options.runner == "sequential":
            return run_one_by_one(self.model, self.tokenizer, groups, options.max_kv_bytes, begin)
        return run_batched(
            self.model, self.tokenizer, groups, options.batch_size, options.max_kv_bytes, begin
        )

    def _manifest(self, before: dict[str, Any], session: dict[str, Any]) -> dict[str, Any]:
        """The manifest: what was run and where; it keeps the sessions of earlier commands."""
        return {
            "schema": SCHEMA,
            "suite": self.suite.name,
            "model": self.suite.model,
            "fingerprint": self.identity,
            **self._facts,
            "device": str(mx.device_info().get("device_name", mx.default_device())),
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "notes": self.plan.notes,
            "created": before.get("created", session["started"]),
            "sessions": [*before.get("sessions", []), session],
            **{key: before[key] for key in ("cross_validation",) if key in before},
        }


def capture_bytes(config: RunConfig, prompt_tokens: int, layers: int, heads: int) -> int:
    """Bytes that the captures of a run take at most, before compression.

    Probabilities sum to 1, so a set has at most 1 / threshold tokens.

    Args:
        config: the run.
        prompt_tokens: tokens of its prompt.
        layers, heads: numbers of the model's attention layers and heads.
    """
    if config.captures == "none":
        return 0
    settings = config.settings
    least = min(settings.threshold, settings.final_threshold or settings.threshold)
    widest = max(1, min(settings.max_parallel, int(1 / least + 1e-6)))
    passes = settings.max_tokens - 1
    # Slots that the passes see: the prompt and the sets so far.
    entries = passes * prompt_tokens + widest * passes * (passes + 1) // 2
    total = 4 * layers * heads * (entries + passes)
    if config.captures == "full":
        total += 2 * layers * heads * widest * entries
    return total


def _facts(model: PositionedModel) -> dict[str, Any]:
    """The model in the manifest; heads are [0] if its attention cannot be captured."""
    heads = {0}
    if model.captures_attention:
        # Only shapes are read, so nothing is computed.
        token = mx.zeros((1, 1), mx.int32)
        _, attention = model(
            token, np.zeros((1, 1), int), "causal", model.make_cache(), Capture(full=True)
        )
        heads = {weights.shape[1] for weights in attention.values()}
    return {
        "architecture": model.architecture,
        "dtype": model.precision,
        "layers": model.n_layers,
        "heads": sorted(heads),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
