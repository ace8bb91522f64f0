"""``tempo-mlx search`` as its users meet it."""

import json

import pytest

COMMON = ["--threshold", 0.02, "-m", 5, "-s", 12]


def test_prints_the_text_and_what_it_took(run, folder, tmp_path):
    output, dot = tmp_path / "out.json", tmp_path / "tree.dot"
    code, out, err = run(
        "search", "hello", "--model", folder, *COMMON, "--explain", "-o", output, "--dot", dot
    )
    data = json.loads(output.read_text())
    assert code == 0 and out.startswith("hello") and "visits" in out
    assert "simulations" in err and "ended by length" in err
    assert len(data["choices"]) == 5 and data["stats"]["simulations"] == 60
    for choice in data["choices"]:
        assert sum(child["visits"] for child in choice["children"]) >= 12
        best = max(choice["children"], key=lambda child: child["visits"])
        assert best["visits"] == choice["children"][0]["visits"]
    assert dot.read_text().startswith("digraph")
    code, out, err = run("search", "hello", "--model", folder, *COMMON, "-q")
    assert (code, err) == (0, "") and out.rstrip("\n") == data["text"].rstrip("\n")


def test_draws_its_choices(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "search.svg"
    code, _, err = run("search", "hello", "--model", folder, *COMMON, "--plot", picture)
    assert code == 0 and "drawn" in err
    text = picture.read_text()
    assert text.startswith("<?xml") and "hello" in text and "simulations" in text


def test_a_function_of_the_users_judges_texts(run, folder, tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def even(ids, text):\n    return sum(i % 2 == 0 for i in ids) / len(ids)\n")
    output = tmp_path / "out.json"
    command = ["search", "hello", "--model", folder, *COMMON, "-s", 60, "-c", 0.3, "-o", output]
    code, _, _ = run(*command, "--value", f"{file}:even")
    ids = json.loads(output.read_text())["tokens"]
    run(*command)
    others = json.loads(output.read_text())["tokens"]
    assert code == 0 and ids != others
    assert sum(id % 2 == 0 for id in ids) > sum(id % 2 == 0 for id in others)


def test_a_function_that_fails_names_the_path_and_saves_the_tree(run, folder, tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def wrong(ids, text):\n    return 2.0 if len(ids) > 1 else 0.5\n")
    output = tmp_path / "out.json"
    code, _, err = run(
        "search", "hello", "--model", folder, *COMMON, "--value", f"{file}:wrong", "-o", output
    )
    assert code == 2 and err.count("\n") == 1
    assert "path [" in err and "[0, 1]" in err and "2.0" in err
    saved = json.loads(output.read_text())
    assert saved["tree"]["nodes"][0]["visits"] > 0 and len(saved["paths"][0]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-s", "0"], ["simulations", "at least 1"]),
        (["--threshold", "2"], ["threshold", "(0, 1]"]),
        (["--selection", "luck"], ["selection", "puct"]),
        (["--value", "gone.py:f"], ["--value", "gone.py"]),
        (["--value", "{folder}/config.json:f"], ["--value"]),
        (["--max-kv-bytes", "some"], ["--max-kv-bytes"]),
        (["--max-kv-bytes", "40kB", "-s", "200"], ["max_kv_bytes", "leaves"]),
        (["--plot", "tree.txt"], ["--plot", ".svg"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, arguments, words):
    given = [argument.format(folder=folder) for argument in arguments]
    code, out, err = run("search", "hello", "--model", folder, *given)
    assert code == 2 and out == "" and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    for word in words:
        assert word in err
