"""``tempo-mlx experiment run``, ``status`` and ``schema``."""

import json
import subprocess
import sys

from tempo_mlx.cli import experiment
from tempo_mlx.experiments.lock import Lock
from tempo_mlx.experiments.session import Options
from tempo_mlx.experiments.suite_files import json_schema
from tempo_mlx.experiments.tables import load_tables
from tests.suites import assert_same_tables, save_suite

import psutil
import pytest
from distributed import LocalCluster


@pytest.fixture
def suite(tmp_path, folder):
    return save_suite(tmp_path / "suite.yaml", folder, prompts={"a": ["hello", "a b c"]})


def test_a_suite_is_run_once_and_its_state_is_shown(run, suite, tmp_path):
    where = tmp_path / "out"
    code, out, err = run("experiment", "run", suite, "-o", where, "--cross-validate", 0.3)
    assert code == 0 and "4 of 4 runs are done, 4 now" in out
    assert "2 runs repeated alone" in out and "0 mismatches" in out
    assert "4 runs, batched, 64 rows" in err and "MB" in err and "\r" not in err
    code, out, err = run("experiment", "run", suite, "-o", where)
    assert code == 0 and "4 of 4 runs are done, 0 now" in out
    assert "4 of 4 runs are done already" in err
    code, out, _ = run("experiment", "status", where)
    assert (code, out) == (0, "small: 4 runs, 4 done\n")
    code, out, _ = run("experiment", "status", where, "--json")
    data = json.loads(out)
    assert data["runs"] == {"total": 4, "done": 4, "failed": 0, "running": 0, "pending": 0}
    assert data["in_use"] is False and data["failures"] == {} and data["seconds_left"] is None


@pytest.mark.slow
def test_all_runners_leave_the_same_tables(run, suite, tmp_path):
    tables = {}
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        for name, arguments in {
            "batched": ["--batch-size", 2],
            "sequential": ["--runner", "sequential"],
            "workers": ["--runner", "workers=2"],
            "cluster": ["--scheduler", cluster.scheduler_address],
        }.items():
            code, _, err = run("experiment", "run", suite, "-o", tmp_path / name, *arguments)
            assert code == 0, err
            tables[name] = load_tables(tmp_path / name)
            runner = tables[name].manifest["sessions"][0]["runner"]
            assert runner.startswith(name)
    for name in ("batched", "workers", "cluster"):
        assert_same_tables(tables[name], tables["sequential"])


def test_the_suites_own_folder_and_model_can_be_replaced(run, suite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("experiment", "run", suite, "--capture", "none")
    assert code == 0 and "runs/small holds" in out
    tables = load_tables(tmp_path / "runs" / "small")
    assert len(tables.entries) == 0 and len(tables.kl) == 0 and len(tables.tokens) > 0
    assert tables.suite["captures"] == "none"
    code, _, err = run("experiment", "run", suite, "--model", "no such model")
    assert code == 2 and "no such model" in err


def test_what_seeds_do_is_said(run, tmp_path, folder):
    suite = save_suite(tmp_path / "s.yaml", folder, prompts={"a": ["x"]}, seeds=[1, 2, 3])
    code, out, err = run("experiment", "run", suite, "-o", tmp_path / "out")
    assert code == 0 and "2 of 2 runs" in out
    note = "each distinct configuration is run once, 2 runs of 6 in the grid"
    assert note in err and note in json.dumps(load_tables(tmp_path / "out").manifest["notes"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_checks")
def test_the_largest_seed_is_run_stored_and_analysed(run, tmp_path, folder):
    seeds = [0, 2**53 + 1, 2**63 - 1]
    grid = {"visibility": ["isolated", "visible"], "sampling": ["deterministic", "gumbel"]}
    given = {"prompts": {"a": ["hello", "a b c"], "b": ["x"]}, "seeds": seeds, "grid": grid}
    suite, where = save_suite(tmp_path / "s.yaml", folder, **given), tmp_path / "out"
    code, out, err = run("experiment", "run", suite, "-o", where)
    assert code == 0, err
    tables = load_tables(where)
    for table in (tables.runs, tables.kl):
        found = table["seed"]
        assert set(found.dropna()) == set(seeds) and found.isna().any()
    code, _, err = run("experiment", "analyze", where, "--resamples", 20, "--seed", 2**63 - 1)
    assert code == 0, err


def test_failed_runs_are_named(run, suite, tmp_path, monkeypatch):
    from tempo_mlx.experiments.session import Session

    original = Session._outcomes

    def failing(self, groups, begin):
        for number, outcome in original(self, groups, begin):
            yield number, type(outcome)(["[it] fell over", *outcome.runs[1:]], [])

    monkeypatch.setattr(Session, "_outcomes", failing)
    where = tmp_path / "out"
    code, out, err = run("experiment", "run", suite, "-o", where)
    assert code == 1 and out.count(": [it] fell over") == 2 and "Traceback" not in err
    code, out, _ = run("experiment", "status", where)
    assert code == 0 and "2 done, 2 failed" in out and out.count(": [it] fell over") == 2


def test_an_interrupted_suite_goes_on(run, suite, tmp_path, monkeypatch):
    from tempo_mlx.experiments.session import Session

    original = Session._outcomes

    def interrupted(self, groups, begin):
        yield next(original(self, groups, begin))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_outcomes", interrupted)
        code, out, err = run("experiment", "run", suite, "-o", tmp_path / "out")
    assert code == 130 and out == "" and "rerun the same command to resume" in err
    code, out, _ = run("experiment", "status", tmp_path / "out")
    assert "2 done, 2 interrupted" in out
    assert "no command is running" in out and "left at the" in out
    code, out, _ = run("experiment", "status", tmp_path / "out", "--json")
    data = json.loads(out)
    expected = {"done": 2, "failed": 0, "running": 0, "pending": 0, "interrupted": 2}
    assert data["runs"] == {"total": 4, **expected} and data["in_use"] is False
    lock = Lock(tmp_path / "out")
    code, out, _ = run("experiment", "status", tmp_path / "out")
    assert "2 done, 2 running" in out and "a command is running" in out
    code, out, _ = run("experiment", "status", tmp_path / "out", "--json")
    data = json.loads(out)
    assert data["runs"] == {"total": 4, "done": 2, "failed": 0, "running": 2, "pending": 0}
    assert data["in_use"] is True
    lock.release()
    code, out, _ = run("experiment", "run", suite, "-o", tmp_path / "out")
    assert code == 0 and "4 of 4 runs are done, 2 now" in out


def test_results_that_were_deleted_are_made_again(run, suite, tmp_path):
    where = tmp_path / "out"
    run("experiment", "run", suite, "-o", where)
    before = load_tables(where)
    for path in (where / "results").iterdir():
        path.unlink()
    code, out, _ = run("experiment", "status", where)
    assert code == 0 and "4 runs, 4 pending" in out and "no command is running" in out
    code, out, err = run("experiment", "run", suite, "-o", where)
    assert code == 0 and "4 of 4 runs are done, 4 now" in out and "done already" not in err
    assert_same_tables(load_tables(where), before)


def test_the_schema_is_written(run, tmp_path):
    code, out, _ = run("experiment", "schema")
    assert code == 0 and json.loads(out) == json_schema()
    code, _, _ = run("experiment", "schema", "-o", tmp_path / "schema.json")
    assert code == 0 and json.loads((tmp_path / "schema.json").read_text()) == json_schema()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], ["nothing", "parallel-attention"]),
        (["run", "{suite}", "--runner", "fast"], ["--runner", "workers=N", "fast"]),
        (["run", "{suite}", "--runner", "workers"], ["--runner", "workers=N"]),
        (["run", "{suite}", "--runner", "workers=0"], ["workers", "at least 1"]),
        (["run", "{suite}", "--runner", "batched=2"], ["--runner"]),
        (["run", "{suite}", "--scheduler", "tcp://x:1", "--runner", "sequential"], ["--scheduler"]),
        (["run", "{suite}", "--scheduler", "nonsense://"], ["nonsense", "cannot be reached"]),
        (["run", "{suite}", "--batch-size", "0"], ["batch_size", "at least 1"]),
        (["run", "{suite}", "--capture", "all"], ["--capture", "reductions", "all"]),
        (["run", "{suite}", "--max-disk", "much"], ["--max-disk", "much"]),
        (["run", "{suite}", "--max-disk", "1kB"], ["--max-disk", "captures reductions"]),
        (["run", "{suite}", "--cross-validate", "2"], ["cross_validate", "[0, 1]"]),
        (["run", "{suite}", "-o", "{suite}"], ["--output", "cannot be written"]),
        (["run", "{folder}/config.json"], ["config.json", "unknown key"]),
        (["run", "{long}"], ["a-1", "300 tokens"]),
        (["run", "{layers}"], ["layers", "the model has 2"]),
        (["status", "{folder}"], ["holds no suite"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, suite, folder, tmp_path, arguments, words):
    pruning = {"rule": "attention", "layers": "last:9"}
    names = {
        "suite": suite,
        "folder": folder,
        "long": save_suite(tmp_path / "long.yaml", folder, prompts={"a": ["x" * 300]}),
        "layers": save_suite(
            tmp_path / "layers.yaml", folder, settings={"pruning": pruning}, grid=None
        ),
    }
    if arguments[0] == "run" and "-o" not in arguments:
        arguments = [*arguments, "-o", str(tmp_path / "out")]
    code, out, err = run("experiment", *(argument.format(**names) for argument in arguments))
    assert code == 2 and out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1 and err.strip().endswith(errors[0])
    for word in words:
        assert word in errors[0]


def test_too_many_workers_for_the_memory_are_refused(run, suite, tmp_path, monkeypatch):
    class Memory:
        available = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    code, _, err = run("experiment", "run", suite, "-o", tmp_path / "out", "--runner", "workers=2")
    assert code == 2 and "GB are free; use batched" in err
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_command_that_installs_it_is_named(run, suite, monkeypatch):
    monkeypatch.setattr(experiment, "NEEDED", ("pandas", "no_such_package"))
    code, _, err = run("experiment", "run", suite)
    assert code == 2 and "no_such_package" in err and "tempo-mlx[experiments]" in err


def test_the_command_line_starts_without_what_suites_need():
    code = "import sys; from tempo_mlx.cli import load_command; load_command('experiment'); "
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "tempo_mlx.cli.experiment" in loaded
    assert not loaded & {
        "pandas",
        "pyarrow",
        "pydantic",
        "statsmodels",
        "matplotlib",
        "distributed",
    }


def test_options_say_what_they_are():
    assert str(Options(scheduler="tcp://a:1")) == "cluster tcp://a:1"
    assert str(Options(runner="workers", workers=3)) == "workers=3"
    with pytest.raises(ValueError, match="runner must be one of"):
        Options(runner="fast")
