"""``tempo-mlx generate`` as its users meet it: output, files, bad input, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time

from tempo_mlx import cli
from tests.tiny_folder import save_tiny_model

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["tempo-mlx", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


def test_prints_sets_the_best_path_and_statistics(run, folder):
    code, out, err = run(
        "generate", "hello", "--model", folder, "--threshold", 0.02, "--max-tokens", 8
    )
    assert code == 0
    assert out.startswith("hello") and re.search(r"\[.+/.+\]", out) and "best path:" in out
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
    assert (code, err) == (0, "") and data["schema"] == 1
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
        "paths": ([*common, "--paths", "-1"], ["paths", "-1"]),
    }


def test_bad_input_is_one_line_and_exit_code_2(run, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, (arguments, words) in bad_inputs(folder, tmp_path).items():
        code, out, err = run("generate", *arguments)
        assert code == 2, (name, code, err)
        assert err.count("\n") == 1 and err.startswith("tempo-mlx: error: "), (name, err)
        assert all(word in err for word in words), (name, err)
        assert "Traceback" not in err + out, name


def test_ctrl_c_prints_and_saves_what_is_there(folder, tmp_path):
    target = tmp_path / "out.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "tempo_mlx", "generate", "hello", "--model", folder]
        + ["--threshold", "0.01", "--max-tokens", "240", "-o", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    seen = process.stdout.read(12)
    assert len(seen) == 12, process.stderr.read()
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    out, err = process.communicate(timeout=deadline - time.monotonic())
    assert process.returncode == 130, err
    assert "Traceback" not in err and "interrupted" in err
    data = json.loads(target.read_text())
    assert data["finish_reason"] == "interrupted" and 0 < len(data["steps"]) < 240


def test_help_names_defaults_and_ranges(run):
    code, out, _ = run("generate", "--help")
    flat = " ".join(out.split())
    assert code == 0 and "(0, 1]" in flat and "--visibility" in flat and "[default: 0.1]" in flat
