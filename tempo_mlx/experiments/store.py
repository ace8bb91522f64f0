"""The folder of a suite: its ledger, and for every run that is done its files.

The files of a run are written first, each whole or not at all, and the ledger says last that the
run is done. What a dead process left of runs that are not done is removed by the next command; so
are the files of runs of which one is missing or damaged, and these runs are made again.
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
from .ledger import DONE, DiskFullError, Ledger, Lock
from .running import Outcome, Record
from .suite import RunConfig, Suite

#: Version of the folder's layout.
SCHEMA = 1

SUITE, MANIFEST, LEDGER = "suite.yaml", "manifest.json", "ledger.sqlite"
RESULTS, CAPTURES, KL = "results", "captures", "kl"
FOLDERS = (RESULTS, CAPTURES, KL)

#: Endings of a run's files: reductions, and matrices compressed.
REDUCTIONS, MATRICES = ".safetensors", ".matrices.safetensors.zst"
CODEC = "zstd"

#: Keys of a suite that change no run: a folder that has moved is the same model.
UNIMPORTANT = {"description", "model"}

#: What to do about a damaged manifest.
REMEDY = "delete it if it is the suite's: the next run of the suite writes it again"

#: Names of the files of runs and of pairs of runs: a dot while they are written, ids, an ending.
OURS = re.compile(r"(\.?)([0-9a-f]{16}(?:-[0-9a-f]{16})?)\.")

#: Key of what a Parquet file says of its run as a whole.
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


class Store:
    """A suite's folder, open for writing.

    Args:
        folder: made if it is not there.
        suite: what is run; a folder holds one suite.
        fingerprint: identity of the model.
        runs: of the suite.

    Raises:
        ValueError: if another command works on the folder, it holds another suite, another
            model's runs or files of someone else with names of ours, or it cannot be written.
        DiskFullError: if the disk is full, from every method that writes.
    """

    def __init__(self, folder: Path, suite: Suite, fingerprint: str, runs: Sequence[RunConfig]):
        self.folder = folder
        self.fingerprint = fingerprint
        self.runs = {run.id(fingerprint): run for run in runs}
        # Before anything is made there, and again when nobody else works on it.
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
            self.ledger = Ledger(folder / LEDGER)
            if not self.runs.keys() >= {entry.run_id for entry in self.ledger.entries()}:
                raise TempoError(
                    f"{folder} holds runs that another version of tempo-mlx made of this suite; "
                    "choose another --output"
                )
            self.ledger.plan(
                [(run_id, json.dumps(_configuration(run))) for run_id, run in self.runs.items()]
            )
            self.ledger.forget(damaged(folder, self.done))
            self._remove_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _check(self, suite: Suite) -> None:
        """Refuse a folder of another suite, of another model or of someone else."""
        check_folder(self.folder)
        if (self.folder / SUITE).exists():
            there, here = read_suite_file(self.folder), suite.to_dict()
            for key in here:
                if key not in UNIMPORTANT and there.get(key) != here[key]:
                    raise TempoError(
                        f"{self.folder} holds a suite with other {key}; choose another --output"
                    )
        manifest = read_manifest(self.folder)
        if manifest.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise TempoError(
                f"{self.folder} holds runs of another model, {manifest.get('model')} with identity "
                f"{manifest['fingerprint']}, not {self.fingerprint}; choose another --output"
            )

    def _remove_leftovers(self) -> None:
        """Remove files of runs that are not done, and what a dead process was writing."""
        done = self.done
        for name in FOLDERS:
            for path in (self.folder / name).iterdir():
                match = OURS.match(path.name)
                if match and (match[1] or not done.issuperset(match[2].split("-"))):
                    path.unlink()
        for name in (SUITE, MANIFEST):
            for path in leftovers(self.folder / name):
                path.unlink()

    @property
    def done(self) -> set[str]:
        """Ids of the runs that are done."""
        return {entry.run_id for entry in self.ledger.entries() if entry.state == DONE}

    def commit(self, run_ids: Sequence[str], outcome: Outcome) -> None:
        """Store what became of a group: its files, then all of its runs in the ledger at once."""
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
                    written = self._write(f"{KL}/{a}-{b}.parquet", _pair(pair, a, b))
                files[a] |= written
                files[b] |= written
        for run_id, record in records.items():
            with self._full_disk(f"run {run_id}"):
                for name, data in _captures(run_id, record):
                    files[run_id] |= self._write(name, data)
                self._write(_results_name(run_id), _results(run_id, record, files[run_id]))
        self.ledger.finish(
            {
                run_id: run if isinstance(run, str) else None
                for run_id, run in zip(run_ids, outcome.runs, strict=True)
            }
        )

    def _write(self, name: str, data: bytes) -> dict[str, str]:
        """Write a file; returns its name with what it must hold, see :func:`_results`."""
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
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or isinstance(error, DiskFullError):
                raise
            done = len(self.done) if hasattr(self, "ledger") else 0
            raise DiskFullError(
                errno.ENOSPC,
                f"the disk is full, {what} cannot be stored; {done} runs are done and whole, free "
                "some space and run the command again",
                str(self.folder),
            ) from error

    def close(self) -> None:
        """Release the folder."""
        self.ledger.close()
        self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_folder(folder: Path) -> None:
    """Raise TempoError where a folder has files of someone else under names of ours."""
    if folder.exists() and not folder.is_dir():
        raise TempoError(f"--output {folder} cannot be written: {os.strerror(errno.ENOTDIR)}")
    for name in (MANIFEST, LEDGER):
        # The suite is the first thing that is stored.
        if (folder / name).exists() and not (folder / SUITE).exists():
            raise TempoError(f"{folder} holds a {name} but no {SUITE}; choose another --output")
    if (manifest := read_manifest(folder)) and "fingerprint" not in manifest:
        raise TempoError(f"{folder} holds a {MANIFEST} of something else; choose another --output")


def read_suite_file(folder: Path) -> dict[str, Any]:
    """The suite that a folder holds, as resolved; ValueError if the folder holds none."""
    try:
        data = yaml.safe_load((folder / SUITE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TempoError(f"{folder} holds no suite: there is no {SUITE}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TempoError(f"{folder / SUITE} is damaged") from error
    return data if isinstance(data, dict) else {}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where there is none yet."""
    try:
        data: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TempoError(f"{folder / MANIFEST} is damaged; {REMEDY}") from error
    if not isinstance(data, dict):
        raise TempoError(f"{folder / MANIFEST} is damaged; {REMEDY}")
    return data


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a folder; ValueError if there is none."""
    if not (folder / LEDGER).is_file():
        raise TempoError(f"{folder} holds no suite that was run: there is no {LEDGER}")
    return Ledger(folder / LEDGER)


def damaged(folder: Path, run_ids: Iterable[str]) -> list[str]:
    """Those of the runs of which a file is missing or does not hold what was written."""
    found = []
    for run_id in run_ids:
        try:
            _, whole = _read_results(folder, run_id)
            for name in whole["files"]:
                _read_file(folder, name, whole)
        except TempoError:
            found.append(run_id)
    return found


def read_run(folder: Path, run_id: str) -> Record:
    """What is stored of a run, its matrices left out.

    Raises:
        ValueError: if its files are missing or damaged.
    """
    tokens, whole = _read_results(folder, run_id)
    arrays = {}
    if whole["captures"]:
        data = _read_file(folder, f"{CAPTURES}/{run_id}{REDUCTIONS}", whole)
        arrays = load_arrays(data)
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
    """A run's columns of tokens, and what its file says of the run as a whole."""
    name = _results_name(run_id)
    try:
        table = pq.read_table(folder / name)
        whole = json.loads((table.schema.metadata or {})[METADATA])
        columns = table.to_pydict()
        # Earlier versions wrote neither a digest nor files.
        digest, whole = whole.pop("digest", None), {"files": {}, **whole}
        if digest not in (None, _digest(whole, columns)):
            raise TempoError("it does not hold what was written")
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _damage(folder, name, error) from error
    return columns, whole


def _read_file(folder: Path, name: str, whole: dict[str, Any]) -> bytes:
    """A file of a run, as the run's results say that it was written."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise _damage(folder, name, error) from error
    if _sha256(data) != whole["files"].get(name, _sha256(data)):
        raise _damage(folder, name, "it does not hold what was written")
    return data


def _damage(folder: Path, name: str, why: object) -> TempoError:
    return TempoError(
        f"{folder / name} is damaged or missing: {why}; run the suite again, which makes it again"
    )


def read_matrices(folder: Path, run_id: str) -> dict[str, np.ndarray]:
    """Attention matrices of a run: ``attention.<step>`` [layer, head, query, key], fp16, and
    ``slots.<step>``, the slots of their keys."""
    path = folder / CAPTURES / f"{run_id}{MATRICES}"
    with pa.input_stream(str(path), compression=CODEC) as stream:
        arrays: dict[str, np.ndarray] = load_arrays(stream.read())
    return arrays


def read_pairs(folder: Path, done: set[str]) -> Iterator[tuple[str, str, pa.Table]]:
    """(run a, run b, divergences) of all pairs of runs that are done."""
    for path in sorted((folder / KL).glob("*.parquet")):
        a, _, b = path.stem.partition("-")
        if {a, b} <= done:
            try:
                table = pq.read_table(path)
            except (OSError, pa.ArrowException) as error:
                raise _damage(folder, f"{KL}/{path.name}", error) from error
            yield a, b, table


def compressed(data: bytes) -> bytes:
    """The data as a Zstandard stream."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, CODEC) as stream:
        stream.write(data)
    whole: bytes = sink.getvalue().to_pybytes()
    return whole


def free_bytes(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(
        os.path.getsize(os.path.join(parent, name))
        for parent, _, names in os.walk(folder)
        for name in names
    )


def _configuration(run: RunConfig) -> dict[str, Any]:
    """The configuration as the ledger has it: what makes the run's id, and what it is called."""
    return {
        **run.to_dict(),
        "prompt_id": run.prompt_id,
        "category": run.category,
        "condition": run.condition,
        "varied": run.varied,
    }


def _results_name(run_id: str) -> str:
    return f"{RESULTS}/{run_id}.parquet"


def _results(run_id: str, record: Record, files: dict[str, str] | None = None) -> bytes:
    """The file of a run's results.

    Args:
        run_id, record: of the run.
        files: SHA-256 of the run's other files by name, relative to the suite's folder.
    """
    whole = {
        "schema": SCHEMA,
        "run_id": run_id,
        "prompt_tokens": record.prompt_tokens,
        "text": record.text,
        "finish_reason": record.finish_reason,
        "n_steps": record.n_steps,
        "seconds": record.seconds,
        "captures": bool(record.arrays),
        "texts": {str(id): text for id, text in record.texts.items()},
        "files": files or {},
    }
    table = pa.table(record.tokens, schema=TOKENS)
    whole["digest"] = _digest(whole, table.to_pydict())
    return _parquet(table.replace_schema_metadata({METADATA: json.dumps(whole)}))


def _captures(run_id: str, record: Record) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of what was captured."""
    if record.arrays:
        axes = {name: AXES[name] for name in record.arrays}
        data = save_arrays(record.arrays, _named(run_id, axes))
        yield f"{CAPTURES}/{run_id}{REDUCTIONS}", data
    if record.full:
        axes = {
            name: MATRIX_AXES if name.startswith("attention") else MATRIX_AXES[-1:]
            for name in record.full
        }
        data = save_arrays(record.full, _named(run_id, axes))
        yield f"{CAPTURES}/{run_id}{MATRICES}", compressed(data)


def _pair(pair: Pair, a: str, b: str) -> bytes:
    columns = {"step": pair.steps, "kl_ab": pair.ab, "kl_ba": pair.ba}
    whole = {"schema": SCHEMA, "a": a, "b": b}
    return _parquet(
        pa.table(columns, schema=DIVERGENCES.with_metadata({METADATA: json.dumps(whole)}))
    )


def _parquet(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _named(run_id: str, axes: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Metadata of a safetensors file: the names of every array's axes."""
    return {"schema": str(SCHEMA), "run_id": run_id, "axes": json.dumps(axes)}


def _digest(whole: dict[str, Any], columns: dict[str, list[Any]]) -> str:
    return _sha256(json.dumps([whole, columns], sort_keys=True, default=str).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
