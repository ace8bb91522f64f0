"""The folder of a suite. Its files say which runs are done.

A run is done when its results are there. They are written last, and name the run's other files with
their digests. Every file appears whole or not at all, so the folder is valid whenever a command
dies. The next command removes what belongs to unfinished runs, and repeats runs with damaged files.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from ..errors import TempoError
from ..io.files import leftovers, write_atomically
from .capture import AXES, MATRIX_AXES, Pair
from .lock import Lock
from .running import Outcome, Record
from .suite import RunConfig, Suite
from .suite_keys import by_new_names

#: Version of the folder's layout.
SCHEMA = 2

SUITE, MANIFEST = "suite.yaml", "manifest.json"
RESULTS, CAPTURES, KL = "results", "captures", "kl"
FOLDERS = (RESULTS, CAPTURES, KL)

#: Endings of a run's files: results, reductions, compressed matrices.
PARQUET, REDUCTIONS, MATRICES = ".parquet", ".safetensors", ".matrices.safetensors.zst"
CODEC = "zstd"

#: States of a run.
PENDING, RUNNING, FAILED, DONE = "pending", "running", "failed", "done"

#: Ending of the file in ``results`` that shows a state, the weakest first. A failure's file says
#: why the run failed.
MARKS = {RUNNING: ".running", FAILED: ".failed", DONE: PARQUET}

#: Keys of a suite that change no run: a model folder may move.
UNIMPORTANT = {"description", "model"}

#: Names of our files: a dot while they are written, the ids of one run or two, an ending.
OURS = re.compile(r"(\.?)([0-9a-f]{16}(?:-[0-9a-f]{16})?)\.")

#: Key of the metadata in a Parquet file.
METADATA = b"tempo_mlx"

TOKENS = pa.schema(
    [
        ("step", pa.int32()),
        ("position", pa.int32()),
        ("slot", pa.int32()),
        ("id", pa.int32()),
        ("text", pa.string()),
        ("probability", pa.float32()),
        ("set_size", pa.int32()),
        ("pruned_at", pa.int32()),
    ]
)
DIVERGENCES = pa.schema([("step", pa.int32()), ("kl_ab", pa.float64()), ("kl_ba", pa.float64())])


class DiskFullError(OSError):
    """The disk is full. The files that were stored before are whole."""


class Store:
    """A suite's folder, open for writing.

    Args:
        folder: created if it does not exist.
        suite: the suite to run; a folder holds one suite.
        fingerprint: of the model.
        runs: of the suite, in its order.

    Attributes:
        runs: by id.
        done: ids of the runs that are done.

    Raises:
        TempoError: if another command uses the folder, or if it holds another suite, runs of
            another model or unrelated files with our names.
        DiskFullError: if the disk is full; also raised by every method that writes.
    """

    def __init__(self, folder: Path, suite: Suite, fingerprint: str, runs: Sequence[RunConfig]):
        self.folder = folder
        self.fingerprint = fingerprint
        self.runs = {run.id(fingerprint): run for run in runs}
        self.done: set[str] = set()
        # Checked before anything is created, and again under the lock.
        self._check(suite)
        try:
            for name in FOLDERS:
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder)
        except OSError as error:
            raise TempoError(f"--output {folder} cannot be written: {error.strerror}") from error
        try:
            self._check(suite)
            if not (folder / SUITE).exists():
                with self._full_disk("the suite"):
                    text = yaml.safe_dump(suite.to_dict(), sort_keys=False, allow_unicode=True)
                    write_atomically(folder / SUITE, text)
            self.done = done_runs(folder) - set(damaged(folder))
            self._remove_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _check(self, suite: Suite) -> None:
        """Refuse a folder that holds something else."""
        check_folder(self.folder)
        if (self.folder / SUITE).exists():
            there, here = by_new_names(read_suite_file(self.folder)), suite.to_dict()
            for key in here:
                if key not in UNIMPORTANT and there.get(key) != here[key]:
                    raise TempoError(
                        f"{self.folder} holds a suite with other {key}; choose another --output"
                    )
        manifest = read_manifest(self.folder)
        if manifest.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise TempoError(
                f"{self.folder} holds runs of another model, {manifest.get('model')} with "
                f"fingerprint {manifest['fingerprint']}, not {self.fingerprint}; choose another "
                "--output"
            )
        if (self.folder / SUITE).exists() and not done_runs(self.folder) <= self.runs.keys():
            raise TempoError(
                f"{self.folder} holds runs that another version of tempo-mlx, or of a rule of "
                "yours, made of this suite; choose another --output"
            )

    def _remove_leftovers(self) -> None:
        """Remove files of runs that are not done, and files that a dead process was writing."""
        marks = (MARKS[RUNNING], MARKS[FAILED])
        for path in (path for name in FOLDERS for path in (self.folder / name).iterdir()):
            match = OURS.match(path.name)
            if match is None:
                continue
            owners = match[2].split("-")
            if match[1] or path.suffix in marks or self.done.isdisjoint(owners):
                path.unlink()
        for name in (SUITE, MANIFEST):
            for path in leftovers(self.folder / name):
                path.unlink()

    def start(self, run_ids: Sequence[str]) -> None:
        """Mark runs as running."""
        for run_id in run_ids:
            with self._full_disk(f"run {run_id}"):
                self._mark(run_id, RUNNING).touch()

    def commit(self, run_ids: Sequence[str], outcome: Outcome) -> None:
        """Store the outcome of a group of runs."""
        records = {
            run_id: run
            for run_id, run in zip(run_ids, outcome.runs, strict=True)
            if isinstance(run, Record)
        }
        files: dict[str, dict[str, str]] = {run_id: {} for run_id in records}
        for pair in outcome.pairs:
            a, b = run_ids[pair.a], run_ids[pair.b]
            if a in records and b in records:
                with self._full_disk(f"runs {a} and {b}"):
                    written = self._write(f"{KL}/{a}-{b}{PARQUET}", _pair(pair, a, b))
                files[a] |= written
                files[b] |= written
        for run_id, run in zip(run_ids, outcome.runs, strict=True):
            with self._full_disk(f"run {run_id}"):
                if isinstance(run, str):
                    write_atomically(self._mark(run_id, FAILED), run)
                else:
                    for name, data in _captures(run_id, run):
                        files[run_id] |= self._write(name, data)
                    results = _results(run_id, run, self._configuration(run_id), files[run_id])
                    write_atomically(self._mark(run_id, DONE), results)
                    self.done.add(run_id)
            self._mark(run_id, RUNNING).unlink(missing_ok=True)

    def _mark(self, run_id: str, state: str) -> Path:
        return self.folder / RESULTS / f"{run_id}{MARKS[state]}"

    def _configuration(self, run_id: str) -> dict[str, Any]:
        """What a run is, its place in the suite included."""
        run = self.runs[run_id]
        return {
            **run.to_dict(),
            "place": list(self.runs).index(run_id),
            "prompt_id": run.prompt_id,
            "category": run.category,
            "condition": run.condition,
            "varied": run.varied,
        }

    def _write(self, name: str, data: bytes) -> dict[str, str]:
        """Write a file; returns its name and digest."""
        write_atomically(self.folder / name, data)
        return {name: _sha256(data)}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        with self._full_disk("the manifest"):
            write_atomically(
                self.folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
            )

    @contextmanager
    def _full_disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                errno.ENOSPC,
                f"the disk is full, {what} cannot be stored; {len(self.done)} runs are done and "
                "whole, free some space and run the command again",
                str(self.folder),
            ) from error

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_folder(folder: Path) -> None:
    """Raise TempoError if a folder cannot be a suite's."""
    if folder.exists() and not folder.is_dir():
        raise TempoError(f"--output {folder} cannot be written: {os.strerror(errno.ENOTDIR)}")
    if read_manifest(folder) and not (folder / SUITE).exists():
        # The suite is stored first.
        raise TempoError(f"{folder} holds a {MANIFEST} but no {SUITE}; choose another --output")


def read_suite_file(folder: Path) -> dict[str, Any]:
    """The suite in a folder, with its defaults.

    Raises:
        TempoError: if there is none.
    """
    try:
        data = yaml.safe_load((folder / SUITE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TempoError(f"{folder} holds no suite: there is no {SUITE}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TempoError(f"{folder / SUITE} is damaged") from error
    return data if isinstance(data, dict) else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder; empty if there is none.

    Raises:
        TempoError: if it is damaged, not a suite's, or of another version.
    """
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise TempoError(
            f"{folder / MANIFEST} is damaged; delete it, the next run of the suite writes it again"
        )
    if "fingerprint" not in data:
        raise TempoError(f"{folder} holds a {MANIFEST} of something else; choose another --output")
    _check_schema(folder, data)
    manifest: dict[str, Any] = data
    return manifest


def _check_schema(folder: Path, data: dict[str, Any]) -> None:
    if data.get("schema") != SCHEMA:
        raise TempoError(
            f"{folder} was written by a version of tempo-mlx with folder layout "
            f"{data.get('schema')}, this version reads {SCHEMA}; use that version, or run the "
            "suite again into another folder"
        )


def states(folder: Path) -> dict[str, str]:
    """State of every run that has left a file; the others are pending."""
    found: dict[str, str] = {}
    for state, ending in MARKS.items():
        for path in (folder / RESULTS).glob(f"*{ending}"):
            if OURS.fullmatch(f"{path.stem}."):
                found[path.stem] = state
    return found


def done_runs(folder: Path) -> set[str]:
    """Ids of the runs whose results are there, damaged or not."""
    return {run_id for run_id, state in states(folder).items() if state == DONE}


def damaged(folder: Path) -> list[str]:
    """Done runs with a file that is missing or does not hold what was written."""
    found = []
    for run_id in done_runs(folder):
        try:
            _, whole = _read_results(folder, run_id)
            for name in whole["files"]:
                _read_file(folder, name, whole)
        except TempoError:
            found.append(run_id)
    return found


def read_configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Configuration of each done run, in the order of the suite."""
    found = {
        run_id: _read_results(folder, run_id)[1]["configuration"] for run_id in done_runs(folder)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["place"]))


def read_run(folder: Path, run_id: str) -> Record:
    """The record of a run, without its matrices.

    Raises:
        TempoError: if a file of it is missing or damaged.
    """
    tokens, whole = _read_results(folder, run_id)
    arrays, captures = {}, f"{CAPTURES}/{run_id}{REDUCTIONS}"
    if captures in whole["files"]:
        arrays = load_arrays(_read_file(folder, captures, whole))
    return Record(
        tokens=tokens,
        prompt_tokens=whole["prompt_tokens"],
        text=whole["text"],
        finish_reason=whole["finish_reason"],
        n_steps=whole["n_steps"],
        seconds=whole["seconds"],
        arrays=arrays,
        texts={int(id): text for id, text in whole["texts"].items()},
    )


def _read_results(folder: Path, run_id: str) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """A run's columns of tokens, and the metadata of their file."""
    name = f"{RESULTS}/{run_id}{PARQUET}"
    try:
        table = pq.read_table(folder / name)
        whole = json.loads((table.schema.metadata or {})[METADATA])
        columns = table.to_pydict()
        if whole.pop("digest") != _digest(whole, columns):
            raise TempoError("its content has changed")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _damage(folder, name, error) from error
    _check_schema(folder, whole)
    return columns, whole


def _read_file(folder: Path, name: str, whole: dict[str, Any]) -> bytes:
    """A file of a run, checked against the digest in the run's results."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _damage(folder, name, error) from error
    if _sha256(data) != whole["files"][name]:
        raise _damage(folder, name, "its content has changed")
    return data


def _damage(folder: Path, name: str, why: object) -> TempoError:
    return TempoError(f"{folder / name} is damaged or missing: {why}; run the suite again")


def read_matrices(folder: Path, run_id: str) -> dict[str, np.ndarray]:
    """Attention matrices of a run: ``attention.<step>`` [layer, head, query, key], fp16, and
    ``slots.<step>``, the slots of their keys."""
    path = folder / CAPTURES / f"{run_id}{MATRICES}"
    with pa.input_stream(str(path), compression=CODEC) as stream:
        arrays: dict[str, np.ndarray] = load_arrays(stream.read())
    return arrays


def read_pairs(folder: Path, run_ids: Iterable[str]) -> Iterator[tuple[str, str, pa.Table]]:
    """(run a, run b, divergences) of all pairs of these runs."""
    known = set(run_ids)
    for path in sorted((folder / KL).glob(f"*{PARQUET}")):
        a, _, b = path.stem.partition("-")
        if {a, b} <= known:
            try:
                table = pq.read_table(path)
            except (OSError, pa.ArrowException) as error:
                raise _damage(folder, f"{KL}/{path.name}", error) from error
            yield a, b, table


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _results(
    run_id: str, record: Record, configuration: dict[str, Any], files: dict[str, str]
) -> bytes:
    """The results file of a run.

    Args:
        run_id, record, configuration: of the run.
        files: SHA-256 of the run's other files by name, relative to the suite's folder.
    """
    whole = {
        "schema": SCHEMA,
        "run_id": run_id,
        "configuration": configuration,
        "prompt_tokens": record.prompt_tokens,
        "text": record.text,
        "finish_reason": record.finish_reason,
        "n_steps": record.n_steps,
        "seconds": record.seconds,
        "texts": {str(id): text for id, text in record.texts.items()},
        "files": files,
    }
    table = pa.table(record.tokens, schema=TOKENS)
    return _parquet(table, whole | {"digest": _digest(whole, table.to_pydict())})


def _captures(run_id: str, record: Record) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a run's captures."""
    if record.arrays:
        axes = {name: AXES[name] for name in record.arrays}
        data = save_arrays(record.arrays, _named(run_id, axes))
        yield f"{CAPTURES}/{run_id}{REDUCTIONS}", data
    if record.full:
        axes = {
            name: MATRIX_AXES if name.startswith("attention") else MATRIX_AXES[-1:]
            for name in record.full
        }
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, CODEC) as stream:
            stream.write(save_arrays(record.full, _named(run_id, axes)))
        yield f"{CAPTURES}/{run_id}{MATRICES}", sink.getvalue().to_pybytes()


def _pair(pair: Pair, a: str, b: str) -> bytes:
    table = pa.table({"step": pair.steps, "kl_ab": pair.ab, "kl_ba": pair.ba}, schema=DIVERGENCES)
    return _parquet(table, {"schema": SCHEMA, "a": a, "b": b})


def _parquet(table: pa.Table, metadata: dict[str, Any]) -> bytes:
    sink = BytesIO()
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(metadata)}), sink)
    return sink.getvalue()


def _named(run_id: str, axes: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Metadata of a safetensors file: the names of every array's axes."""
    return {"schema": str(SCHEMA), "run_id": run_id, "axes": json.dumps(axes)}


def _digest(whole: dict[str, Any], columns: dict[str, list[Any]]) -> str:
    return _sha256(json.dumps([whole, columns], sort_keys=True, default=str).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
