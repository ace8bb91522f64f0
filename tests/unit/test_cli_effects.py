"""An option that was typed and can change nothing is refused, before a model is loaded."""

import json

from tempo_mlx import Settings
from tempo_mlx.cli import load_command
from tempo_mlx.cli.effects import setting_needs
from tempo_mlx.cli.generate import OPTIONS
from tempo_mlx.models import UnsupportedModelError
from tempo_mlx.needs import NEEDS
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.search import SearchSettings

import pytest

#: Options with values that are allowed and have no effect; what the message must name.
GENERATE = [
    (["--prune-threshold", 0.5], "--prune"),
    (["--prune-decision", "quota"], "--prune"),
    (["--prune-steepness", 50], "--prune"),
    (["--prune-lookback", 3], "--prune"),
    (["--prune-if-all-pruned", "keep_all"], "--prune"),
    (["--prune-repair", "none"], "--prune"),
    (["--explain"], "--prune"),
    (["--explain", "--prune", "random", "--quiet"], "--quiet"),
    (["--explain", "--prune", "random", "-o", "-"], "--output"),
    (["--prune", "posterior", "--prune-steepness", 3], "--prune-decision sigmoid"),
    (
        ["--prune", "posterior", "--prune-decision", "sigmoid", "--prune-steepness", 3],
        "--sampling gumbel",
    ),
    (["--prune", "posterior", "--prune-keep-rate", 0.5], "--prune-decision quota"),
    (
        ["--prune", "posterior", "--prune-decision", "quota", "--prune-threshold", 0.5],
        "--prune-decision quota",
    ),
    (["--prune", "posterior", "--prune-if-all-pruned", "keep_all"], "--prune-decision absolute"),
    (["--prune", "posterior", "--prune-layers", "all"], "--prune attention"),
    (["--prune", "random", "--prune-layer-weights", "rising"], "--prune attention"),
    (["--prune", "probability", "--prune-query-weights", "equal"], "--prune attention"),
    (["--beam-width", 8], "--visibility tree"),
    (["--beam-margin", 2, "--visibility", "visible"], "--visibility tree"),
    (["--branching", "shared"], "--visibility tree"),
    (["--beam-margin", 2, "--visibility", "tree", "--beam-width", 1], "--beam-width 1"),
    (["--combine", "mean", "--visibility", "tree"], "--visibility tree"),
    (["--weighting", "prior", "--visibility", "hidden"], "--visibility hidden"),
    (["--batch-size", 4], "--prompts-file"),
    (["--max-kv-bytes", "1GB"], "--prompts-file"),
    (["--system-prompt", "be brief"], "--chat"),
    (["--plot-attention"], "--plot"),
    (["--plot-attention", "--plot", "mask.svg"], "--plot"),
    (["--paths", 2, "--quiet"], "--quiet"),
    (["--verify", "-q"], "--quiet"),
    (["--verify", "--visibility", "tree", "--branching", "replicate"], "--branching replicate"),
    (
        ["--prompt-cache", "x", "--visibility", "tree", "--branching", "replicate"],
        "--branching replicate",
    ),
]


@pytest.fixture
def refused(run):
    """Run a command that must be refused in one line, without a model; returns the line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1, (arguments, err)
        return err

    return call


@pytest.mark.parametrize(("options", "needed"), GENERATE)
def test_options_of_generate_without_effect_are_refused(refused, options, needed):
    message = refused("generate", "hello", "--model", "no-such-model", *options)
    named = [option for option in options if str(option).startswith("--")]
    assert needed in message and any(option in message for option in named)
    assert "no effect" in message or "--plot" in message


OTHERS = [
    (["search", "hello", "--depth", 8], ["--depth", "--evaluation rollout"]),
    (["search", "hello", "--rollout-temp", 0.5], ["--rollout-temp", "--evaluation rollout"]),
    (
        ["search", "hello", "--evaluation", "mean_logprob", "--value", "x.py:f"],
        ["--evaluation", "--value"],
    ),
    (["search", "hello", "--explain", "-q"], ["--explain", "--quiet"]),
    (["search", "hello", "--explain", "-o", "-"], ["--explain", "--output"]),
    (["schedule", "relu(0.5)", "--values", "--json"], ["--values", "--json"]),
    (["doctor", "--all"], ["--all", "--check"]),
    (["models", "--json", "fetch", "smollm2-135m"], ["--json", "fetch"]),
    (
        ["bench", "score", "-c", 0, "--max-kv-bytes", "1GB"],
        ["--max-kv-bytes", "--contexts"],
    ),
]


@pytest.mark.parametrize(("arguments", "words"), OTHERS)
def test_options_of_other_commands_without_effect_are_refused(refused, arguments, words):
    message = refused(*arguments)
    assert "no effect" in message and all(word in message for word in words)


SUITE = """
name: small
model: no-such-model
prompts: {a: [hello]}
settings: {max_tokens: 2}
captures: none
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runner", "sequential", "--batch-size", 3], ["--batch-size", "--runner batched"]),
        (["--runner", "workers=2", "--max-kv-bytes", "1GB"], ["--max-kv-bytes", "sequential"]),
        (["--scheduler", "tcp://x:1", "--batch-size", 3], ["--batch-size", "--scheduler"]),
        (["--scheduler", "tcp://x:1", "--runner", "batched"], ["--runner", "--scheduler"]),
        (["--max-disk", "1GB"], ["--max-disk", "--capture none"]),
    ],
)
def test_options_of_suites_without_effect_are_refused(refused, tmp_path, options, words):
    pytest.importorskip("pydantic")
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE)
    message = refused("experiment", "run", suite, "-o", tmp_path / "runs", *options)
    assert "no effect" in message and all(word in message for word in words)
    assert not (tmp_path / "runs").exists()


def test_suites_say_which_settings_have_no_effect():
    suite_files = pytest.importorskip("tempo_mlx.experiments.suite_files")
    grid = "grid: {visibility: [tree, visible], beam_width: [2, 3]}\n"
    assert suite_files.parse_suite(SUITE + grid).expand().notes == [
        "beam_width has no effect without visibility tree (in 2 of 4 conditions)"
    ]
    pruning = "grid: {pruning: [null, {rule: random, keep_rate: 0.5}]}\nseeds: [1]\n"
    notes = suite_files.parse_suite(SUITE + pruning).expand().notes
    assert [note for note in notes if "pruning" in note] == [
        "pruning.keep_rate has no effect without pruning.decision quota (in 1 of 2 conditions)"
    ]
    assert suite_files.parse_suite(SUITE).expand().notes == []


def test_chat_without_a_text_is_noted(run, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 1, "--chat"]
    prompts.write_text('{"prompt": [3, 4]}\n')
    assert "--chat has no effect" in run(*command)[2]
    prompts.write_text('{"prompt": [3, 4]}\n{"prompt": "a"}\n')
    assert "no effect" not in run(*command)[2]


def test_a_seed_is_noted_where_a_search_draws_nothing(run, folder):
    common = ["search", "hello", "--model", folder, "-m", 1, "-s", 2]
    assert "seed has no effect" in run(*common, "--seed", 0)[2]
    assert "no effect" not in run(*common)[2]
    drawn = ["--evaluation", "rollout", "--rollout-temp", 0.5, "--seed", 3]
    code, _, err = run(*common, *drawn)
    assert code == 0 and "no effect" not in err


def test_search_settings_note_what_has_no_effect():
    assert "depth" in SearchSettings(depth=3).notes()[0]
    assert "seed" in SearchSettings(seed=3, evaluation="rollout").notes()[0]
    assert (
        "simulations, backup: no"
        in SearchSettings(simulations=3, backup="max", max_parallel=1).notes()[0]
    )
    assert not SearchSettings(seed=3, evaluation="rollout", rollout_temp=1.0, depth=2).notes()


def test_aggregate_without_lists_of_spellings_is_noted(run, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = ["score", rows, "--model", folder, "--aggregate", "logsumexp"]
    rows.write_text('{"context": "a", "candidates": ["b"]}\n')
    assert "--aggregate has no effect" in run(*command)[2]
    rows.write_text('{"context": "a", "candidates": ["b", ["b", "c"]]}\n')
    assert run(*command)[2] == ""


def test_memory_for_a_model_that_holds_nothing_is_noted(run, folder, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"context": "a", "candidates": ["b"]}\n')
    options = ["--max-kv-bytes", "1MB", "--stats"]
    assert "no effect" not in run("score", rows, "--model", folder, *options)[2]

    def unsupported(*arguments):
        raise UnsupportedModelError("refused here")

    monkeypatch.setattr("tempo_mlx.scoring.scorer.PrefixTreeScorer", unsupported)
    code, _, err = run("score", rows, "--model", folder, *options)
    assert code == 0 and "--max-kv-bytes has no effect" in err and "full passes" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weight", "nan"], ["weight", "nan"]),
        (["--word-insertion-bonus", "inf"], ["word_insertion_bonus", "inf"]),
        (["--chunk-size", 0], ["chunk_size", "at least 1", "0"]),
        (["--max-context-tokens", -3], ["max_context_tokens", "at least 1", "-3"]),
        (["--aggregate", "mean"], ["aggregate", "logsumexp", "mean"]),
        (["--batch-size", 0], ["--batch-size", "at least 1", "0"]),
        (["--max-kv-bytes", "9" * 400], ["--max-kv-bytes"]),
        (["--max-kv-bytes", "0.1"], ["--max-kv-bytes", "0.1"]),
    ],
)
def test_options_of_score_are_checked_before_a_model_is_loaded(refused, tmp_path, options, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"context": "a", "candidates": ["b"]}\n')
    message = refused("score", rows, "--model", "no-such-model", *options)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("command", ["decode", "pruning", "batch", "tree", "search", "score"])
def test_benches_check_their_numbers_before_they_load_a_model(refused, command):
    message = refused("bench", command, "--rounds", 0, "--model", "no-such-model")
    assert "--rounds must be at least 1, got 0" in message


def test_every_option_that_needs_another_exists():
    names = {parameter.name for parameter in load_command("generate").params}
    assert set(OPTIONS) - names == {"prune_compact_above"}  # Python and files have it.
    assert {need.of for needs in OPTIONS.values() for need in needs} <= names | set(
        Settings(pruning=Pruning()).values()
    )


def test_every_option_of_pruning_needs_pruning():
    for name in vars(Pruning()):
        if name != "rule":
            assert setting_needs()[f"prune_{name}"][0].of == "prune"


def test_options_with_an_effect_run(run, folder):
    common = ["generate", "hello", "--model", folder, "-m", 3, "--threshold", 0.02]
    for options in (
        ["--visibility", "tree", "--beam-width", 3, "--beam-margin", 2, "--branching", "shared"],
        ["--prune", "attention", "--prune-layers", "last:1", "--prune-query-weights", "equal"],
        ["--prune", "random", "--prune-decision", "sigmoid", "--prune-steepness", 3]
        + ["--sampling", "gumbel"],
        ["--prune", "posterior", "--prune-decision", "quota", "--prune-keep-rate", 0.5],
        ["--prune", "posterior", "--prune-decision", "absolute"]
        + ["--prune-if-all-pruned", "keep_all", "--explain"],
        ["--combine", "mean", "--weighting", "prior"],
    ):
        code, _, err = run(*common, *options)
        assert code == 0, (options, err)


def test_rows_of_a_file_may_be_what_gives_an_option_its_effect(run, refused, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 2]
    prompts.write_text(json.dumps({"prompt": "a", "visibility": "tree"}) + '\n{"prompt": "b"}\n')
    code, _, err = run(*command, "--beam-width", 3)
    assert code == 0 and "no effect" not in err
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "visibility": "visible"}\n')
    assert "--visibility tree" in refused(*command, "--beam-width", 3)
    # Rows take over the command's pruning as a whole.
    prompts.write_text(json.dumps({"prompt": "a", "pruning": {"rule": "random"}}) + "\n")
    assert "--prune" in refused(*command, "--prune-threshold", 0.3)


def test_rows_of_a_file_are_told_what_has_no_effect(run, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "beam_width": 2},
        {"prompt": "c", "beam_width": 3, "seed": 4},
        {"prompt": "d", "pruning": {"rule": "posterior", "keep_rate": 0.5}},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run("generate", "--prompts-file", prompts, "--model", folder, "-m", 2)
    notes = [" ".join(note.split()) for note in err.split("note: ")[1:]]
    assert code == 0 and len(out.splitlines()) == 4 and len(notes) == 3
    assert "line 2 and 1 more: beam_width has no effect without visibility tree" in notes[0]
    assert "line 3: seed has no effect" in notes[1]
    assert "line 4: pruning.keep_rate has no effect without pruning.decision quota" in notes[2]
    code, _, err = run(
        "generate", "--prompts-file", prompts, "--model", folder, "-m", 2, "--seed", 1
    )
    assert err.count("seed has no effect") == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"combine": "mean", "visibility": "tree"}, ["combine", "with visibility tree"]),
        ({"beam_width": 3}, ["beam_width", "without visibility tree"]),
        ({"weighting": "prior", "visibility": "hidden"}, ["weighting", "hidden"]),
        ({"weighting": "prior", "threshold": 1.0}, ["weighting", "one token"]),
        ({"pruning": Pruning(), "max_parallel": 1}, ["pruning", "one token"]),
        ({"pruning": Pruning(steepness=3.0)}, ["pruning.steepness", "decision sigmoid", "gumbel"]),
        ({"pruning": Pruning(layers=1)}, ["pruning.layers", "pruning.rule attention"]),
        (
            {"pruning": Pruning(rule="attention"), "visibility": "hidden"},
            ["pruning.rule attention", "hidden"],
        ),
    ],
)
def test_settings_note_what_has_no_effect(given, words):
    notes = Settings(**given).notes()
    assert len(notes) == 1 and all(word in notes[0] for word in words)


def test_settings_that_have_an_effect_are_not_noted():
    every = Pruning("attention", 0.3, "sigmoid", 3.0, if_all_pruned="keep_all", layers=1)
    assert not Settings(pruning=every, sampling="gumbel", seed=3).notes()
    assert not Settings(visibility="tree", beam_width=3, beam_margin=1.0).notes()
    assert not Settings(combine="mean", weighting="prior").notes()
    assert not Settings().notes()


def test_every_need_names_settings():
    known = set(Settings(pruning=Pruning()).values())
    assert set(NEEDS) <= known
    assert {need.of for needs in NEEDS.values() for need in needs} <= known


def test_output_has_as_many_paths_as_are_asked_for(run, folder, tmp_path):
    target = tmp_path / "out.json"
    for asked, found in ((7, 7), (2, 2), (None, 5)):
        options = [] if asked is None else ["--paths", asked]
        run(
            "generate",
            "hello",
            "--model",
            folder,
            "-m",
            4,
            "--threshold",
            0.02,
            "-q",
            "-o",
            target,
            *options,
        )
        assert len(json.loads(target.read_text())["paths"]) == found
