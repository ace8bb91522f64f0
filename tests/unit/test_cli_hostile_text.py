"""No text commands the terminal: not a prompt, a candidate word, the model's output or a name."""

import io
import json
import re

from tempo_mlx.io.console import Console

import pytest
from rich.table import Table
from rich.text import Text

HOSTILE = "\x1b]52;c;Zm9v\x07 \x1b]8;;http://x\x1b\\y \x1b[2J \x9b2J \u202etxt\u2066"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def assert_safe(*streams):
    for text in streams:
        assert not UNSAFE.search(text), UNSAFE.findall(text)


@pytest.mark.parametrize(
    "options",
    [
        ("--threshold", 1),
        ("--threshold", 0.004, "--paths", 3),
        ("--threshold", 0.004, "--visibility", "tree"),
        ("--threshold", 0.004, "--prune", "probability", "--prune-threshold", 0.9, "--explain"),
    ],
)
def test_generate(run, folder, options):
    code, out, err = run("generate", HOSTILE, "--model", folder, "-m", 24, *options)
    assert code == 0 and "␛]52;c;Zm9v" in out
    assert_safe(out, err)


def test_newlines_inside_a_set_do_not_break_its_line(run, folder):
    # A byte of a random model is a newline or another control character sooner or later.
    code, out, _ = run("generate", "a", "--model", folder, "-m", 24, "--threshold", 0.001)
    sets = re.findall(r"\[[^\]]*/[^\]]*\]", out.split("best path")[0])
    assert code == 0 and sets and all("\n" not in each for each in sets)
    assert any(symbol in "".join(sets) for symbol in "⏎⇥␍␀␁␂␃␄␅␆␇␈␋␌␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡")


def test_verbose_prints_of_the_library_are_safe(folder, capsys):
    from tempo_mlx import generate, load

    model, tokenizer = load(folder)
    generate(model, tokenizer, "a", verbose=True, max_tokens=24, threshold=0.004)
    assert_safe(capsys.readouterr().out)


def test_search(run, folder, tmp_path):
    dot = tmp_path / "tree.dot"
    code, out, err = run(
        "search", HOSTILE, "--model", folder, "-m", 6, "-s", 8, "--threshold", 0.001, "--explain",
        "--dot", dot,
    )  # fmt: skip
    assert code == 0 and "␛[2J" in out
    assert_safe(out, err, dot.read_text())


@pytest.mark.parametrize("options", [(), ("--details",)])
def test_score(run, folder, tmp_path, options):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"context": HOSTILE, "candidates": [HOSTILE, "b\nc"]}) + "\n")
    code, out, err = run("score", rows, "--model", folder, *options)
    assert code == 0 and json.loads(out)["context"] == HOSTILE
    assert_safe(out, err)


def test_prompts_of_a_file(run, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": HOSTILE, "id": HOSTILE}) + "\n")
    code, out, err = run("generate", "--prompts-file", rows, "--model", folder, "-m", 6)
    assert code == 0 and json.loads(out)["prompt"] == HOSTILE
    assert_safe(out, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a", "--model", HOSTILE),
        ("generate", "a", "--visibility", HOSTILE),
        ("generate", "a", "--prompt-file", f"/{HOSTILE}"),
        ("generate", "a", f"--{HOSTILE}"),
        ("search", "a", "--value", HOSTILE),
        ("score", HOSTILE),
        ("schedule", HOSTILE),
        ("experiment", "run", HOSTILE),
        ("experiment", "status", HOSTILE),
        ("models", "fetch", HOSTILE),
        (HOSTILE,),
    ],
)
def test_error_messages(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and len(err.splitlines()) == 1
    assert_safe(out, err)


def test_file_names_that_look_like_markup_or_commands(run, folder, tmp_path):
    for name in ("[red]x.json", "[bold]", ":smile:.json", "\x1b[2J.json"):
        path = tmp_path / name
        code, out, err = run("generate", "a", "--model", folder, "-m", 2, "-o", path)
        assert code == 0 and json.loads(path.read_text())["schema"] == 2
        assert name.replace("\x1b", "␛") in err.replace("\n", "")
        assert_safe(out, err)


def test_on_a_terminal_only_colours_are_sent():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, legacy_windows=False)
    table = Table("a", title=HOSTILE)
    table.add_row(Text(HOSTILE, "bold green"))
    table.add_row(HOSTILE)
    console.print(table)
    console.print(Text.assemble((HOSTILE, "dim"), HOSTILE), HOSTILE, style="red")
    sent = console.file.getvalue()
    assert "\x1b[" in sent
    assert_safe(re.sub(r"\x1b\[[0-9;]*m", "", sent))
