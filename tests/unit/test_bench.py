"""The benches report what they say they report; how fast anything is, is not tested."""

import itertools
import json
import sys

from tempo_mlx import cli, generate, load
from tempo_mlx.bench import decode, runs, timing
from tempo_mlx.bench.batch import prompts_of
from tempo_mlx.bench.decode import bench_decode
from tempo_mlx.bench.decode_report import SINGLE, STOCK
from tempo_mlx.bench.runs import long_run, timed
from tempo_mlx.bench.search import Copying, Rereading
from tempo_mlx.bench.setting import prompt_of, weight_bytes
from tempo_mlx.bench.timing import Spread, alternate, copy_bandwidth, difference, ratio
from tempo_mlx.doctor.random_models import random_model
from tempo_mlx.models import PositionedModel
from tempo_mlx.search import SearchSettings, TreeSearch
from tempo_mlx.search.environment import TextEnvironment
from tempo_mlx.text.vocabulary import Vocabulary, without_end
from tests.hybrid_folder import save_hybrid_model
from tests.tiny_folder import save_tiny_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(save_tiny_model(tmp_path_factory.mktemp("bench") / "tiny"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that each test sets; time passes only when the test says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_variants_take_turns_and_the_first_round_does_not_count():
    order = []
    counter = itertools.count()

    def variant(name):
        def run():
            order.append(name)
            return next(counter)

        return run

    taken = alternate({name: variant(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abccbaabccba"
    assert taken == {"a": [5, 6, 11], "b": [4, 7, 10], "c": [3, 8, 9]}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        alternate({}, rounds=0)


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread(4, 2, 5).scaled(10) == Spread(40, 20, 50)
    assert Spread(4, 2, 5).inverse() == Spread(1 / 4, 1 / 5, 1 / 2)


def test_ratios_and_differences_are_paired():
    # The machine was ten times slower in the second round, for both.
    assert ratio([2, 20, 2], [1, 10, 1]) == Spread(2, 2, 2)
    assert difference([3, 12, 3], [1, 10, 1]) == Spread(2, 2, 2)


def test_copy_counts_bytes_read_and_written(clock, monkeypatch):
    evaluate = mx.eval

    def taking_half_a_second(*arrays):
        evaluate(*arrays)
        clock.now += 0.5

    monkeypatch.setattr(timing.mx, "eval", taking_half_a_second)
    assert copy_bandwidth(n_bytes=1 << 20) == 2 * (1 << 20) / 0.5


@pytest.mark.parametrize("quantised", [False, True])
def test_weight_bytes_leave_out_an_embedding_that_is_no_output_layer(quantised):
    model = random_model("qwen3_moe")
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    parameters = dict(tree_flatten(model.parameters()))
    embedding = [path for path in parameters if "embed_tokens" in path]
    assert embedding and any(path.startswith("lm_head") for path in parameters)
    expected = sum(array.nbytes for path, array in parameters.items() if path not in embedding)
    assert weight_bytes(model) == expected


def test_weight_bytes_count_a_tied_embedding_once(loaded):
    model, _ = loaded
    parameters = tree_flatten(model.parameters())
    assert not any("lm_head" in path for path, _ in parameters)
    assert weight_bytes(model) == sum(array.nbytes for _, array in parameters)


def test_a_run_is_the_median_of_its_steps_after_the_warm_up(clock):
    def steps():
        for seconds in (100, 50, 9, 2, 3, 4):
            clock.now += seconds
            yield [7, 8]

    run = timed(steps(), 2)
    # The first entry holds the prompt, the next two are steps that warm up.
    assert run.step_seconds == 3
    assert run.tokens.tolist() == [[7, 8]] * 6
    with pytest.raises(ValueError, match="3 tokens"):
        timed(steps(), 3)


def test_memory_of_a_run_is_its_own():
    def steps(size):
        held = mx.zeros(size, mx.uint8)
        mx.eval(held)
        for _ in range(5):
            yield [1]

    # What other tests hold in this process is in both.
    others = mx.get_active_memory()
    large = timed(steps(1 << 26), 1).peak_bytes - others
    small = timed(steps(1 << 20), 1).peak_bytes - others
    assert small < (1 << 26) <= large


def test_long_run_takes_turns_and_reports_seconds_for_each_step(clock):
    def side(seconds):
        for step in itertools.count():
            clock.now += seconds * (1 + step // 20)
            yield [0]

    found = long_run({STOCK: side(1.0), SINGLE: side(2.0)}, steps=100)
    assert found.block == 10
    assert found.stock == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found.ours == [2 * seconds for seconds in found.stock]
    # Both slow down alike.
    assert found.target.value == 1 and found.target.met


@pytest.fixture(scope="module")
def report(loaded):
    model, tokenizer = loaded
    return bench_decode(
        model,
        tokenizer,
        prompt_tokens=11,
        max_tokens=6,
        rounds=1,
        siblings=(1, 3),
        long_steps=20,
        model_name="tiny",
    )


def test_variants_decode_as_many_steps_of_the_width_that_they_name(loaded, monkeypatch):
    model, tokenizer = loaded
    runs = {}
    alternate_ = decode.alternate

    def kept(variants, rounds, progress):
        runs.update(alternate_(variants, rounds, progress))
        return runs

    monkeypatch.setattr(decode, "alternate", kept)
    bench_decode(model, tokenizer, prompt_tokens=9, max_tokens=6, rounds=1, siblings=(1, 2, 5))
    shapes = {name: taken[0].tokens.shape for name, taken in runs.items()}
    assert shapes == {
        "mlx-lm": (6, 1),
        "threshold 1": (6, 1),
        "1 sibling": (6, 1),
        "2 siblings": (6, 2),
        "5 siblings": (6, 5),
    }
    # Greedy decoding, three times over.
    stock = runs["mlx-lm"][0].tokens
    np.testing.assert_array_equal(stock, runs["threshold 1"][0].tokens)
    np.testing.assert_array_equal(stock, runs["1 sibling"][0].tokens)


def test_end_tokens_do_not_cut_runs_short(loaded):
    model, tokenizer = loaded
    prompt = prompt_of(tokenizer, 9)
    first = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=3).lattice.sets[0][0].id
    ending = without_end(tokenizer)
    ending.eos_token_ids = {first}
    assert len(generate(model, ending, prompt, threshold=1.0, max_tokens=3).lattice) == 0
    found = bench_decode(model, ending, prompt_tokens=9, max_tokens=6, rounds=1, siblings=(2,))
    assert [m.slots for m in found.measured] == [9 + 6, 9 + 6, 9 + 12]
    assert ending.eos_token_ids == {first}


def test_numbers_follow_from_the_times(report, loaded):
    model, _ = loaded
    assert report.weight_bytes == weight_bytes(model)
    stock, _, one, three = report.measured
    assert [m.slots for m in report.measured] == [17, 17, 17, 11 + 18]
    for m in report.measured:
        seconds = m.step_seconds.median
        assert m.steps_per_second.median == pytest.approx(1 / seconds)
        assert m.tokens_per_second.median == pytest.approx(m.siblings / seconds)
        assert m.weight_bandwidth == pytest.approx(report.weight_bytes / seconds)
        assert m.time_to_stock.median == pytest.approx(seconds / stock.step_seconds.median)
        assert m.time_to_one.median == pytest.approx(seconds / one.step_seconds.median)
        assert m.peak_bytes > report.weight_bytes
    assert (one.siblings, three.siblings) == (1, 3)


def test_report_is_json_and_targets_are_those_that_were_measured(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert data["schema"] == 1 and data["model"] == "tiny"
    assert {"device", "dtype", "prompt_tokens", "max_tokens", "rounds", "versions", "blas"} <= set(
        data
    )
    assert [run["name"] for run in data["runs"]] == [
        "mlx-lm", "threshold 1", "1 sibling", "3 siblings",
    ]  # fmt: skip
    assert len(data["long"]["stock"]) == len(data["long"]["ours"]) == 10
    # A step of eight siblings was not measured, so nothing is said about it.
    assert [target["wanted"] for target in data["targets"]] == [0.97, 1.05, 1.05]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"max_tokens": 3}, "max_tokens must be at least 4, got 3"),
        ({"siblings": (1, 0)}, r"siblings must be at least 1, got \[1, 0\]"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"long_steps": 19}, "long_steps must be 0 or at least 20, got 19"),
        ({"long_steps": 300}, "300 steps exceed the model's context of 256"),
    ],
)
def test_bad_arguments_are_named(loaded, arguments, message):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=message):
        bench_decode(model, tokenizer, **arguments)


def test_command_prints_a_table_and_writes_the_report(tmp_path, monkeypatch, capsys):
    folder = save_tiny_model(tmp_path / "tiny")
    output = tmp_path / "bench.json"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", "bench", "decode", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    common = ("--model", folder, "-m", 5, "-n", 1, "-p", 8)
    code, out, err = run(*common, "--siblings", "8", "--dtype", "float16", "-o", output)
    assert (code, err) == (0, "")
    assert "8 siblings" in out and "mlx-lm" in out and "float16" in out
    assert json.loads(output.read_text())["dtype"] == "float16"
    code, _, err = run(*common, "--siblings", "1,x")
    assert code == 2 and "--siblings must be integers" in err and err.count("\n") == 1
    code, _, err = run(*common, "--dtype", "int8")
    assert code == 2 and "--dtype must be one of" in err


def test_batch_bench_measures_every_variant(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    output = tmp_path / "bench.json"
    common = ("bench", "batch", "--model", folder, "-m", 5, "-n", 1, "-p", 8)
    code, out, err = run(*common, "--batch-sizes", "1,8", "-o", output)
    assert (code, err) == (0, "") and "mlx-lm" in out and "replicated" in out
    report = json.loads(output.read_text())
    found = {(each["name"], each["batch_size"]): each for each in report["throughput"]}
    assert set(found) == {
        (v, n) for v in ("mlx-lm", "threshold 1", "threshold 0.1") for n in (1, 8)
    }
    for (name, n), each in found.items():
        assert (each["speedup"] is not None) == (n == 8 and name != "mlx-lm")
        assert each["steps_per_second"] == pytest.approx(n / each["step_seconds"]["median"])
    assert found["mlx-lm", 8]["tokens"] == found["threshold 1", 8]["tokens"] == 8 * 5
    assert found["threshold 0.1", 8]["tokens"] >= 8 * 5
    assert 0 <= report["largest_waste"] <= 1
    copies = report["replicate"]
    assert copies["bytes_before"] < copies["bytes_after"]
    code, _, err = run(*common, "--batch-sizes", "0")
    assert code == 2 and "--batch-sizes" in err and err.count("\n") == 1


def test_prompts_of_a_batch_differ(loaded):
    _, tokenizer = loaded
    prompts = prompts_of(tokenizer, 8, 16)
    assert [len(p) for p in prompts] == [12, 13, 14, 15, 17, 18, 19, 20]
    assert len({tuple(p[:8]) for p in prompts}) == 8


def test_host_bench_measures_every_variant_beside_mlx_lm(tmp_path, run):
    output = tmp_path / "bench.json"
    code, out, err = run("bench", "host", "-m", 5, "-n", 1, "-p", 8, "-o", output)
    assert (code, err) == (0, "") and "2 layers" in out
    report = json.loads(output.read_text())
    stock, *ours = report["runs"]
    names = ["threshold 1", "1 sibling", "4 siblings, recombined", "4 siblings, isolated"]
    assert stock["name"] == "mlx-lm" and [each["name"] for each in ours] == names
    for each in report["runs"]:
        seconds, theirs = each["step_seconds"]["median"], stock["step_seconds"]["median"]
        assert each["over_stock"]["median"] == pytest.approx(seconds - theirs)
        assert each["time_to_stock"]["median"] == pytest.approx(seconds / theirs)
    assert [target["wanted"] for target in report["targets"]] == [0.2, 0.7, 0.7]
    found = [ours[0], *ours[2:]]
    assert [target["value"] for target in report["targets"]] == [
        pytest.approx(1e3 * each["over_stock"]["median"]) for each in found
    ]
    code, _, err = run("bench", "host", "-m", 3)
    assert code == 2 and "max-tokens must be at least 4" in err and err.count("\n") == 1


def test_tree_bench_measures_every_variant(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    output = tmp_path / "bench.json"
    common = ("bench", "tree", "--model", folder, "-m", 5, "-n", 1, "-p", 8)
    code, out, err = run(*common, "--leaves", 3, "-o", output)
    assert (code, err) == (0, "") and "separate runs" in out
    report = json.loads(output.read_text())
    assert [each["name"] for each in report["runs"]] == [
        "tree, one sequence",
        "tree, rows of their own",
        "separate runs",
        "mlx-lm, one batch",
        "hybrid: tree, one sequence",
        "hybrid: mlx-lm, one batch",
    ]
    assert all(each["seconds"]["median"] > 0 for each in report["runs"])
    assert all(each["cache_bytes"] > 0 for each in report["runs"])
    ours, stock = (each["seconds"]["median"] for each in report["runs"][-2:])
    hybrid = report["hybrid"]
    assert hybrid["over_stock"]["median"] == pytest.approx(ours / stock)
    # The states of three branches, and keys and values.
    assert report["runs"][-2]["cache_bytes"] > 3 * hybrid["state_bytes"] > 0
    assert "hybrid: qwen3_next" in out
    code, _, err = run(*common, "--leaves", 1)
    assert code == 2 and "leaves must be at least 2" in err and err.count("\n") == 1


def test_sets_of_a_hybrid_model_are_measured_recombined_or_refused_at_once(tmp_path, run):
    folder = save_hybrid_model(tmp_path / "hybrid", save_tiny_model(tmp_path / "tiny"))
    output = tmp_path / "bench.json"
    short = ("--model", folder, "-n", 1, "-p", 8)
    for name, options in {
        "decode": ("-m", 5, "--siblings", "1,3"),
        "batch": ("-m", 4, "--batch-sizes", "1,2"),
    }.items():
        code, _, err = run("bench", name, *short, *options, "-o", output, "--overwrite")
        assert (code, err) == (0, "")
        assert json.loads(output.read_text())["visibility"] == "recombined"
    for command in (["pruning", *short], ["experiments", *short[:-2]]):
        code, out, err = run("bench", *command)
        assert (code, out) == (2, "") and "visibility isolated" in err and err.count("\n") == 1


def test_search_bench_searches_the_same_tree_in_every_way(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    output = tmp_path / "bench.json"
    common = ("bench", "search", "--model", folder, "-s", 6, "-n", 1, "-p", 8)
    code, out, err = run(*common, "--leaves", "1,3", "-o", output)
    assert (code, err) == (0, "") and "rereading each text" in out
    report = json.loads(output.read_text())
    assert len(report["runs"]) == 4
    assert all(each["simulations_per_second"]["median"] > 0 for each in report["runs"])
    code, _, err = run(*common, "--leaves", "0")
    assert code == 2 and "--leaves" in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", [Rereading, Copying])
def test_rivals_of_the_search_find_the_same_values(loaded, kind):
    model, tokenizer = loaded
    settings = SearchSettings(simulations=20, threshold=0.01, leaves_per_batch=3)
    trees = []
    for environment in (TextEnvironment, kind):
        one = environment(PositionedModel.of(model), Vocabulary(tokenizer), [1, 2, 3], settings)
        one.read_prompt()
        TreeSearch(one.tree, one.expand, one.evaluate, settings.policy()).run(20)
        trees.append(one.tree)
    ours, theirs = trees
    np.testing.assert_array_equal(ours.action, theirs.action)
    np.testing.assert_array_equal(ours.visits, theirs.visits)
    np.testing.assert_allclose(ours.value, theirs.value, atol=1e-5)


@pytest.mark.slow
def test_score_bench_finds_the_same_scores_in_every_way(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    output = tmp_path / "bench.json"
    code, out, err = run("bench", "score", "--model", folder, "-n", 1, "-c", 150, "-o", output)
    assert (code, err) == (0, "") and "one trie" in out and "150 contexts" in out
    report = json.loads(output.read_text())
    assert len(report["runs"]) == 4 * 4 and len(report["second_calls"]) == 4
    assert all(each["difference"] < 1e-3 for each in report["runs"])
    wanted = [target["wanted"] for target in report["targets"]]
    assert wanted == [25, 8, 6, 2, 3, 1.5, 3, 3, 3, 3, 1.1]
    beam = report["runs"][1]
    assert beam["name"] == "every text alone"
    assert report["targets"][0]["value"] == beam["over_ours"]["median"] > 0
    assert report["memory"]["largest"] <= 1.1 * report["memory"]["max_kv_bytes"]
    code, _, err = run("bench", "score", "--model", folder, "-c", -1)
    assert code == 2 and "--contexts must be at least 0" in err and err.count("\n") == 1
