"""Runs of a suite in one batch, one by one, in processes and on a cluster; and what is captured."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

from tempo_mlx import PositionedModel, Settings, generate, load
from tempo_mlx.bench import experiments as bench
from tempo_mlx.bench.experiments import (
    BATCHED,
    DIFFERING,
    LARGEST,
    SEQUENTIAL,
    TIME,
    bench_experiments,
    drawn_suite,
)
from tempo_mlx.bench.result import finder
from tempo_mlx.bench.setting import Subject
from tempo_mlx.decode.request import Request
from tempo_mlx.experiments import workers
from tempo_mlx.experiments.capture import TOP, Divergence
from tempo_mlx.experiments.running import Record, run_batched, run_group, run_one_by_one
from tempo_mlx.experiments.suite_files import parse_suite
from tempo_mlx.experiments.validation import compare
from tempo_mlx.experiments.workers import perform, run_in_workers, run_on_cluster
from tempo_mlx.lattice.lattice import Lattice
from tempo_mlx.models import Capture
from tempo_mlx.rules.visibility import may_attend
from tempo_mlx.weights.fingerprint import identify
from tests.commands import signal_itself
from tests.suites import suite_text
from tests.sweeps import mostly_slow
from tests.tiny_folder import save_tiny_model

import mlx.core as mx
import numpy as np
import psutil
import pytest
from distributed import LocalCluster
from mlx_lm.models.cache import make_prompt_cache

from ..one_sequence import OneSequence

#: Most that two ways to run a suite may differ by, in parts of the scale: sums over the rows of a
#: batch come in another order.
ATOL = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("runners") / "tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load(folder)
    return PositionedModel.of(model), tokenizer


def groups_of(folder, **changes):
    return parse_suite(suite_text(folder, **changes)).expand().groups


WIDE = {
    "prompts": {"a": ["hello there", "a b c", "x"], "b": ["the end of it all, or so it seemed"]},
    "seeds": [3, 4],
    "grid": {
        "visibility": ["isolated", "visible", "hidden"],
        "sampling": ["deterministic", "gumbel"],
        "pruning": [None, {"rule": "attention", "threshold": 0.6, "schedule": "constant"}],
    },
}


RECOMBINED = {"grid": {"visibility": ["isolated", "recombined"], "combine": ["mixture", "product"]}}
WEIGHTED = {
    "settings": {"max_tokens": 7, "threshold": 0.04},
    "grid": {"visibility": ["isolated", "visible"], "weighting": ["prior", "posterior"]},
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for number in expected:
        for one, other in zip(found[number].runs, expected[number].runs, strict=True):
            why, _ = compare(one, other, ATOL)
            assert why is None, why
            assert one.arrays.keys() == other.arrays.keys() and one.text == other.text
            np.testing.assert_array_equal(one.arrays["next_ids"], other.arrays["next_ids"])
            assert one.prompt_tokens == other.prompt_tokens
        pairs = zip(found[number].pairs, expected[number].pairs, strict=True)
        for one, other in pairs:
            assert (one.a, one.b, one.steps) == (other.a, other.b, other.steps)
            np.testing.assert_allclose(one.ab, other.ab, rtol=1e-4, atol=ATOL)
            np.testing.assert_allclose(one.ba, other.ba, rtol=1e-4, atol=ATOL)


@pytest.mark.parametrize("batch_size", mostly_slow([3, 32], [3]))
@pytest.mark.parametrize("changes", [WIDE, RECOMBINED, WEIGHTED])
def test_a_batch_makes_what_every_run_makes_alone(loaded, folder, changes, batch_size):
    groups = groups_of(folder, **changes)
    begun = []
    alone = dict(run_one_by_one(*loaded, groups, begin=begun.append))
    assert begun == list(range(len(groups)))
    runs = [run for outcome in alone.values() for run in outcome.runs]
    pruned = [at for run in runs for at in run.tokens["pruned_at"] if at is not None]
    assert bool(pruned) == (changes is WIDE)
    assert_same(dict(run_batched(*loaded, groups, batch_size)), alone)


def test_tight_memory_changes_nothing(loaded, folder):
    groups = groups_of(folder)
    model, tokenizer = loaded
    alone = dict(run_one_by_one(model, tokenizer, groups))
    needed = (len("the end of it") + 6 * 4) * model.slot_bytes
    # Rows that have to leave for want of memory start again with an observer of their own.
    assert_same(dict(run_batched(model, tokenizer, groups, 8, max_kv_bytes=3 * needed)), alone)


def test_a_run_is_what_generate_gives(loaded, folder):
    [group, *_] = groups_of(folder)
    for config, run in zip(group, run_group(*loaded, group).runs, strict=True):
        settings = {n: getattr(config.settings, n) for n in Settings.__dataclass_fields__}
        result = generate(*loaded, config.prompt, **settings)
        tokens = [token for step in result.lattice.steps for token in step.tokens]
        assert run.tokens["id"] == [token.id for token in tokens]
        assert run.tokens["slot"] == [token.slot for token in tokens]
        np.testing.assert_allclose(
            run.tokens["probability"], [token.probability for token in tokens], atol=ATOL
        )
        assert run.text == result.chain().text and run.finish_reason == result.finish_reason


def by_hand(model, config, run):
    """Full matrices [L, H, N, S] of every step of a run, by passes of one sequence."""
    lattice = Lattice(run.prompt_tokens)
    state = OneSequence(model, lattice, config.settings.visibility)
    state.prefill(100)
    passes = []
    for step in range(run.n_steps - 1):
        tokens = [
            id for s, id in zip(run.tokens["step"], run.tokens["id"], strict=True) if s == step
        ]
        queries = lattice.reserve(len(tokens), step)
        _, attention = state.append(mx.array(tokens), queries, Capture(full=True))
        seen = may_attend(config.settings.visibility, queries, lattice.slots).any(axis=0)
        weights = np.stack([np.array(layer[0], np.float64) for layer in attention.values()])
        passes.append((weights, np.flatnonzero(seen)))
    return passes


@pytest.mark.parametrize("visibility", ["isolated", "visible", "hidden"])
def test_captures_are_reductions_of_the_full_matrices(loaded, folder, visibility):
    groups = groups_of(folder, captures="full", grid={"visibility": [visibility]})
    found = dict(run_batched(*loaded, groups, 8))
    widths = set()
    for number, group in enumerate(groups):
        [run] = found[number].runs
        assert found[number].pairs == []
        arrays = run.arrays
        passes = by_hand(loaded[0], group[0], run)
        assert list(arrays["entropy_step"]) == list(range(len(passes)))
        for step, (weights, seen) in enumerate(passes):
            entries = arrays["query_step"] == step
            np.testing.assert_array_equal(arrays["slot"][entries], seen)
            assert set(arrays["queries"][entries]) == {weights.shape[2]}
            received = arrays["received"][entries]  # [E, L, H]
            expected = weights.mean(axis=2)[..., seen].transpose(2, 0, 1)
            np.testing.assert_allclose(received, expected, atol=ATOL)
            np.testing.assert_allclose(received.sum(axis=0), 1.0, atol=ATOL)
            logs = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
            entropy = -(weights * logs).sum(axis=-1).mean(axis=-1)
            np.testing.assert_allclose(arrays["entropy"][step], entropy, atol=1e-4)
            matrix = run.full[f"attention.{step}"]
            assert matrix.dtype == np.float16
            np.testing.assert_array_equal(run.full[f"slots.{step}"], seen)
            np.testing.assert_allclose(matrix, weights[..., seen], atol=1e-3)
            widths.add(weights.shape[2])
    assert len(widths) > 1


def stock_distributions(model, run):
    """The mixture of each step of an isolated run of sets of one, by stock mlx-lm, in float64."""
    cache = make_prompt_cache(model.model)
    tokens, found = run.prompt_tokens, []
    for id in [*run.tokens["id"], None]:
        logits = np.array(model.model(mx.array(tokens)[None], cache=cache)[0, -1], np.float64)
        p = np.exp(logits - logits.max())
        found.append(p / p.sum())
        tokens = [id]
    return found[:-1]


def test_next_tokens_and_divergences_are_those_of_stock_distributions(loaded, folder):
    # With sets of one, a run is a plain decode; conditions differ by what they make of siblings,
    # and a prompt pruned of nothing: the divergence of two runs is 0. Runs of two prompts stand in.
    settings = {"threshold": 1.0, "max_tokens": 5}
    groups = groups_of(folder, settings=settings)
    found = dict(run_batched(*loaded, groups, 8))
    p = {}
    for number, outcome in found.items():
        first = outcome.runs[0]
        p[number] = stock_distributions(loaded[0], first)
        for step, expected in enumerate(p[number]):
            best = np.argsort(-expected, kind="stable")[:TOP]
            ids = first.arrays["next_ids"][step]
            np.testing.assert_allclose(
                first.arrays["next_probabilities"][step], expected[best], atol=ATOL
            )
            np.testing.assert_allclose(expected[ids], expected[best], atol=ATOL)
            assert first.texts[int(ids[0])]
        [pair] = outcome.pairs
        np.testing.assert_allclose([*pair.ab, *pair.ba], 0, atol=ATOL)
    divergence = Divergence(2)
    for step, (a, b) in enumerate(zip(p[0], p[1], strict=True)):
        divergence.add(1, step, b.astype(np.float32))
        divergence.add(0, step, a.astype(np.float32))
    [pair] = divergence.pairs()
    for step, (a, b) in enumerate(zip(p[0], p[1], strict=True)):
        assert pair.ab[step] == pytest.approx((a * np.log(a / b)).sum(), rel=1e-4)
        assert pair.ba[step] == pytest.approx((b * np.log(b / a)).sum(), rel=1e-4)


def test_divergences_are_those_of_the_runs_distributions(loaded, folder):
    """Against the mixtures of rows that stock attention code computes in one uncached pass."""
    [group, *_] = groups_of(folder)
    outcome = run_group(*loaded, group)
    p = []
    for config, run in zip(group, outcome.runs, strict=True):
        lattice = Lattice(run.prompt_tokens)
        state = OneSequence(loaded[0], lattice, config.settings.visibility)
        rows, weights = state.prefill(100), np.ones(1)
        each = []
        for step in range(run.n_steps):
            logits = np.array(rows, np.float64)
            powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
            each.append(weights @ (powers / powers.sum(axis=-1, keepdims=True)))
            mine = np.array(run.tokens["step"]) == step
            tokens = np.array(run.tokens["id"])[mine]
            weights = np.array(run.tokens["probability"])[mine]
            weights = weights / weights.sum()
            rows, _ = state.append(mx.array(tokens), lattice.reserve(len(tokens), step))
        p.append(each)
    [pair] = outcome.pairs
    assert pair.steps == list(range(6)) and max(pair.ab) > 1e-3
    for step, (a, b) in enumerate(zip(*p, strict=True)):
        assert pair.ab[step] == pytest.approx((a * np.log(a / b)).sum(), rel=1e-3, abs=1e-5)
        assert pair.ba[step] == pytest.approx((b * np.log(b / a)).sum(), rel=1e-3, abs=1e-5)


def test_distributions_are_let_go_of_once_all_have_shown_theirs():
    divergence = Divergence(3)
    p = np.full(4, 0.25, np.float32)
    for step in range(5):
        for member in (2, 0, 1):
            divergence.add(member, step, p)
        assert divergence._waiting == {}
    divergence.add(2, 0, p)  # of a run that started again
    assert divergence._waiting == {}
    assert [(pair.a, pair.b, pair.steps) for pair in divergence.pairs()] == [
        (0, 1, [0, 1, 2, 3, 4]),
        (0, 2, [0, 1, 2, 3, 4]),
        (1, 2, [0, 1, 2, 3, 4]),
    ]


def test_nothing_is_captured_where_nothing_is_wanted(loaded, folder):
    groups = groups_of(folder, captures="none", grid={"visibility": ["tree", "recombined"]})
    for outcome in dict(run_batched(*loaded, groups, 8)).values():
        assert outcome.pairs == []
        assert all(run.arrays == {} and run.full == {} and run.text for run in outcome.runs)


def test_capturing_changes_no_token(loaded, folder):
    groups = groups_of(folder, **WIDE)
    plain = [[replace(run, captures="none") for run in group] for group in groups]
    captured = dict(run_batched(*loaded, groups, 8))
    for number, outcome in run_batched(*loaded, plain, 8):
        for run, other in zip(outcome.runs, captured[number].runs, strict=True):
            assert run.tokens["id"] == other.tokens["id"]


def test_a_run_that_fails_fails_alone(loaded, folder):
    groups = groups_of(folder, prompts={"a": ["hello", "x" * 300]})
    good, bad = dict(run_batched(*loaded, groups, 8)).values()
    if isinstance(good.runs[0], str):
        good, bad = bad, good
    assert all(isinstance(run, Record) for run in good.runs)
    assert all("context" in run for run in bad.runs)


def test_an_observer_refuses_what_it_would_misread(loaded, folder):
    from tempo_mlx.experiments.capture import Recorder
    from tempo_mlx.generation import begin

    result = begin(*loaded, "hello", Settings(visibility="tree"))
    with pytest.raises(ValueError, match="visibility tree"):
        Request(result, observer=Recorder(False, None, 0))


def tasks(loaded, folder, **changes):
    groups = groups_of(folder, **changes)
    identity = identify(loaded[0].model, loaded[1])
    return identity, groups, dict(run_one_by_one(*loaded, groups))


def perform_or_die(marker, *arguments):
    """`perform` in a process that kills itself in the middle of a run, unless one did before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        pass
    else:
        signal_itself(signal.SIGKILL, passes=9)
    return perform(*arguments)


@pytest.mark.slow
def test_processes_make_the_same_and_one_that_dies_is_replaced(
    loaded, folder, monkeypatch, tmp_path
):
    identity, groups, alone = tasks(loaded, folder, settings={"max_tokens": 30, "threshold": 0.03})
    monkeypatch.setattr(workers, "perform", partial(perform_or_die, tmp_path / "died"))
    begun = []
    found = dict(run_in_workers(folder, identity, groups, 2, begun.append))
    assert len(begun) == len(groups) + 1 and set(begun) == set(range(len(groups)))
    assert_same(found, alone)


@pytest.mark.slow
def test_a_group_whose_process_always_dies_is_given_up(loaded, folder, monkeypatch):
    identity, groups, _ = tasks(loaded, folder)
    monkeypatch.setattr(workers, "perform", os._exit)  # called with the model's name
    monkeypatch.setattr(
        workers._Worker,
        "submit",
        lambda self, name, identity, group: self._pool.submit(os._exit, 9),
    )
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    begun = []
    [(_, outcome)] = run_in_workers(folder, identity, groups[:1], 1, begun.append)
    assert len(begun) == 2
    assert all("died 2 times" in run for run in outcome.runs)


@pytest.mark.slow
def test_another_model_by_the_same_name_is_refused(loaded, folder):
    _, groups, _ = tasks(loaded, folder)
    with pytest.raises(ValueError, match="another model"):
        dict(run_in_workers(folder, "0" * 32, groups[:1], 1, lambda number: None))


def test_memory_is_checked_before_processes_are_started(monkeypatch):
    class Memory:
        available = 5 * psutil.Process().memory_info().rss

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory)
    workers.require_memory(3)
    with pytest.raises(ValueError, match=r"workers=50 needs .* GB are free; use workers=\d"):
        workers.require_memory(50)


@pytest.mark.slow
def test_a_cluster_makes_the_same_and_lost_workers_are_retried(loaded, folder, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 600)
    identity, groups, alone = tasks(loaded, folder, settings={"max_tokens": 30, "threshold": 0.03})
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        address = cluster.scheduler_address
        pids = [worker.pid for worker in cluster.workers.values()]
        outcomes = run_on_cluster(address, folder, identity, groups, lambda number: None)
        found = dict([next(outcomes)])
        os.kill(pids[0], signal.SIGKILL)
        found.update(outcomes)
    assert_same(found, alone)


def test_a_scheduler_that_is_not_there_is_named(loaded, folder, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    with pytest.raises(ValueError, match="--scheduler tcp://127.0.0.1:9 cannot be reached"):
        dict(run_on_cluster("tcp://127.0.0.1:9", folder, "", [], lambda number: None))


def test_a_mismatch_is_found(loaded, folder):
    [group, *_] = groups_of(folder)
    run = run_group(*loaded, group).runs[0]
    assert compare(run, run, 0.0)[0] is None
    tokens = {**run.tokens, "id": [*run.tokens["id"][:-1], 0]}
    assert "step 5" in compare(replace(run, tokens=tokens), run, 1.0)[0]
    for name in ("received", "entropy", "next_probabilities"):
        changed = {**run.arrays, name: run.arrays[name] + 0.01}
        assert name in compare(replace(run, arrays=changed), run, 1e-4)[0]
    changed = {**run.arrays, "slot": run.arrays["slot"] + 1}
    assert "slot" in compare(replace(run, arrays=changed), run, 1.0)[0]


@pytest.mark.slow
def test_the_bench_runs_the_same_runs_in_every_way(folder, monkeypatch):
    monkeypatch.setattr(bench, "RELOADED", 1)
    model, tokenizer = load(folder)
    report = bench_experiments(Subject.of(model, tokenizer, folder, 1), 4, 4, 4, 1)
    times = [row for row in report.rows if row.measure == TIME]
    assert len(times) == 6 and all(row.median > 0 for row in times)
    found = finder(report.rows)
    assert all(found(row.name, DIFFERING).median == 0 for row in times)
    assert found(SEQUENTIAL, LARGEST).median == 0 < found(BATCHED, LARGEST).median < 1e-4
    assert len(report.targets) == 4 and report.targets[-1].met
    json.dumps(report.to_dict())
    runs = [run for group in drawn_suite(folder, 4).expand().groups for run in group]
    assert len(runs) == 100 and all(run.settings.uses_rng for run in runs)
    with pytest.raises(ValueError, match="runs must be an even number"):
        bench_experiments(Subject.of(model, tokenizer, folder, 1), 3, 4, 4, 1)


def memory_of(loaded, folder, runs):
    """Resident bytes after each quarter of many short runs."""
    prompts = {"a": [f"number {i}" for i in range(runs // 2)]}
    groups = groups_of(folder, prompts=prompts, settings={"max_tokens": 4, "threshold": 0.05})
    held, process = [], psutil.Process()
    for run in (run_one_by_one, lambda *arguments: run_batched(*arguments, 16)):
        for number, _ in enumerate(run(*loaded, groups), 1):
            if number % (len(groups) // 4) == 0:
                held.append(process.memory_info().rss)
    return np.array(held).reshape(2, 4)


#: Bytes that a process may grow by between the first and the last quarter of many runs: pages that
#: the allocator keeps. Keys and values, results and captures of one tiny run are about 200 kB.
SLACK = 8e6


@pytest.mark.parametrize(
    "runs", [pytest.param(120, id="120 runs"), pytest.param(1000, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_memory_is_flat_over_many_short_runs(loaded, folder, runs):
    memory_of(loaded, folder, 40)
    held = memory_of(loaded, folder, runs)
    assert (held[:, -1] - held[:, 0] < SLACK).all(), held
