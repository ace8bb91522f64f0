"""What a command line may be given: a line and exit code 2, or a record for a row of a file."""

import io
import json
import re
import sys
from pathlib import Path

from tempo_mlx import cli
from tempo_mlx.cli.options import flag_of
from tempo_mlx.io import inputs
from tests.tiny_folder import save_tiny_model

import pytest

ONE_PROMPT = {"generate": ["-m", 2, "-q"], "search": ["-m", 2, "-s", 2, "-q"]}

STRICT = """
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- if m['role'] == 'user' -%}{{ m['content'] }};{%- endif -%}
{%- endfor -%}answer:"""


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A model whose template refuses system messages and passes over roles that it lacks."""
    folder = save_tiny_model(tmp_path_factory.mktemp("strict"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": STRICT}))
    return str(folder)


def lines(text):
    """The records of a file in the order of their rows."""
    return sorted(map(json.loads, text.splitlines()), key=lambda record: record["row"])


def refused(result, *words):
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("tempo-mlx: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def stream(data):
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.mark.parametrize("command", ONE_PROMPT)
def test_a_prompt_is_what_an_editor_shows(run, folder, tmp_path, command):
    common = ["--model", folder, *ONE_PROMPT[command]]
    expected = run(command, "two\nlines", *common)
    assert expected[0] == 0
    path = tmp_path / "prompt.txt"
    for data in (b"two\nlines", b"two\nlines\n", b"\xef\xbb\xbftwo\nlines\n"):
        path.write_bytes(data)
        assert run(command, "--prompt-file", path, *common) == expected
        assert run(command, "-", *common, stdin=stream(data)) == expected
    path.write_bytes(b"two\nlines\n\n")
    kept = run(command, "--prompt-file", path, *common)
    assert kept == run(command, "two\nlines\n", *common)


@pytest.mark.parametrize("command", ONE_PROMPT)
def test_one_prompt_and_no_other(run, folder, tmp_path, monkeypatch, command):
    monkeypatch.setattr(inputs, "PROMPT_BYTES", 2**20)
    path = tmp_path / "prompt.txt"
    path.write_text("hi")
    common = ["--model", folder, *ONE_PROMPT[command]]
    given = {"argument": ["a"], "file": ["--prompt-file", path], "input": ["-"]}
    if command == "generate":
        given["option"] = ["--prompt", "b"]
    for name in given:
        for other in given:
            if {name, other} != {"argument", "input"} and name < other:
                refused(run(command, *given[name], *given[other], *common), "give one prompt")
    refused(run(command, *common), "give one prompt")
    refused(run(command, "--prompt-file", "/dev/zero", *common), "/dev/zero has more than 1 MiB")
    refused(run(command, "--prompt-file", tmp_path, *common), "cannot be read: Is a directory")
    path.write_bytes(b"caf\xe9")
    refused(run(command, "--prompt-file", path, *common), "prompt.txt is not UTF-8 text")
    refused(run(command, "-", *common, stdin=stream(b"\x80\xff")), "standard input is not UTF-8")
    refused(run(command, "-", *common, stdin=stream(b"y\n" * 2**20)), "more than 1 MiB")
    refused(run(command, "-", *common, stdin=stream(b"\n")), "prompt is empty")
    monkeypatch.setattr(sys, "stdin", None)
    refused(run(command, "-", *common), "standard input is closed")


@pytest.mark.parametrize("command", ONE_PROMPT)
def test_an_argument_that_is_not_utf8_is_refused(run, folder, command):
    common = ["--model", folder, *ONE_PROMPT[command]]
    refused(run(command, "caf\udce9", *common), "the prompt is not Unicode text", "character 4")
    if command == "generate":
        refused(run(command, "--prompt", "\udce9", *common), "the prompt is not Unicode text")
        refused(run(command, "a", "--stop", "\udce9", *common), "stop[0] is not Unicode text")
        system = ["--chat", "--system-prompt", "\udce9"]
        refused(run(command, "a", *system, *common), "--system-prompt is not Unicode text")


BIG = "1" + "0" * 30
COUNTS = {
    "generate": ["max-tokens", "max-parallel", "prefill-step-size", "paths", "seed"],
    "search": [
        "max-tokens",
        "max-parallel",
        "simulations",
        "leaves-per-batch",
        "max-forward-tokens",
        "seed",
    ],
}


@pytest.mark.parametrize("command", COUNTS)
def test_counts_have_bounds(run, folder, command):
    for option in COUNTS[command]:
        result = run(command, "a", "--model", folder, f"--{option}", BIG)
        refused(result, option.replace("-", "_") if option != "paths" else "--paths", BIG)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a", "--visibility", "tree", "--beam-width", BIG], ["beam_width", BIG]),
        (["generate", "a", "--prune", "posterior", "--prune-lookback", BIG], ["lookback", BIG]),
        (["generate", "a", "--temp", "1e-300"], ["temp must be above 0", "[1e-06, 1e+06]"]),
        (["generate", "a", "--temp", "1e300"], ["temp must be above 0", "[1e-06, 1e+06]"]),
        (["generate", "a", "--temp", "nan"], ["temp must be above 0", "nan"]),
        (
            ["search", "a", "--evaluation", "rollout", "--rollout-temp", "1e-300"],
            ["rollout_temp", "[1e-06, 1e+06]"],
        ),
        (["search", "a", "--evaluation", "rollout", "--rollout-temp", "inf"], ["rollout_temp"]),
        (["search", "a", "--evaluation", "rollout", "--depth", BIG], ["depth", BIG]),
        (["search", "a", "--exploration", "1e300"], ["exploration", "1e+09"]),
        (["search", "a", "--max-seconds", "inf"], ["max_seconds", "inf"]),
        (["search", "a", "--max-kv-bytes", "1" * 400], ["--max-kv-bytes"]),
        (["search", "a", "--max-kv-bytes", "9e30"], ["--max-kv-bytes"]),
        (["schedule", "relu(0.5)", "-n", str(10**9)], ["--steps", "at most 100000"]),
        (["schedule", "relu(0.5)", "-n", "0"], ["--steps", "at least 1"]),
    ],
)
def test_values_out_of_bounds_are_refused(run, folder, arguments, words):
    model = ["--model", folder] if arguments[0] != "schedule" else []
    refused(run(*arguments, *model), *words)


def user(content, **more):
    return {"role": "user", "content": content, **more}


def test_chat_rows_fail_alone_and_so_do_they_again(run, strict, tmp_path):
    rows = [
        {"prompt": [user("hi")], "id": "good"},
        {"prompt": [user(None)]},
        {"prompt": [{"role": "user"}]},
        {"prompt": [user(5)]},
        {"prompt": [user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])]},
        {"prompt": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
        {"prompt": [{"role": "system", "content": "Be kind."}, user("hi")]},
        {"prompt": [{"role": "critic", "content": "Hm."}, user("hi")]},
        {"prompt": [{}]},
        {"prompt": [{"role": 1, "content": "hi"}]},
        {"prompt": [9999]},
        {"prompt": "x" * 300},
        {"prompt": "hi there"},
    ]
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--prompts-file", path, "--model", strict, "-m", 2, "-o", output]
    code, out, err = run(*command)
    assert (
        (code, out) == (1, "")
        and "10 of " in err
        and "prompts failed" in err
        and "Traceback" not in err
    )
    records = sorted(lines(output.read_text()), key=lambda record: record["row"])
    assert [record["row"] for record in records] == list(range(len(rows)))
    reasons = {
        1: "content must be text",
        2: "has no content",
        3: "content must be text",
        5: "'image_url'",
        6: "System role not supported",
        7: "does not support the role 'critic'",
        8: "prompt must be text",
        9: "prompt must be text",
        10: "token id 9999, but the model's vocabulary is [0, 257)",
        11: "300 tokens",
    }
    for number, record in enumerate(records):
        if number in reasons:
            assert f"{path}, line {number + 1}: " in record["error"]
            assert reasons[number] in record["error"]
        else:
            assert "text" in record and "error" not in record
    assert records[0]["prompt"] == records[4]["prompt"] == "hi;answer:"
    # Again, only what failed is tried, and counts again.
    code, _, err = run(*command)
    assert (
        code == 1
        and "3 of 13 prompts are done already" in err
        and "10 of " in err
        and "prompts failed" in err
    )
    again = lines(output.read_text())
    assert sorted(again, key=lambda record: record["row"]) == records


def test_a_system_prompt_that_the_template_refuses_fails_each_row(run, strict, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    chat = ["--chat", "--system-prompt", "Be kind.", "--model", strict, "-m", 2]
    code, out, err = run("generate", "--prompts-file", path, *chat)
    assert code == 1 and "2 of " in err and "prompts failed" in err
    assert all("System role not supported" in record["error"] for record in lines(out))
    refused(run("generate", "one", *chat), "System role not supported")


def test_a_file_of_rows_that_never_ends_is_refused(run, folder, monkeypatch):
    monkeypatch.setattr(inputs, "ROWS_BYTES", 2**20)
    endless = stream(b"a\tb\n" * 2**19)
    refused(run("score", "-", "--format", "tsv", "--model", folder, stdin=endless), "1 MiB")
    refused(run("score", "/dev/zero", "--format", "tsv", "--model", folder), "1 MiB")
    monkeypatch.setattr(sys, "stdin", None)
    refused(run("score", "-", "--model", folder), "standard input is closed")


def test_no_row_is_valid_json_that_is_not(run, folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    bad = ['{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "temp": NaN}', '{"prompt": 1e999}']
    path.write_text("\n".join([*bad, '{"prompt": "a", "max_tokens": 1}']))
    code, out, err = run("generate", "--prompts-file", path, "--model", folder)
    records = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert code == 1 and "3 of " in err and "prompts failed" in err
    for record, word in zip(records, ("twice", "NaN", "too large", None), strict=True):
        assert (word in record["error"]) if word else "error" not in record


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_one_good_row_has_a_record_for_each(run, folder, tmp_path, name):
    path = Path(tmp_path / name)
    path.write_bytes(b"\xff\n\xfe\n")
    code, out, err = run("generate", "--prompts-file", path, "--model", folder)
    assert code == 1 and "2 of " in err and "prompts failed" in err
    assert ["not UTF-8" in record["error"] for record in lines(out)] == [True, True]


def integer_options():
    """Every option of every command that takes an integer, from the commands themselves."""

    def options(command, path):
        for name, inner in getattr(command, "commands", {}).items():
            yield from options(inner, [*path, name])
        for parameter in command.params:
            if parameter.type_descriptor.annotation is int and parameter.opts[0].startswith("-"):
                yield " ".join([*path, flag_of(parameter)])

    return sorted(each for name in cli.COMMANDS for each in options(cli.load_command(name), [name]))


#: What a command needs beside the option, up to where the option's value is looked at.
GIVEN = {
    "evaluate": ["--tasks", "arc_easy"],
    "generate": ["hi", "--prune", "posterior", "--sampling", "gumbel"],
    "generate --beam-width": ["hi", "--visibility", "tree"],
    "generate --batch-size": ["--prompts-file", "{rows}"],
    "search": ["hi", "--evaluation", "rollout", "--rollout-temp", "1"],
    "score": ["{rows}"],
    "rescore run": ["{rows}"],
    "rescore tune": ["{rows}", "--references", "{rows}"],
    "schedule": ["relu(0)"],
    "experiment run": ["parallel-attention"],
    "experiment analyze": ["."],
    "bench score": ["--max-kv-bytes", "1MB"],
    "bench pruning": ["--steps", "8"],
    "bench search --rounds": ["-p", "8"],
    "bench tree --rounds": ["-p", "8"],
}


def test_there_are_integer_options():
    found = integer_options()
    assert {"generate --max-tokens", "bench tree --leaves", "schedule --steps"} < set(found)
    assert len(found) > 40


def refuses(run, folder, tmp_path, option, value):
    """Whether an option's value is refused in a line that names it."""
    command, flag = option.rsplit(" ", 1)
    row = {"prompt": "a"} if command == "generate" else {"context": "a", "candidates": ["b"]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    arguments = [each.format(rows=path) for each in GIVEN.get(option, GIVEN.get(command, []))]
    if command not in ("schedule", "experiment analyze", "bench host"):
        arguments += ["--model", folder]
    code, out, err = run(*command.split(), *arguments, flag, value)
    named = re.sub("[-_ ]", "", flag) in re.sub("[-_ ]", "", err)
    return (code, out, err.count("\n")) == (2, "", 1) and named


@pytest.mark.parametrize("option", integer_options())
def test_every_integer_has_bounds(run, folder, tmp_path, option):
    for value in (10**30, -(10**30)):
        assert refuses(run, folder, tmp_path, option, value)


@pytest.mark.parametrize("option", [each for each in integer_options() if "bench" in each])
def test_what_takes_that_long_is_not_measured(run, folder, tmp_path, option):
    assert refuses(run, folder, tmp_path, option, 10**8)
