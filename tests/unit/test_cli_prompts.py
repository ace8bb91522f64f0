"""``tempo-mlx generate --prompts-file``: a line for each prompt, resumable."""

import json
import shutil
import signal

from tempo_mlx.arguments import parse_bytes
from tests.commands import run_signalled
from tests.comparison import assert_close
from tests.sweeps import mostly_slow

import mlx.core as mx
import pytest

ROWS = [
    {"prompt": "hello there", "threshold": 0.05, "id": "a"},
    {"prompt": "a b c", "max_tokens": 3, "visibility": "visible"},
    {"prompt": "", "id": 7},
    {"prompt": "again", "pruning": {"rule": "random", "decision": "quota"}, "seed": 3},
    {"prompt": "no such", "threshold": 7},
    {"prompt": [1, 2, 3]},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def by_row(text):
    """Records of the rows in their order, each of which has one line."""
    records = sorted(map(json.loads, text.splitlines()), key=lambda record: record["row"])
    assert [record["row"] for record in records] == list(range(len(records)))
    return records


def lines(path):
    return by_row(path.read_text())


def without_times(records):
    """Records without what a run took."""
    return [{k: v for k, v in each.items() if k not in ("stats", "key")} for each in records]


def assert_same(records, expected):
    """Equal but for times and the last digits of numbers, which depend on who shares a pass."""
    assert_close(without_times(records), without_times(expected))


def test_every_row_has_a_line_and_is_what_it_gives_alone(run, folder, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    common = ["--model", folder, "--threshold", 0.02, "-m", 5, "--max-parallel", 4]
    code, out, err = run(
        "generate", "--prompts-file", prompts, *common, "-o", output, "--batch-size", 2
    )
    records = lines(output)
    assert (
        (code, out) == (1, "")
        and "2 of " in err
        and "prompts failed" in err
        and "Traceback" not in err
    )
    assert [record["row"] for record in records] == list(range(6))
    assert records[0]["id"] == "a" and records[2]["id"] == 7
    assert "empty" in records[2]["error"]
    assert "threshold" in records[4]["error"]
    assert [records[i]["error"].count(f"line {i + 1}: ") for i in (2, 4)] == [1, 1]
    assert records[1]["settings"]["visibility"] == "visible" and len(records[1]["steps"]) == 3
    alone = tmp_path / "alone.json"
    run("generate", "hello there", *common[:2], "--threshold", 0.05, *common[4:], "-o", alone)
    expected = json.loads(alone.read_text())
    for key in ("prompt_tokens", "settings", "text", "finish_reason"):
        assert records[0][key] == expected[key]
    for step, other in zip(records[0]["steps"], expected["steps"], strict=True):
        assert [t["id"] for t in step["tokens"]] == [t["id"] for t in other["tokens"]]


def test_what_is_there_is_not_made_again(run, folder, prompts, tmp_path):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 4]
    run(*command, "-o", whole)
    first = [line for line in whole.read_text().splitlines() if json.loads(line)["row"] < 4]
    output.write_text("".join(f"{line}\n" for line in first))
    code, _, err = run(*command, "-o", output)
    # The third row failed, and is tried again.
    assert code == 1 and "3 of 6 prompts are done already" in err
    assert {line for line in first if "error" not in json.loads(line)} < set(
        output.read_text().splitlines()
    )
    assert_same(lines(output), lines(whole))
    code, _, err = run(*command[:-1], 3, "-o", output)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "out.jsonl" in err


def test_a_row_that_failed_is_tried_again_and_decides_the_exit_code(run, folder, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "x" * n} for n in (3, 100, 5)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 4, "-o", output]
    for _ in range(2):
        code, _, err = run(*command, "--max-kv-bytes", "20kB")
        assert code == 1 and "1 of " in err and "prompts failed" in err
        assert ["error" in record for record in lines(output)] == [False, True, False]
    assert "2 of 3 prompts are done already" in err
    good = lines(output)[::2]
    code, _, err = run(*command)
    assert code == 0 and "prompts failed" not in err
    assert lines(output)[::2] == good
    assert [len(record["prompt_tokens"]) for record in lines(output)] == [3, 100, 5]


def test_a_row_that_is_corrected_is_made_and_the_others_stay(run, folder, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 4, "-o", output]
    prompts.write_text('{"prompt": "xxx"}\n{"prompt": ""}\n{"prompt": "xxxxx"}\n')
    assert run(*command)[0] == 1
    prompts.write_text('{"prompt": "xxx"}\n{"prompt": "y"}\n{"prompt": "xxxxx"}\n')
    code, _, err = run(*command)
    assert code == 0 and "2 of 3 prompts are done already" in err
    assert [record["prompt"] for record in lines(output)] == ["xxx", "y", "xxxxx"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.1.self_attn.q_proj.lora_"
    weights = {f"{name}a": mx.ones((32, 2)), f"{name}b": mx.ones((2, 32))}
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    return path


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ([], ["--extra-eos-token", "e"], False),
        ([], ["--paths", 3], False),
        ([], ["--paths", 1], True),
        ([], ["--verify"], False),
        ([], ["--chat"], False),
        (["--chat"], ["--chat", "--system-prompt", "be kind"], False),
        ([], ["--adapter-path", "{adapters}"], False),
        ([], ["--max-tokens", 3], False),
        ([], ["--batch-size", 2], True),
        ([], ["--max-kv-bytes", "1GB"], True),
        ([], ["--model", "{moved}"], True),
        ([], ["--model", "{other}"], False),
        ([], ["--prompt-cache", "{cache}"], True),
        ([], ["--prompt-cache", "{elsewhere}"], False),
    ],
)
def test_whatever_changes_a_result_makes_other_rows(
    run, folder, tmp_path, adapters, before, after, same
):
    """Where nothing changes, rows are done; where something does, the file is left alone."""
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    names = {
        "adapters": adapters,
        "moved": shutil.copytree(folder, tmp_path / "moved"),
        "other": other,
        "cache": tmp_path / "he.safetensors",
        "elsewhere": tmp_path / "x.safetensors",
    }
    for prompt, file in (("he", names["cache"]), ("x", names["elsewhere"])):
        run("generate", prompt, "--model", folder, "-m", 1, "--prompt-cache", file)
    before, after = ([str(a).format(**names) for a in each] for each in (before, after))
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("hello\nhe\n")
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-o", output, "-m", 4]
    assert run(*command, *before)[0] == 0
    stored = output.read_bytes()
    code, _, err = run(*command, *after)
    assert output.read_bytes() == stored
    if same:
        assert code == 0 and "2 of 2 prompts are done already" in err
    else:
        assert code == 2 and "line 1 is of another input, other settings or another model" in err


def test_standard_output_has_the_same_lines(run, folder, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    command = ["generate", "--prompts-file", prompts, "--model", folder, "-m", 4]
    run(*command, "-o", output)
    _, out, _ = run(*command)
    assert_same(by_row(out), lines(output))


@pytest.mark.parametrize("sent", mostly_slow([signal.SIGKILL, signal.SIGINT], [signal.SIGINT]))
def test_a_killed_run_goes_on_where_it_was(run, folder, tmp_path, sent):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"text number {i}\n" for i in range(12)))
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = ["generate", "--prompts-file", str(prompts), "--model", folder, "-m", "12"]
    command += ["--threshold", "0.03", "--batch-size", "3", "-o"]
    # Two of the four batches are done, the third is under way.
    done = run_signalled([*command, output], sent, passes=33)
    assert done.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), done.stderr
    assert "Traceback" not in done.stderr
    stored = output.read_bytes().count(b"\n")
    # A line that was being written when the signal came may be cut off again.
    assert 2 <= stored < 12
    if sent == signal.SIGINT:
        told = f"interrupted: {stored} of 12 prompts are done and saved; rerun the same command"
        assert told in done.stderr
    code, _, err = run(*command, output)
    assert code == 0 and "of 12 prompts are done already" in err
    run(*command, whole)
    assert_same(lines(output), lines(whole))


def test_a_prompt_cache_is_made_once_and_used(run, folder, prompts, tmp_path):
    cache = tmp_path / "hello.safetensors"
    code, _, err = run("generate", "hello", "--model", folder, "-m", 3, "--prompt-cache", cache)
    assert code == 0 and "hello.safetensors" in err
    made = cache.read_bytes()
    command = ["--model", folder, "-m", 4, "--threshold", 0.02, "-q"]
    with_cache = run("generate", "hello there", *command, "--prompt-cache", cache)
    assert with_cache == run("generate", "hello there", *command)
    assert cache.read_bytes() == made
    code, out, _ = run(
        "generate", "--prompts-file", prompts, *command[:-1], "--prompt-cache", cache
    )
    assert code == 1 and len(out.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hello", "--prompts-file", "{prompts}"], ["one prompt or --prompts-file"]),
        (["--prompts-file", "{prompts}", "--explain"], ["--explain", "--prompts-file"]),
        (["--prompts-file", "{folder}/none.jsonl"], ["none.jsonl", "cannot be read"]),
        (["--prompts-file", "{folder}/config.json"], [".txt", ".jsonl"]),
        (["--prompts-file", "{prompts}", "--max-kv-bytes", "lots"], ["--max-kv-bytes", "lots"]),
        (["--prompts-file", "{prompts}", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--prompts-file", "{prompts}", "--prompt-cache", "gone"], ["gone", "does not exist"]),
        (["hi", "--prompt-cache", "{folder}/model.safetensors"], ["no prompt cache"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, prompts, arguments, words):
    given = [a.format(prompts=prompts, folder=folder) for a in arguments]
    code, out, err = run("generate", *given, "--model", folder)
    assert code == 2 and out == "" and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5", 5),
        ("5b", 5),
        ("800M", 800 * 10**6),
        ("2GiB", 2 << 30),
        (" 1.5Ti ", 3 << 39),
        ("9007199254740993", 9007199254740993),
        *((text, None) for text in ("1.5 kb", "", "b", "0", "0.5", "-1", "nan", "inf", "1e3")),
        *((text, None) for text in ("1" * 400, "1" * 5000, "9e30", "10000000TB", "1..5", "٣")),
    ],
)
def test_sizes(text, size):
    if size is None:
        with pytest.raises(ValueError, match="max-kv-bytes"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


def test_a_bad_row_says_its_file_and_line_once(run, folder, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    bad = ["nonsense", '{"prompt": "a", "threshold": 2}', '{"prompt": [{"role": "user"}]}']
    rows.write_text("\n".join(bad) + "\n")
    code, _, _ = run("generate", "--prompts-file", rows, "--model", folder, "-m", 2, "-o", output)
    errors = [record["error"] for record in lines(output)]
    assert code == 1
    for number, error in enumerate(errors, 1):
        assert error.startswith(f"{rows}, line {number}: ") and error.count("line ") == 1
