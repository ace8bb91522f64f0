"""The folder of a suite: whole runs or none, whatever happens; one command at a time."""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
from datetime import datetime

from tempo_mlx import PositionedModel, load
from tempo_mlx.experiments import lock as locks
from tempo_mlx.experiments import store as stores
from tempo_mlx.experiments.capture import AXES
from tempo_mlx.experiments.lock import LockedError
from tempo_mlx.experiments.progress import read_progress
from tempo_mlx.experiments.session import Options, Session, capture_bytes
from tempo_mlx.experiments.store import (
    DiskFullError,
    done_runs,
    read_manifest,
    read_matrices,
    read_run,
)
from tempo_mlx.experiments.suite_files import parse_suite
from tempo_mlx.experiments.tables import load_tables
from tests.commands import run_command, run_signalled
from tests.suites import assert_same_tables, save_suite, suite_text
from tests.sweeps import mostly_slow
from tests.tiny_folder import save_tiny_model

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("store") / "tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load(folder)
    return PositionedModel.of(model), tokenizer


@pytest.fixture
def session(loaded, folder, tmp_path):
    def make(where="out", options=None, **changes):
        suite = parse_suite(suite_text(folder, **changes))
        return Session(suite, tmp_path / where, *loaded, options or Options(batch_size=3))

    return make


@pytest.fixture(scope="module")
def undisturbed(loaded, folder, tmp_path_factory):
    where = tmp_path_factory.mktemp("undisturbed")
    Session(parse_suite(suite_text(folder)), where, *loaded, Options(batch_size=3)).run()
    return load_tables(where)


def files(where):
    return {path.relative_to(where) for path in where.rglob("*") if path.is_file()}


def test_the_tables_are_what_the_runs_were(undisturbed, session):
    tables = undisturbed
    runs, tokens, entries = tables.runs, tables.tokens, tables.entries
    assert runs.columns.tolist() == [
        "run_id",
        "prompt_id",
        "category",
        "prompt",
        "seed",
        "visibility",
        "condition",
        "n_steps",
        "n_tokens",
        "text",
        "finish_reason",
        "seconds",
    ]
    assert runs["prompt_id"].tolist() == [
        f"{category}-{n}" for category in ("first", "second") for n in (1, 2) for _ in range(2)
    ]
    assert runs["condition"].tolist() == ["isolated", "visible"] * 4 and runs["seed"].isna().all()
    for row in runs.itertuples():
        mine = tokens[tokens["run_id"] == row.run_id]
        assert len(mine) == row.n_tokens and mine["step"].nunique() == row.n_steps
        prompt = len(row.prompt)  # a token is a byte
        assert mine["slot"].tolist() == list(range(prompt, prompt + len(mine)))
        assert (mine["position"] == prompt + mine["step"]).all()
        sizes = mine.groupby("step")["id"].transform("size")
        assert (mine["set_size"] == sizes).all() and sizes.max() > 1
        seen = entries[entries["run_id"] == row.run_id]
        assert sorted(seen["query_step"].unique()) == list(range(row.n_steps - 1))
        keys = seen[~seen["is_prompt"]].merge(mine, on="slot", suffixes=("", "_token"))
        assert (keys["key_step"] == keys["step"]).all()
        assert (keys["set_size"] == keys["set_size_token"]).all()
        np.testing.assert_allclose(keys["probability"], keys["probability_token"])
        prompts = seen[seen["is_prompt"]]
        assert (prompts["key_step"] == prompts["slot"] - prompt).all()
        assert (prompts["probability"] == 1).all() and (prompts["set_size"] == 1).all()
        assert (seen["is_first"] == (seen["slot"] == 0)).all()
    assert (entries["distance"] == entries["query_step"] - entries["key_step"]).all()
    totals = pd.DataFrame(tables.received.reshape(len(entries), -1)).groupby(
        [entries["run_id"], entries["query_step"]]
    )
    np.testing.assert_allclose(totals.sum(), 1, atol=1e-5)
    assert tables.received.dtype == np.float32 and tables.received.shape[1:] == (2, 4)
    assert len(tables.entropy) == entries.groupby(["run_id", "query_step"]).ngroups * 2 * 4
    assert (tables.entropy["entropy"] > 0).any()
    best = tables.next_tokens[tables.next_tokens["rank"] == 0]
    first = tokens.groupby(["run_id", "step"], as_index=False).first()
    both = best.merge(first, on=["run_id", "step"], suffixes=("", "_token"))
    assert len(both) == len(first) and (both["id"] == both["id_token"]).all()
    assert (both["text"] == both["text_token"]).all()
    assert (tables.kl["condition_a"] == "isolated").all() and (
        tables.kl["condition_b"] == "visible"
    ).all()
    assert tables.kl.groupby("prompt_id")["step"].apply(list).tolist() == [list(range(6))] * 4
    at_start = tables.kl[tables.kl["step"] == 0]
    np.testing.assert_allclose(at_start[["kl_ab", "kl_ba"]], 0, atol=1e-5)
    assert tables.kl["kl_ab"].max() > 1e-3
    assert tables.suite["name"] == "small" and tables.manifest["layers"] == 2


def test_a_folder_has_what_it_needs_to_be_understood(session):
    made = session(captures="full")
    made.run(command=["tempo-mlx", "experiment"])
    manifest = read_manifest(made.folder)
    assert manifest["fingerprint"] == made.identity and manifest["heads"] == [4]
    assert manifest["versions"].keys() == {"tempo-mlx", "mlx", "mlx-lm", "numpy"}
    assert manifest["sessions"][0]["command"] == "tempo-mlx experiment"
    assert manifest["runs"] == {"total": 8, "done": 8}
    [first, *_] = load_tables(made.folder).runs["run_id"]
    with safe_open(made.folder / "captures" / f"{first}.safetensors", "np") as file:
        axes = json.loads(file.metadata()["axes"])
        assert axes == {name: list(AXES[name]) for name in file.keys()}  # noqa: SIM118
        assert all(file.get_tensor(name).ndim == len(axes[name]) for name in axes)
        received, slots = file.get_tensor("received"), file.get_tensor("slot")
        steps = file.get_tensor("query_step")
    matrices = read_matrices(made.folder, first)
    for step in range(5):
        matrix = matrices[f"attention.{step}"]
        assert matrix.dtype == np.float16
        np.testing.assert_array_equal(matrices[f"slots.{step}"], slots[steps == step])
        mean = matrix.astype(np.float32).mean(axis=2).transpose(2, 0, 1)
        np.testing.assert_allclose(mean, received[steps == step], atol=1e-3)


def test_nothing_is_done_twice(session, monkeypatch):
    session().run()
    before = {path: path.stat().st_mtime_ns for path in session().folder.rglob("*.parquet")}
    monkeypatch.setattr(Session, "_outcomes", lambda self, groups, begin: iter(groups and 1 / 0))
    summary = session().run()
    assert (summary.done, summary.made) == (8, 0)
    assert before == {p: p.stat().st_mtime_ns for p in session().folder.rglob("*.parquet")}
    assert len(read_manifest(session().folder)["sessions"]) == 2


class Killed(BaseException):
    """Nothing catches this, as nothing catches a kill."""


def test_ended_at_any_write_it_goes_on_to_the_same_tables(session, undisturbed, monkeypatch):
    """At every one of the writes, in turn; what was whole before stays as it is."""
    wrapped = stores.write_atomically
    left = [0]

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return wrapped(*arguments)

    monkeypatch.setattr(stores, "write_atomically", dying)
    attempts = 0
    whole = 0
    while True:
        # Each time one write more succeeds than a suite's beginning needs.
        left[0] = attempts % 9
        attempts += 1
        assert attempts < 100
        try:
            session().run()
            break
        except Killed:
            pass
        done = len(done_runs(session().folder))
        assert done >= whole
        whole = done
    assert attempts > 3
    assert_same_tables(load_tables(session().folder), undisturbed)
    names = {str(path) for path in files(session().folder)}
    assert not any("/." in name for name in names)
    assert len(names) == 8 + 8 + 4 + 4  # results, captures, kl; lock, gate, suite, manifest


def command(suite, where):
    return ["experiment", "run", suite, "-o", where, "--batch-size", "2"]


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_tables(folder, tmp_path, loaded):
    changes = {"prompts": {"a": [f"text number {i}" for i in range(12)]}}
    suite = save_suite(tmp_path / "suite.yaml", folder, **changes)
    where, whole = tmp_path / "out", tmp_path / "whole"
    Session(parse_suite(suite.read_text()), whole, *loaded, Options(batch_size=2)).run()
    rng, done = random.Random(7), 0
    # A batch of two runs makes about 7 passes and touches its files 10 times.
    for kind, most in (("passes", 21), ("files", 40)) * 2:
        moment = {kind: rng.randint(1, most)}
        killed = run_signalled(command(suite, where), signal.SIGKILL, folder=where, **moment)
        assert killed.returncode == -signal.SIGKILL and "Traceback" not in killed.stderr
        now = done_runs(where)
        assert len(now) >= done
        # Whatever is done is whole.
        for run_id in now:
            read_run(where, run_id)
        done = len(now)
    assert 0 < done < 24
    finished = run_command(command(suite, where))
    assert "24 of 24 runs are done" in finished.stdout
    assert_same_tables(load_tables(where), load_tables(whole))
    assert not any(path.name.startswith(".") for path in where.glob("*/*"))


@pytest.mark.slow
def test_a_second_command_on_one_folder_says_so(session, folder, tmp_path):
    suite = save_suite(tmp_path / "suite.yaml", folder)
    made = session()
    with stores.Store(made.folder, made.suite, made.identity, made.plan.runs):
        with pytest.raises(LockedError, match="in use by another command"):
            made.run()
        other = run_command(command(suite, made.folder))
        assert other.returncode == 2 and "in use by another command" in other.stderr
        assert "Traceback" not in other.stderr
    assert made.run().done == 8


@pytest.mark.parametrize("after", [0, 1, 2, 7, 12])
def test_a_full_disk_is_a_clear_error_and_what_is_stored_stays(
    session, undisturbed, monkeypatch, after
):
    original, left = stores.write_atomically, [after]

    def write(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(stores, "write_atomically", write)
        with pytest.raises(DiskFullError, match="the disk is full") as error:
            session().run()
    assert "run the command again" in str(error.value)
    where = session().folder
    if after > 1:
        assert f"{len(done_runs(where))} runs are done and whole" in str(error.value)
    assert session().run().done == 8
    assert_same_tables(load_tables(where), undisturbed)


def test_a_folder_holds_one_suite_of_one_model(session, loaded, folder, tmp_path):
    session().run()
    with pytest.raises(ValueError, match="a suite with other settings; choose another --output"):
        session(settings={"max_tokens": 3}).run()
    with pytest.raises(ValueError, match="a suite with other captures"):
        session(captures="full").run()
    stores_before = files(session().folder)
    made = session()
    made.identity = "0" * 32
    with pytest.raises(ValueError, match="runs of another model"):
        made.run()
    assert files(session().folder) == stores_before and session().run().done == 8


def test_files_of_others_are_left_alone(session):
    made = session()
    mine = made.folder / "results" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for name in ("0123456789abcdef.parquet", ".0123456789abcdef.parquet.x1y2"):
        (made.folder / "results" / name).write_text("of a dead process")
    made.run()
    assert mine.read_text() == "mine"
    assert len(list((made.folder / "results").iterdir())) == 1 + 8


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"name": "app"}'),
        ("manifest.json", "[1]"),
        ("suite.yaml", "name: other\n"),
        ("suite.yaml", "anything"),
        ("manifest.json with our suite", '{"name": "app"}'),
    ],
)
def test_a_folder_with_files_of_someone_else_is_refused(session, name, content):
    made = session()
    made.folder.mkdir(exist_ok=True)
    name, _, ours = name.partition(" with ")
    if ours:
        made.run()
    (made.folder / name).write_text(content)
    before = files(made.folder)
    with pytest.raises(ValueError, match=r"holds a|is damaged"):
        made.run()
    assert (made.folder / name).read_text() == content and files(made.folder) == before
    assert ours or [path.name for path in made.folder.iterdir()] == [name]


def test_files_beside_the_suites_own_stay(session):
    made = session()
    made.folder.mkdir(exist_ok=True)
    mine = [made.folder / name for name in ("notes.txt", ".manifest.json.swp", ".suite.yaml.swp")]
    for path in mine:
        path.write_text("mine")
    left = made.folder / ".manifest.json.0123456789abcdef.tmp"
    left.write_text("of a dead process")
    assert made.run().done == 8
    assert [path.read_text() for path in mine] == ["mine"] * 3 and not left.exists()


def test_the_suite_in_the_folder_is_written_once(session, tmp_path):
    made = session()
    made.run()
    suite = made.folder / "suite.yaml"
    suite.write_text("# a note\n" + suite.read_text())
    assert session().run().made == 0
    assert suite.read_text().startswith("# a note\n")


def test_a_folder_that_cannot_be_used_is_named(session, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        session("file").run()
    made = session()
    made.run()
    with pytest.raises(ValueError, match="holds no suite: there is no suite.yaml"):
        load_tables(tmp_path)


def test_a_folder_of_an_older_version_is_refused_in_a_line(session):
    made = session()
    made.run()
    manifest = read_manifest(made.folder)
    (made.folder / stores.MANIFEST).write_text(json.dumps({**manifest, "schema": 1}))
    before = files(made.folder)
    for use in (made.run, lambda: load_tables(made.folder), lambda: read_progress(made.folder)):
        with pytest.raises(ValueError, match="folder layout 1, this version reads 2; use that"):
            use()
    assert files(made.folder) == before


def test_a_failed_run_is_tried_again(session, monkeypatch):
    original = Session._outcomes

    def failing(self, groups, begin):
        for number, outcome in original(self, groups, begin):
            if number == 1:
                outcome = type(outcome)([outcome.runs[0], "it fell over"], outcome.pairs)
            yield number, outcome

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_outcomes", failing)
        summary = session().run()
    assert (summary.done, summary.failed) == (7, 1)
    assert list(summary.errors.values()) == ["it fell over"]
    tables = load_tables(session().folder)
    assert len(tables.runs) == 7 and tables.kl["prompt_id"].nunique() == 3
    again = session().run()
    # With its group, for divergences need both.
    assert (again.done, again.failed, again.made) == (8, 0, 2)
    assert load_tables(session().folder).kl["prompt_id"].nunique() == 4


def damage(path):
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("hurt", mostly_slow([os.unlink, damage, cut], [os.unlink, damage]))
@pytest.mark.parametrize("name", ["results", "captures", "kl", "matrices"])
def test_what_is_missing_or_damaged_is_made_again(session, hurt, name):
    made = session(captures="full")
    made.run()
    before = load_tables(made.folder)
    endings = {"captures": "[0-9a-f].safetensors", "matrices": ".zst"}
    folder = "captures" if name == "matrices" else name
    pattern = f"*{endings.get(name, '.parquet')}"
    victim = sorted((made.folder / folder).glob(pattern))[0]
    hurt(victim)
    progress = read_progress(made.folder)
    broken = 2 if name == "kl" else 1
    # A run without results was never done.
    state = "pending" if (name, hurt) == ("results", os.unlink) else "damaged"
    assert (progress.counts["done"], progress.counts[state]) == (8 - broken, broken)
    again = session(captures="full").run()
    # With its group, for divergences need both.
    assert (again.done, again.made) == (8, 2)
    assert_same_tables(load_tables(made.folder), before)
    assert "damaged" not in read_progress(made.folder).counts
    assert session(captures="full").run().made == 0


def test_a_manifest_is_written_again(session):
    made = session()
    made.run()
    (made.folder / stores.MANIFEST).unlink()
    assert read_progress(made.folder).counts["done"] == 8
    assert made.run().made == 0
    assert read_manifest(made.folder)["fingerprint"] == made.identity
    cut(made.folder / stores.MANIFEST)
    with pytest.raises(ValueError, match="manifest.json is damaged; delete it"):
        made.run()


def test_a_model_that_moved_goes_on_and_one_of_another_configuration_does_not(
    session, folder, tmp_path
):
    session().run()
    moved = shutil.copytree(folder, tmp_path / "moved")

    def again():
        suite = parse_suite(suite_text(str(moved), description="of the same model"))
        return Session(suite, session().folder, *load(moved), Options()).run()

    assert again().made == 0
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    with pytest.raises(ValueError, match="holds runs of another model"):
        again()
    assert session().run().made == 0


def test_looking_at_a_folder_does_not_stop_a_command_from_starting(session, monkeypatch):
    made = session()
    made.run()
    looking = os.open(made.folder / locks.GATE, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not locks.in_use(made.folder)
    flock, waited = fcntl.flock, []

    def ended(fd, kind):
        # The look ends once the command waits for it.
        if kind == fcntl.LOCK_EX:
            with pytest.raises(BlockingIOError):
                flock(fd, kind | fcntl.LOCK_NB)
            waited.append(fd)
            flock(looking, fcntl.LOCK_UN)
        flock(fd, kind)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", ended)
        lock = locks.Lock(made.folder)
    assert len(waited) == 1 and locks.in_use(made.folder)
    with pytest.raises(LockedError):
        locks.Lock(made.folder)
    lock.release()
    assert not locks.in_use(made.folder)
    os.close(looking)


def test_cross_validation_compares_and_names_what_differs(session):
    options = Options(batch_size=8, cross_validate=0.5)
    found = session(options=options).run().validation
    assert found.runs == 4 and found.mismatches == {}
    assert 0 <= max(found.differences.values()) < found.tolerance
    where = session().folder
    assert read_manifest(where)["cross_validation"]["runs"] == 4
    for path in (where / "results").glob("*.parquet"):
        run = read_run(where, path.stem)
        run.tokens["probability"][0] += 0.01
        _, whole = stores._read_results(where, path.stem)
        results = stores._results(path.stem, run, whole["configuration"], whole["files"])
        path.write_bytes(results)
    found = session(options=options).run().validation
    assert len(found.mismatches) == 4
    assert all("probability differs by 0.01" in why for why in found.mismatches.values())


def test_captures_stay_below_what_was_said_and_allowed(session, tmp_path):
    made = session(captures="full")
    made.run()
    stored = 0
    for entry in load_tables(made.folder).runs["run_id"]:
        run = read_run(made.folder, entry)
        stored += run.arrays["received"].nbytes + run.arrays["entropy"].nbytes
        stored += sum(a.nbytes for n, a in read_matrices(made.folder, entry).items() if "att" in n)
    assert stored <= made.capture_bytes < 10 * stored
    runs = made.plan.runs
    assert made.capture_bytes == sum(capture_bytes(r, len(r.prompt), 2, 4) for r in runs)
    with pytest.raises(ValueError, match=r"captures full take up to .* MB, more than --max-disk"):
        session(captures="full", options=Options(max_disk=made.capture_bytes - 1))
    session(captures="full", options=Options(max_disk=made.capture_bytes))
    assert session(captures="none").capture_bytes == 0


def test_the_pace_of_the_latest_command_says_how_long_it_takes(session):
    made = session()
    made.run()
    where = made.folder
    assert read_progress(where).seconds_left is None
    manifest = read_manifest(where)
    began = datetime.fromisoformat("2030-01-01T00:00:00+00:00")
    command = {**manifest["sessions"][0], "started": began.isoformat()}
    changed = {**manifest, "sessions": [manifest["sessions"][0], command]}
    (where / stores.MANIFEST).write_text(json.dumps(changed))
    results = sorted((where / "results").iterdir())
    for path in results[:3]:
        path.unlink()
    results[0].with_suffix(".running").touch()
    # None of the runs ended since the latest command began.
    assert read_progress(where).seconds_left is None
    failed = results[1].with_suffix(".failed")
    failed.write_text("it fell over")
    for seconds, path in ((4, failed), (10, results[-1])):
        os.utime(path, (began.timestamp() + seconds,) * 2)
    found = read_progress(where)
    assert found.seconds_left == 2 * 10 / 2
    assert found.counts == {"done": 5, "failed": 1, "running": 0, "pending": 1, "interrupted": 1}
    assert found.failures == {results[1].stem: "it fell over"}
