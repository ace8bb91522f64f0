"""Output files of all commands: what is refused, what is replaced, what is written through."""

import itertools
import json
import os
import shlex
import stat
import subprocess
import sys
import threading

from tests.commands import ROOT
from tests.sweeps import mostly_slow

import pytest

ROW = {"context": "he is", "candidates": ["happy", "sad"]}
JUDGE = "def even(ids, text):\n    return 0.5\n"
PRECIOUS = "precious\n"

#: Arguments of commands that write, with the output last; {model} is a folder, {i} has inputs.
COMMANDS = {
    "generate": "generate hi --model {model} -q -m 3 -o",
    "generate to a picture": "generate hi --model {model} -q -m 3 --plot",
    "generate from a file of prompts": (
        "generate --prompts-file {i}/prompts.jsonl --model {model} -m 3 -o"
    ),
    "search": "search hi --model {model} -q -m 2 -s 4 -o",
    "search to a picture": "search hi --model {model} -q -m 2 -s 4 --plot",
    "search to a graph": "search hi --model {model} -q -m 2 -s 4 --dot",
    "score": "score {i}/rows.jsonl --model {model} -o",
    "score as text": "score {i}/rows.tsv --model {model} -o",
    "schedule": "schedule relu(0.5) --plot",
    "schema": "experiment schema -o",
    "bench": "bench decode --model {model} -m 4 -n 1 -p 4 --siblings 1 -o",
}

#: A bench runs for a second, and writes as the others do.
FEW = [name for name in COMMANDS if name != "bench"]

#: Names that outputs have; elsewhere they may have any.
ENDINGS = {"score": ".jsonl", "score as text": ".tsv"}

#: Input files by the command that reads them, {} in its arguments.
INPUTS = {
    "--prompt-file": ("prompt.txt", "generate --prompt-file {} --model {model}"),
    "--prompts-file": ("prompts.jsonl", "generate --prompts-file {} --model {model}"),
    "--prompt-cache": ("cache", "generate hi --prompt-cache {} --model {model}"),
    "--prompt-file of a search": ("prompt.txt", "search --prompt-file {} --model {model}"),
    "--value": ("judge.py", "search hi --value {}:even --model {model}"),
    "INPUT": ("rows.jsonl", "score {} --model {model}"),
    "INPUT as text": ("rows.tsv", "score {} --model {model}"),
}


@pytest.fixture
def inputs(tmp_path):
    """A folder of input files."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "prompt.txt").write_text("hello")
    (folder / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "a b c"}\n')
    (folder / "cache").write_text("anything")
    (folder / "judge.py").write_text(JUDGE)
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "rows.tsv").write_text("he is\thappy\nhe is\tsad\n")
    return folder


@pytest.fixture
def words(folder, inputs):
    """Makes a command of its text."""

    def call(text, *more, model=folder):
        return [*shlex.split(text.format(model=model, i=inputs)), *more]

    return call


def ending(name):
    return ".svg" if "picture" in name or name == "schedule" else ENDINGS.get(name, "")


def shell(command, folder):
    """Run a line of bash, in which tempo-mlx is this one."""
    tempo = f'tempo-mlx() {{ {shlex.quote(sys.executable)} -m tempo_mlx "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", tempo + command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_someone_else_is_kept_unless_it_may_be_overwritten(run, words, tmp_path, name):
    output = tmp_path / f"precious{ending(name)}"
    output.write_text(PRECIOUS)
    # The model, which is none, would be named if it was looked for first.
    command = words(COMMANDS[name], output, model="no-such-model")
    refused(run(*command), "exists and this command did not write it", "--overwrite", output.name)
    assert output.read_text() == PRECIOUS
    command = words(COMMANDS[name], output)
    assert run(*command, "--overwrite")[0] == 0
    first = output.read_bytes()
    assert PRECIOUS.encode() not in first
    # What the command itself wrote, it may write again.
    assert run(*command)[0] == 0
    assert len(output.read_bytes()) >= len(first) // 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", output.name]


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, FEW))
def test_an_empty_file_holds_nothing_to_lose(run, words, tmp_path, name):
    output = tmp_path / f"empty{ending(name)}"
    output.touch()
    assert run(*words(COMMANDS[name], output))[0] == 0 and output.stat().st_size > 0


@pytest.mark.slow
def test_what_another_command_wrote_is_someone_elses(run, words, tmp_path):
    written = {name: tmp_path / f"out-{i}" for i, name in enumerate(COMMANDS)}
    written = {name: path.with_suffix(ending(name)) for name, path in written.items()}
    for name, path in written.items():
        assert run(*words(COMMANDS[name], path))[0] == 0
    for name in COMMANDS:
        for other, path in written.items():
            # Rows of results have keys, by which a command knows its own when it has the model.
            if other != name and path.suffix == ending(name):
                before = path.read_bytes()
                code, _, err = run(*words(COMMANDS[name], path))
                assert code == 2 and err.count("--overwrite") == 1, (name, other)
                assert path.read_bytes() == before


@pytest.mark.parametrize("way", ["itself", "hard link", "symbolic link", "other spelling"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_no_output(run, inputs, folder, name, way):
    file, command = INPUTS[name]
    path = inputs / file
    before = path.read_bytes()
    output = inputs / f"link{path.suffix}"
    if way == "hard link":
        output.hardlink_to(path)
    elif way == "symbolic link":
        output.symlink_to(file)
    else:
        output = path if way == "itself" else inputs / ".." / inputs.name / file
    words = shlex.split(command.format(path, model=folder))
    for more in ([], ["--overwrite"]):
        refused(run(*words, "-o", output, *more), "is the same file as", name.split()[0])
    assert path.read_bytes() == before


READERS = ["generate - -o prompt.txt", "search - -o prompt.txt", "score - -o rows.jsonl"]


@pytest.mark.parametrize("command", mostly_slow(READERS, READERS[2:]))
def test_standard_input_is_an_input(inputs, folder, command):
    before = {path: path.read_bytes() for path in inputs.iterdir()}
    line = f"tempo-mlx {command} --model {folder} --overwrite < {command.split()[-1]}"
    found = shell(line, inputs)
    refused((found.returncode, found.stdout, found.stderr), "is the same file as")
    assert {path: path.read_bytes() for path in inputs.iterdir()} == before


@pytest.mark.parametrize(
    "outputs",
    [
        "generate hi --prompt-cache {o}/x -o {o}/x",
        "generate hi --prompt-cache {o}/x -o {o}/../out/x",
        "generate hi -o {o}/same.svg --plot {o}/same.svg",
        "generate hi --plot {o}/same.svg --plot {o}/same.svg",
        "search hi -o {o}/x --dot {o}/x",
        "search hi --dot {o}/x.svg --plot {o}/x.svg",
        "search hi -o - --dot -",
        "search hi -o /dev/stdout --dot -",
    ],
)
def test_two_outputs_are_two_files(run, folder, tmp_path, outputs):
    where = tmp_path / "out"
    where.mkdir()
    words = shlex.split(outputs.format(o=where))
    refused(run(*words, "--model", folder, "--overwrite"), "is the same file as")
    assert list(where.iterdir()) == []


@pytest.mark.parametrize("stream", mostly_slow(["> x", "2> x"], ["> x"]))
def test_a_standard_stream_is_no_output(folder, tmp_path, stream):
    found = shell(f"tempo-mlx generate hi -m 3 --model {folder} -o x {stream}", tmp_path)
    assert found.returncode == 2
    said = found.stderr + (tmp_path / "x").read_text()
    assert "is the same file as standard" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, FEW))
def test_links_stay_and_modes_stay(run, words, tmp_path, name):
    target, link = tmp_path / f"target{ending(name)}", tmp_path / f"link{ending(name)}"
    target.touch()
    target.chmod(0o640)
    link.symlink_to(target.name)
    assert run(*words(COMMANDS[name], link))[0] == 0
    assert link.is_symlink() and target.stat().st_size > 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    link.unlink()
    link.symlink_to(f"new{ending(name)}")
    assert run(*words(COMMANDS[name], link))[0] == 0
    assert link.is_symlink() and (tmp_path / f"new{ending(name)}").stat().st_size > 0


def test_a_link_to_results_goes_on_with_them(run, words, tmp_path):
    output, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    for name in ("score", "generate from a file of prompts"):
        run(*words(COMMANDS[name], output, "--overwrite"))
        before = output.read_bytes()
        link.unlink(missing_ok=True)
        link.symlink_to(output)
        code, _, err = run(*words(COMMANDS[name], link))
        assert code == 0 and "are done already" in err and output.read_bytes() == before


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, FEW))
def test_a_pipe_is_written_through(run, words, tmp_path, name):
    fifo, plain = tmp_path / f"fifo{ending(name)}", tmp_path / f"plain{ending(name)}"
    os.mkfifo(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    code, _, err = run(*words(COMMANDS[name], fifo))
    reader.join()
    assert code == 0, err
    assert run(*words(COMMANDS[name], plain))[0] == 0
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert received[0].split()[:1] == plain.read_bytes().split()[:1] and len(received[0]) > 20
    assert received[0].count(b"\n") == plain.read_bytes().count(b"\n") or "picture" in name


PRINTED = [name for name in COMMANDS if ending(name) != ".svg"]
WAYS = ["-", "-q -", "/dev/stdout", "/dev/fd/1"]


@pytest.mark.parametrize(
    ("name", "path"),
    mostly_slow(
        itertools.product(PRINTED, WAYS),
        [each for each in itertools.product(PRINTED, WAYS) if each[0] in FEW or each[1] == "-q -"],
    ),
)
def test_standard_output_has_the_output_and_nothing_else(run, words, tmp_path, name, path):
    plain = tmp_path / f"plain{ending(name)}"
    command = words(COMMANDS[name])
    if "-q" in command and not path.startswith("-q"):
        command.remove("-q")
    path = path.split()[-1]
    code, out, err = run(*command, path)
    assert code == 0 and "Traceback" not in err
    assert run(*command, plain)[0] == 0
    expected = plain.read_text()
    if out.startswith("{") and expected.count("\n") > 3:
        assert json.loads(out).keys() == json.loads(expected).keys()
    elif out.startswith("{"):
        found, wanted = ([json.loads(x) for x in text.splitlines()] for text in (out, expected))
        assert [each["row"] for each in found] == [each["row"] for each in wanted]
    else:
        assert out == expected
    assert not (ROOT / "-").exists()


def test_a_picture_needs_a_name(run, words):
    for name in (name for name in COMMANDS if ending(name) == ".svg"):
        refused(run(*words(COMMANDS[name], "-")), "--plot must end in .svg")


def test_a_prompt_cache_is_a_regular_file(run, folder):
    for path in ("-", "/dev/null"):
        arguments = ["generate", "hi", "--model", folder, "--prompt-cache", path]
        refused(run(*arguments), "--prompt-cache", "must be a regular file")


def test_explain_prints_where_no_output_takes_its_place(run, folder):
    for option in ("--output", "--dot"):
        arguments = ["search", "hi", "--model", folder, "--explain", option, "-"]
        refused(run(*arguments), "--explain has no effect with", option)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_stay_out_of_the_output(run, inputs, folder, number):
    output = inputs / "out.jsonl"
    row, prompt = json.dumps(ROW)[:-1], '{"prompt": "hello"'
    for command, option, line in (
        (["score", inputs / "rows.jsonl"], "note", row),
        (["generate", "-m", 3, "--prompts-file", inputs / "prompts.jsonl"], "temp", prompt),
        (["generate", "-m", 3, "--prompts-file", inputs / "prompts.jsonl"], "id", prompt),
    ):
        command[-1].write_text(f'{line}, "{option}": {number}}}\n{line}}}\n')
        for path in (output, "-"):
            code, out, _ = run(*command, "--model", folder, "-o", path, "--overwrite")
            text = out if path == "-" else output.read_text()
            found = [json.loads(x, parse_constant=pytest.fail) for x in text.splitlines()]
            first, second = sorted(found, key=lambda record: record["row"])
            assert code == 1 and "error" in first and "error" not in second


GENERATE = "generate hi -q -m 3"
#: Commands, the readers of what they write, and what it begins with.
SUBSTITUTED = [
    (GENERATE, "cat", '{\n "schema"'),
    (GENERATE, "head -c1", "{"),
    ("score in/rows.jsonl", "cat", '{"row": 0'),
    ("generate --prompts-file in/prompts.jsonl -m 3", "cat", '{"row": 0'),
]


@pytest.mark.parametrize(
    ("command", "reader", "beginning"), mostly_slow(SUBSTITUTED, SUBSTITUTED[1:3])
)
def test_process_substitutions_get_the_output(folder, tmp_path, inputs, command, reader, beginning):
    line = f"tempo-mlx {command} --model {folder} -o >({reader} > found) || exit\nwait\n"
    (tmp_path / "run.sh").write_text(line)
    found = shell("source ./run.sh", tmp_path)
    assert found.returncode == 0 and "rror" not in found.stderr, found.stderr
    text = (tmp_path / "found").read_text()
    assert text.startswith(beginning)
    if reader != "cat":
        assert text == beginning
    elif command == GENERATE:
        assert len(json.loads(text)["steps"]) == 3
    else:
        assert len(text.splitlines()) == (1 if "score" in command else 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_device_is_named_and_nothing_else_is_lost(run, words, tmp_path):
    common = ["--model", words("{model}")[0], "-m", 3]
    picture = tmp_path / "picture.svg"
    code, out, err = run("generate", "hi", *common, "-o", "/dev/full", "--plot", picture)
    assert code == 2 and "/dev/full: No space left on device" in err and "Traceback" not in err
    assert out.startswith("hi") and picture.stat().st_size > 0
    code, out, err = run("search", "hi", *common, "-s", 4, "-o", "/dev/full", "--plot", picture)
    assert code == 2 and "exists and this command" in err
    picture.unlink()
    code, out, err = run("search", "hi", *common, "-s", 4, "-o", "/dev/full", "--plot", picture)
    assert code == 2 and "/dev/full: No space left on device" in err and out.startswith("hi")
    assert picture.stat().st_size > 0
    for name in ("score", "score as text", "generate from a file of prompts", "bench"):
        code, _, err = run(*words(COMMANDS[name], "/dev/full"))
        assert code == 2 and err.endswith("/dev/full: No space left on device\n"), name
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


PRINTING = ["generate hi -q -m 3 --model {model}", "experiment schema", "--help"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("command", mostly_slow(PRINTING, PRINTING[:1]))
def test_a_full_standard_output_is_named(folder, tmp_path, command):
    found = shell(f"tempo-mlx {command.format(model=folder)} > /dev/full", tmp_path)
    assert found.returncode == 2
    assert found.stderr == "tempo-mlx: error: standard output: No space left on device\n"


PIPED = ["generate hi -q -m 3 --model {model} -o -", "experiment schema"]


@pytest.mark.parametrize("command", mostly_slow(PIPED, PIPED[1:]))
def test_a_reader_of_standard_output_may_leave(folder, tmp_path, command):
    line = f"tempo-mlx {command.format(model=folder)} | head -c1; echo ${{PIPESTATUS[0]}}"
    found = shell(line, tmp_path)
    assert (found.stdout, found.stderr) == ("{0\n", "")


def test_overwrite_needs_an_output(run, words):
    for name, text in COMMANDS.items():
        if name != "schema":
            command = words(text)[:-1]
            refused(run(*command, "--overwrite"), "--overwrite has no effect without")


def test_names_of_files_are_no_markup(run, words, tmp_path):
    output = tmp_path / "[red]out"
    code, _, err = run(*[w for w in words(COMMANDS["generate"], output) if w != "-q"])
    assert code == 0 and f"written: {output}" in err
