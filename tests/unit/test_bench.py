"""The benches report what they say they report; how fast anything is, is not tested."""

import io
import itertools
import json
import re

from tempo_mlx import generate, load
from tempo_mlx.bench import decode, runs, timing
from tempo_mlx.bench.batch import prompts_of
from tempo_mlx.bench.decode import bench_decode, rise
from tempo_mlx.bench.host import differences
from tempo_mlx.bench.result import Row, Spread, compared, finder, ratio
from tempo_mlx.bench.runs import SINGLE, STOCK, long_run, timed
from tempo_mlx.bench.search import Copying, Rereading
from tempo_mlx.bench.setting import Subject, prompt_of, weight_bytes
from tempo_mlx.bench.timing import alternate, copy_bandwidth
from tempo_mlx.cli.tables import numbers, table_of
from tempo_mlx.doctor.random_models import random_model
from tempo_mlx.io.console import Console
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


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)


def test_ratios_and_differences_are_paired():
    # The machine was ten times slower in the second round, for both.
    assert ratio([2, 20, 2], [1, 10, 1]) == Spread(2, 2, 2)
    assert differences([3, 12, 3], [1, 10, 1]) == [2, 2, 2]
    stock, ours = compared("steps", "step", "s", {"a": [1, 10, 1], "b": [2, 20, 2]}, "a")
    assert stock.ratios == {"a": Spread(1, 1, 1)} and ours.ratios == {"a": Spread(2, 2, 2)}


def test_numbers_of_an_option_are_checked():
    assert numbers("4,1,4", "--steps", 1, 4) == [4, 1]
    with pytest.raises(ValueError, match="--steps must be integers of at least 2"):
        numbers("4,1", "--steps", 2, 4)
    with pytest.raises(ValueError, match="--steps must be at most 4, got 5"):
        numbers("5", "--steps", 1, 4)


WIDE = [
    Row(
        "steps", "threshold 1", measure, unit, [0.0123, 0.0204, 0.0303], {"mlx-lm": Spread(1, 1, 2)}
    )
    for measure, unit in (("step", "s"), ("whole run", "s"), ("cache", "bytes"))
] + [Row("steps", "8 siblings", "slots", "", [1234567.0])]


@pytest.mark.parametrize("width", [60, 80, 200, None])
def test_no_width_cuts_a_number_of_a_table(width):
    file = io.StringIO()
    terminal = {} if width is None else {"force_terminal": True, "width": width}
    Console(file=file, color_system=None, **terminal).print(table_of(WIDE))
    out = file.getvalue()
    for number in ("20.40 [16.35, 25.35]", "1,234,567", "1 [1, 2]"):
        assert number in out
    assert "…" not in out
    if width is not None:
        assert max(map(len, out.splitlines())) <= width


def test_a_column_has_one_unit():
    rows = compared("g", "step", "s", {"a": [0.5], "b": [0.001]})
    file = io.StringIO()
    Console(file=file).print(table_of(rows))
    assert "step, ms" in file.getvalue() and re.search(r"500\D", file.getvalue())


def test_copy_counts_bytes_read_and_written(clock, monkeypatch):
    evaluate = mx.eval

    def taking_half_a_second(*arrays):
        evaluate(*arrays)
        clock.now += 0.5

    monkeypatch.setattr(timing.mx, "eval", taking_half_a_second)
    assert copy_bandwidth(n_bytes=1 << 20) == 2 * (1 << 20) / 0.5


@pytest.mark.parametrize("quantised", [False, True])
def test_weight_bytes_leave_out_an_untied_embedding(quantised):
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
    assert found[STOCK] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found[SINGLE] == [2 * seconds for seconds in found[STOCK]]
    # Both slow down alike.
    assert rise(found).value == 1 and rise(found).met


@pytest.fixture(scope="module")
def report(loaded):
    return bench_decode(Subject.of(*loaded, "tiny", 1), 11, 6, (1, 3), 20)


@pytest.mark.slow
def test_variants_decode_as_many_steps_of_the_width_that_they_name(loaded, monkeypatch):
    runs = {}
    decoding = decode._decoding

    def kept(taken, *others):
        runs.update(taken)
        return decoding(taken, *others)

    monkeypatch.setattr(decode, "_decoding", kept)
    bench_decode(Subject.of(*loaded, "tiny", 1), 9, 6, (1, 2, 5))
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
    found = bench_decode(Subject.of(model, ending, "tiny", 1), 9, 6, (2,))
    slots = [row.values for row in found.rows if row.measure == "slots"]
    assert slots == [[9 + 6], [9 + 6], [9 + 12]]
    assert ending.eos_token_ids == {first}


def test_numbers_follow_from_the_times(report, loaded):
    model, _ = loaded
    found = finder(report.rows)
    size = found("weights", "size").median
    assert size == weight_bytes(model)
    copied = found("copying an array", "speed").median
    stock, one = found(STOCK, "step").median, found("1 sibling", "step").median
    for name, width, slots in (
        (STOCK, 1, 17),
        (SINGLE, 1, 17),
        ("1 sibling", 1, 17),
        ("3 siblings", 3, 11 + 18),
    ):
        step = found(name, "step")
        assert found(name, "steps/s").median == pytest.approx(1 / step.median)
        assert found(name, "tokens/s").median == pytest.approx(width / step.median)
        assert found(name, "weights read").median == pytest.approx(size / step.median)
        assert found(name, "of copy").median == pytest.approx(100 * size / step.median / copied)
        assert found(name, "slots").median == slots
        assert found(name, "peak memory").median > size
        assert step.ratios[STOCK].median == pytest.approx(step.median / stock)
        assert step.ratios["1 sibling"].median == pytest.approx(step.median / one)


def test_result_is_json_and_targets_are_those_that_were_measured(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["schema"], data["bench"], data["model"]) == (2, "decode", "tiny")
    assert {"device", "dtype", "prompt_tokens", "max_tokens", "rounds", "versions", "blas"} <= set(
        data
    )
    steps = [row for row in data["rows"] if row["measure"] == "step"]
    assert [row["name"] for row in steps] == ["mlx-lm", "threshold 1", "1 sibling", "3 siblings"]
    for row in steps:
        assert row["median"] == row["values"][0] and row["unit"] == "s"
    long = [row for row in data["rows"] if row["name"].startswith("steps ")]
    assert len(long) == 2 * 10 and long[-1]["name"] == "steps 19-20"
    # A step of eight siblings was not measured, so nothing is said about it.
    assert [target["wanted"] for target in data["targets"]] == [0.97, 1.05, 1.05]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", 0), "--prompt-tokens must be at least 1, got 0"),
        (("-m", 3), "--max-tokens must be at least 4, got 3"),
        (("--siblings", "1,0"), "--siblings must be integers of at least 1"),
        (("--siblings", "1,x"), "--siblings must be integers of at least 1"),
        (("--num-trials", 0), "--rounds must be at least 1, got 0"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--long",), "2000 steps exceed the model's context of 256"),
    ],
)
def test_bad_arguments_are_named(tmp_path, run, arguments, message):
    folder = save_tiny_model(tmp_path / "tiny")
    code, out, err = run("bench", "decode", "--model", folder, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def measured(run, bench, output, *arguments):
    """The tables of a bench and its rows by variant and measure, and all that it wrote."""
    code, out, err = run("bench", bench, *arguments, "-o", output)
    assert (code, err) == (0, "")
    data = json.loads(output.read_text())
    assert data["bench"] == bench
    rows = {(row["name"], row["measure"]): row for row in data["rows"]}
    assert len(rows) == len(data["rows"])
    return out, rows, data


def test_command_prints_a_table_and_writes_the_result(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    arguments = ("--model", folder, "-m", 5, "-n", 1, "-p", 8, "--siblings", "8")
    out, rows, data = measured(
        run, "decode", tmp_path / "bench.json", *arguments, "--dtype", "float16"
    )
    assert "8 siblings" in out and "mlx-lm" in out and "float16" in out
    assert data["dtype"] == "float16" and ("8 siblings", "peak memory") in rows


def test_batch_bench_measures_every_variant(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    common = ("--model", folder, "-m", 5, "-n", 1, "-p", 8)
    out, rows, data = measured(
        run, "batch", tmp_path / "bench.json", *common, "--batch-sizes", "1,8"
    )
    assert "mlx-lm" in out and "replicated" in out
    variants = [
        f"{n} x {name}" for n in (1, 8) for name in ("mlx-lm", "threshold 1", "threshold 0.1")
    ]
    assert [name for name, measure in rows if measure == "step"] == variants
    for name in variants:
        n = int(name.split()[0])
        speedup = n == 8 and "mlx-lm" not in name
        assert ((name, "steps/s over one by one") in rows) == speedup
        assert ((name, "whole run over one by one") in rows) == speedup
        step = rows[name, "step"]["median"]
        assert rows[name, "steps/s"]["median"] == pytest.approx(n / step)
        stock = rows[f"{n} x mlx-lm", "step"]["median"]
        assert rows[name, "step"]["ratios"]["mlx-lm"]["median"] == pytest.approx(step / stock)
        whole, tokens = rows[name, "whole run"]["median"], rows[name, "tokens"]["median"]
        assert rows[name, "tokens/s, whole run"]["median"] == pytest.approx(tokens / whole)
    tokens = {name: rows[name, "tokens"]["median"] for name in variants}
    assert tokens["8 x mlx-lm"] == tokens["8 x threshold 1"] == 8 * 5
    assert tokens["8 x threshold 0.1"] >= 8 * 5
    assert 0 <= rows["24 prompts, 8 at a time", "largest share"]["median"] <= 1
    before = rows["replicated", "held before the first tokens"]["median"]
    assert before < rows["replicated", "held after them"]["median"]
    assert [target["wanted"] for target in data["targets"]] == [0.97, 0.97, 5, 5, 0.25]
    code, _, err = run("bench", "batch", *common, "--batch-sizes", "0")
    assert code == 2 and "--batch-sizes" in err and err.count("\n") == 1


def test_prompts_of_a_batch_differ(loaded):
    _, tokenizer = loaded
    prompts = prompts_of(tokenizer, 8, 16)
    assert [len(p) for p in prompts] == [12, 13, 14, 15, 17, 18, 19, 20]
    assert len({tuple(p[:8]) for p in prompts}) == 8


def test_host_bench_compares_every_variant_with_mlx_lm(tmp_path, run):
    common = ("-m", 5, "-n", 1, "-p", 8)
    out, rows, data = measured(run, "host", tmp_path / "bench.json", *common)
    assert "2 layers" in out
    names = ["threshold 1", "1 sibling", "4 siblings, recombined", "4 siblings, isolated"]
    assert [name for name, measure in rows if measure == "step"] == ["mlx-lm", *names]
    theirs = rows["mlx-lm", "step"]["median"]
    for name in names:
        step, beyond = rows[name, "step"], rows[name, "beyond mlx-lm's"]
        assert beyond["median"] == pytest.approx(step["median"] - theirs)
        assert step["ratios"]["mlx-lm"]["median"] == pytest.approx(step["median"] / theirs)
    assert [target["wanted"] for target in data["targets"]] == [0.2, 0.7, 0.7]
    assert [target["value"] for target in data["targets"]] == [
        pytest.approx(1e3 * rows[name, "beyond mlx-lm's"]["median"])
        for name in (names[0], *names[2:])
    ]
    code, _, err = run("bench", "host", "-m", 3)
    assert code == 2 and "max-tokens must be at least 4" in err and err.count("\n") == 1


@pytest.mark.slow
def test_pruning_bench_measures_evidence_and_compaction(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny", num_hidden_layers=4)
    common = ("--model", folder, "-m", 5, "-n", 1, "-p", 8)
    _, rows, data = measured(run, "pruning", tmp_path / "bench.json", *common, "--steps", "40")
    variants = ["no pruning", "posterior", "attention, last 4 layers", "attention, all layers"]
    steps = [name for name, measure in rows if measure == "step"]
    assert steps == [*variants, "40 steps, not compacted", "40 steps, compacted"]
    for name in variants:
        assert set(rows[name, "step"]["ratios"]) == {"no pruning"}
    for measure in ("slots held", "cache", "peak beside weights"):
        assert all(rows[name, measure]["median"] > 0 for name in steps[4:])
    loose, compact = (rows[name, "slots held"]["median"] for name in steps[4:])
    # The last set is not read.
    assert compact < loose == 8 + 39 * 4
    assert [target["wanted"] for target in data["targets"]] == [1.15, 1.15, 1.35, 1.3]
    peak = rows["while compacting", "memory over cache"]["median"]
    assert data["targets"][-1]["value"] == peak


@pytest.mark.slow
def test_tree_bench_measures_every_variant(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny")
    common = ("--model", folder, "-m", 5, "-n", 1, "-p", 8)
    out, rows, data = measured(run, "tree", tmp_path / "bench.json", *common, "--leaves", 3)
    assert "separate runs" in out and "3 branches of qwen3_next" in out
    names = [name for name, measure in rows if measure == "time"]
    assert names == [
        "tree, one sequence",
        "tree, a row for each branch",
        "separate runs",
        "mlx-lm, one batch",
        "hybrid: tree, one sequence",
        "hybrid: mlx-lm, one batch",
    ]
    assert all(rows[name, "time"]["median"] > 0 < rows[name, "cache"]["median"] for name in names)
    ours, stock = (rows[name, "time"] for name in names[-2:])
    over = ours["ratios"]["hybrid: mlx-lm, one batch"]["median"]
    assert over == pytest.approx(ours["median"] / stock["median"])
    # The states of three branches, and keys and values.
    states = rows["qwen3_next", "states of a branch"]["median"]
    assert rows[names[-2], "cache"]["median"] > 3 * states > 0
    assert rows["qwen3_next", "parameters"]["median"] > 1e6
    assert [target["wanted"] for target in data["targets"]] == [4, 1, 0.5]
    code, _, err = run("bench", "tree", *common, "--leaves", 1)
    assert code == 2 and "leaves must be at least 2" in err and err.count("\n") == 1


@pytest.mark.slow
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
    common = ("--model", folder, "-s", 6, "-n", 1, "-p", 8)
    _, rows, _ = measured(run, "search", tmp_path / "bench.json", *common, "--leaves", "1,3")
    names = [
        "ours, 1 leaf in a pass",
        "ours, 3 leaves in a pass",
        "rereading each text",
        "copying the cache for each branch",
    ]
    assert [name for name, measure in rows if measure == "simulations/s"] == names
    for name in names:
        time = rows[name, "time"]
        assert rows[name, "simulations/s"]["median"] == pytest.approx(6 / time["median"])
        over = time["ratios"]["ours, 3 leaves in a pass"]["median"]
        assert over == pytest.approx(time["median"] / rows[names[1], "time"]["median"])
    code, _, err = run("bench", "search", *common, "--leaves", "0")
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
    common = ("--model", folder, "-n", 1, "-c", 150, "--held", "100kB,1MB")
    out, rows, data = measured(run, "score", tmp_path / "bench.json", *common)
    assert "one trie" in out and "150 contexts" in out
    differences = [row for (_, measure), row in rows.items() if measure == "largest difference"]
    assert len(differences) == 4 * 4 and all(row["median"] < 1e-3 for row in differences)
    assert sum(measure == "times faster" for _, measure in rows) == 4
    wanted = [target["wanted"] for target in data["targets"]]
    assert wanted == [25, 8, 6, 2, 3, 1.5, 3, 3, 3, 3, 1.05, 1.1]
    alone = rows["beam, 10 x 5: every text alone", "call"]
    assert data["targets"][0]["value"] == alone["ratios"]["one trie"]["median"] > 0
    small, large = rows["100.0 kB held", "call"], rows["1.0 MB held", "call"]
    found = large["ratios"]["100.0 kB held"]["median"]
    assert found == pytest.approx(large["median"] / small["median"])
    assert rows["150 contexts", "held at most"]["median"] <= 1.1 * data["max_kv_bytes"]
    code, _, err = run("bench", "score", "--model", folder, "-c", -1)
    assert code == 2 and "--contexts must be at least 0" in err and err.count("\n") == 1


@pytest.mark.slow
def test_sizes_that_do_not_fit_are_not_held(tmp_path, run, monkeypatch):
    monkeypatch.setattr("tempo_mlx.bench.score.default_budget", lambda: 1_050_000)
    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    common = ("--model", folder, "-n", 1, "-c", 0, "--held", "100kB,1MB")
    _, rows, _ = measured(run, "score", tmp_path / "bench.json", *common)
    assert ("100.0 kB held", "call") in rows and ("1.0 MB held", "call") not in rows


@pytest.mark.slow
def test_rescore_bench_finds_the_scores_of_a_padded_batch(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=512)
    sizes = ("--beams", 4, "--hypotheses", 5, "--lists", 2)
    common = ("--model", folder, "-n", 1, *sizes)
    _, _, report = measured(run, "rescore", tmp_path / "bench.json", *common)
    differences = [row for row in report["rows"] if row["measure"] == "largest difference"]
    assert len(differences) == 6 and all(row["median"] < 1e-3 for row in differences)
    assert [target["wanted"] for target in report["targets"]] == [5, 2, 3]


@pytest.mark.slow
def test_draft_bench_finds_the_same_texts(tmp_path, run):
    folder = save_tiny_model(tmp_path / "tiny", max_position_embeddings=1024)
    common = ("--model", folder, "--prompts", 2, "-m", 8)
    out, rows, report = measured(run, "draft", tmp_path / "bench.json", *common)
    assert "copy or rewrite: lookup" in out
    same = [row for row in report["rows"] if row["measure"].startswith("prompts with the text")]
    assert len(same) == 12 and all(row["median"] == 2 for row in same)
    assert rows["prose: no drafts", "tokens a pass"]["median"] == pytest.approx(8 / 7)
    assert len(report["targets"]) == 12
