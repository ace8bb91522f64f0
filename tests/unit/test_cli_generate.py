"""``tempo-mlx generate`` as its users meet it: output, files, bad input, Ctrl-C."""

import json
import re
import signal

from tests.commands import run_signalled
from tests.sweeps import mostly_slow
from tests.tiny_folder import save_tiny_model

import pytest


def test_prints_sets_the_best_path_and_statistics(run, folder):
    code, out, err = run(
        "generate", "hello", "--model", folder, "--threshold", 0.02, "--max-tokens", 8
    )
    assert code == 0
    assert out.startswith("hello") and re.search(r"\[.+/.+\]", out) and "best path:" in out
    assert float(re.search(r"peak memory (\S+) GB", err)[1]) >= 0
    assert "8 steps" in err and "ended by length" in err


def test_verify_reports_the_difference(run, folder):
    code, _, err = run("generate", "hello", "--model", folder, "--threshold", 0.02, "--verify")
    assert code == 0
    assert float(re.search(r"largest difference (\S+) of", err)[1]) < 1e-3


def test_output_is_the_result_and_quiet_prints_only_the_text(run, folder, tmp_path):
    target = tmp_path / "out.json"
    code, out, err = run(
        "generate", "hello", "--model", folder, "--threshold", 0.02, "-m", 6, "-q", "-o", target
    )
    data = json.loads(target.read_text())
    assert (code, err) == (0, "") and data["schema"] == 2
    assert out.rstrip("\n") == data["text"].rstrip("\n")
    assert len(data["steps"]) == 6 and data["settings"]["max_tokens"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_prompt_comes_from_argument_option_file_or_standard_input(run, folder, tmp_path):
    import io

    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    common = ("--model", folder, "-m", 5, "-q")
    outputs = {
        run("generate", "hello", *common),
        run("generate", "-p", "hello", *common),
        run("generate", "--prompt-file", file, *common),
        run("generate", "-", *common, stdin=io.StringIO("hello")),
    }
    assert len(outputs) == 1 and next(iter(outputs))[0] == 0


def test_chat_goes_through_the_template(run, folder):
    arguments = ("--chat", "--system-prompt", "be brief", "--model", folder, "-m", 3)
    code, out, _ = run("generate", "hi", *arguments)
    assert code == 0 and out.startswith("system: be brief\nuser: hi\nanswer:")


def test_useless_seed_is_said_to_be_useless(run, folder):
    _, _, err = run("generate", "hello", "--model", folder, "-m", 2, "--seed", 3)
    assert "no effect" in err


def test_sampling_reports_its_seed(run, folder):
    _, _, err = run("generate", "hello", "--model", folder, "-m", 2, "--sampling", "gumbel")
    seed = re.search(r"seed (\d+)", err)[1]
    first = run("generate", "a", "--model", folder, "-q", "--sampling", "gumbel", "--seed", seed)
    again = run("generate", "a", "--model", folder, "-q", "--sampling", "gumbel", "--seed", seed)
    assert first == again


def bad_inputs(folder, tmp_path):
    broken = save_tiny_model(tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    mamba = save_tiny_model(tmp_path / "mamba", model_type="no-such-type")
    nan = save_tiny_model(tmp_path / "nan", rms_norm_eps=float("nan"))
    (tmp_path / "empty").mkdir()
    common = ["hello", "--model", folder]
    return {
        "empty prompt": (["", "--model", folder], ["prompt", "empty"]),
        "no prompt": (["--model", folder], ["prompt"]),
        "long prompt": (["x" * 300, "--model", folder], ["300", "256"]),
        "threshold 2": ([*common, "--threshold", "2"], ["threshold", "2", "(0, 1]"]),
        "threshold 0": ([*common, "--threshold", "0"], ["threshold", "0", "(0, 1]"]),
        "threshold x": ([*common, "--threshold", "x"], ["threshold", "x"]),
        "max_parallel": ([*common, "--max-parallel", "0"], ["max_parallel", "0"]),
        "max_tokens": ([*common, "--max-tokens", "0"], ["max_tokens", "0"]),
        "visibility": ([*common, "--visibility", "all"], ["visibility", "all"]),
        "schedule": ([*common, "--schedule", "line"], ["schedule", "line"]),
        "option": ([*common, "--treshold", "1"], ["treshold"]),
        "unknown model": (["hello", "--model", "no-such-model"], ["no-such-model"]),
        "no config": (["hello", "--model", str(tmp_path / "empty")], ["config.json"]),
        "truncated": (["hello", "--model", str(broken)], ["broken"]),
        "architecture": (["hello", "--model", str(mamba)], ["no-such-type"]),
        "nan": (["hello", "--model", str(nan)], ["not finite"]),
        "output folder": ([*common, "-o", str(tmp_path / "no" / "x.json")], ["--output"]),
        "output is a folder": ([*common, "-o", str(tmp_path)], ["--output", "folder"]),
        "prompt file": (["--prompt-file", str(tmp_path / "no.txt")], ["no.txt"]),
        "adapter": ([*common, "--adapter-path", str(tmp_path / "none")], ["adapter"]),
        "rule": ([*common, "--prune", "best"], ["rule", "best", "posterior"]),
        "prune threshold": (
            [*common, "--prune", "posterior", "--prune-threshold", "2"],
            ["threshold", "2", "[0, 1]"],
        ),
        "control points": (
            [*common, "--prune", "posterior", "--prune-schedule", "bezier(3,0)"],
            ["p1", "3", "[0, 1]"],
        ),
        "layers": (
            [*common, "--prune", "attention", "--prune-layers", "0,9"],
            ["layers", "9", "0 to 1"],
        ),
        "layer list": ([*common, "--prune", "attention", "--prune-layers", "x"], ["layers", "x"]),
        "weighting": ([*common, "--weighting", "some"], ["weighting", "some"]),
        "plot": ([*common, "--plot", str(tmp_path / "x.bmp")], ["--plot", ".svg"]),
        "paths": ([*common, "--paths", "-1"], ["paths", "-1"]),
        "stop": ([*common, "--stop", ""], ["stop", "empty"]),
        "end token": ([*common, "--extra-eos-token", "<|typo|>"], ["extra_eos", "<|typo|>"]),
        "end token's id": ([*common, "--extra-eos-token", "257"], ["extra_eos", "257"]),
        "end token's text": ([*common, "--extra-eos-token", " "], ["extra_eos", "token 220"]),
    }


def test_bad_input_is_one_line_and_exit_code_2(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, (arguments, words) in bad_inputs(folder, tmp_path).items():
        code, out, err = run("generate", *arguments)
        assert code == 2, (name, code, err)
        assert err.count("\n") == 1 and err.startswith("tempo-mlx: error: "), (name, err)
        assert all(word in err for word in words), (name, err)
        assert "Traceback" not in err + out, name


def test_defaults_prune_something_and_show_it(run, folder):
    common = ("generate", "hello", "--model", folder, "--threshold", 0.02, "-m", 12)
    code, out, _ = run(*common, "--prune", "posterior", "--explain")
    assert code == 0 and re.search(r"^pruned: .*~[^~]+~", out, re.MULTILINE)
    assert "threshold" in out and "kept" in out


@pytest.mark.parametrize("rule", ["attention", "posterior", "probability", "random"])
def test_every_rule_and_weighting_runs_and_verifies(run, folder, rule):
    common = ("generate", "hello", "--model", folder, "--threshold", 0.02, "-m", 12, "--verify")
    for weighting in ("none", "prior", "posterior"):
        options = ("--prune", rule, "--weighting", weighting, "--prune-schedule", "constant")
        code, _, err = run(*common, *options)
        assert code == 0
        assert float(re.search(r"largest difference (\S+) of", err)[1]) < 1e-3


def test_plot_draws_the_lattice_and_the_mask(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    lattice, mask = tmp_path / "lattice.svg", tmp_path / "mask.png"
    arguments = ("--model", folder, "--threshold", 0.02, "-m", 6, "--plot-attention")
    code, _, _ = run("generate", "hello", *arguments, "--plot", lattice, "--plot", mask)
    assert code == 0
    assert lattice.read_text().lstrip().startswith("<?xml")
    assert mask.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("passes", mostly_slow([4, 40], [40]))
def test_ctrl_c_prints_and_saves_what_is_there(folder, tmp_path, passes):
    target = tmp_path / "out.json"
    arguments = ["generate", "hello", "--model", folder, "--threshold", "0.01"]
    arguments += ["--max-tokens", "240", "-o", target]
    done = run_signalled(arguments, signal.SIGINT, passes)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr
    assert done.stdout.startswith("hello")
    data = json.loads(target.read_text())
    assert data["finish_reason"] == "interrupted" and 0 < len(data["steps"]) < passes


@pytest.mark.parametrize("given", [[], ["--extra-eos-token", "71"], ["--extra-eos-token", "h"]])
def test_a_token_or_its_id_is_an_end_of_text(run, folder, tmp_path, given):
    target = tmp_path / "out.json"
    options = ["--threshold", 0.0001, "--max-parallel", 256, "-m", 1, "-q", "-o", target]
    code, _, _ = run("generate", "a", "--model", folder, *options, *given)
    (step,) = json.loads(target.read_text())["steps"]
    ends, tokens = ([each["id"] for each in step[name]] for name in ("endings", "tokens"))
    assert code == 0 and (71 in ends, 71 in tokens) == (bool(given), not given)


def test_help_names_defaults_and_ranges(run):
    code, out, _ = run("generate", "--help")
    flat = " ".join(out.split())
    assert code == 0 and "(0, 1]" in flat and "--visibility" in flat and "[default: 0.1]" in flat
