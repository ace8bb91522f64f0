"""``tempo-mlx score``: lines in, the same lines with scores and ranks out, resumable."""

import io
import json
import shutil

from tempo_mlx.cli import score as command_module
from tempo_mlx.scoring import truecase
from tests.brute_scorer import BruteScorer

import mlx_lm
import numpy as np
import pytest
from rich.console import Console

ROWS = [
    {"context": "he is also", "candidates": ["happy", "sad", ["sea", "see"]], "id": "a"},
    {"context": "", "candidates": ["so", "it", "so"], "note": {"kept": [1, None]}},
    {"context": "he is also", "candidates": []},
    {"context": "so it goes", "candidates": ["on", ",", "on and on"]},
]

TEXT = "he is\thappy\nhe is\tsad\n\n\tso\nhe is\there\n"

#: Fails where log-probabilities of fp32 logits differ by more than the product promises.
CLOSE = 1e-3


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    write(path, ROWS)
    return path


@pytest.fixture
def columns(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def stock(folder):
    model, tokenizer = mlx_lm.load(folder)
    # What an empty context is, for want of a token that begins a text.
    tokenizer.bos_token = tokenizer.eos_token
    return model, tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def brute(scorer, row, aggregate=max):
    return [
        aggregate([scorer.score(row["context"], each) for each in spellings])
        for spellings in ([c] if isinstance(c, str) else c for c in row["candidates"])
    ]


def check(records, given, scorer, aggregate=max):
    """Each record has all of its row, the scores of every text alone, and ranks to match."""
    for number, (record, row) in enumerate(zip(records, given, strict=True)):
        assert record["row"] == number
        assert {name: record[name] for name in row} == row
        expected = brute(scorer, row, aggregate)
        assert record["scores"] == pytest.approx(expected, abs=CLOSE)
        scores = record["scores"]
        assert record["ranks"] == [1 + sum(s > each for s in scores) for each in scores]
        best = row["candidates"][int(np.argmax(scores))] if scores else None
        assert record["best"] == best


def test_prints_every_row_with_its_scores(run, folder, rows, stock):
    code, out, err = run("score", rows, "--model", folder)
    records = lines(out)
    assert (code, err) == (0, "")
    check(records, ROWS, BruteScorer(*stock))
    assert records[1]["ranks"][0] == records[1]["ranks"][2] and records[1]["scores"][0] < 0
    assert records[2]["scores"] == [] and records[2]["best"] is None
    assert "details" not in records[0] and "key" not in records[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_options_reach_the_scorer(run, folder, rows, stock, monkeypatch, batch_size):
    monkeypatch.setattr(truecase, "english", lambda: str.title)
    options = ["--weight", 0.5, "--word-insertion-bonus", -1.5, "--truecase", "english"]
    options += ["--max-context-tokens", 4, "--trailing-space-correction"]
    sizes = ["--chunk-size", 8, "--max-kv-bytes", "1MB", "--batch-size", batch_size]
    scorer = BruteScorer(*stock, 0.5, -1.5, str.title, 4, True)
    code, out, _ = run("score", rows, "--model", folder, *options, *sizes)
    assert code == 0
    check(lines(out), ROWS, scorer)
    plain = BruteScorer(*stock)
    code, out, _ = run("score", rows, "--model", folder, "--aggregate", "logsumexp")
    assert code == 0
    check(lines(out), ROWS, plain, np.logaddexp.reduce)


def test_details_are_what_the_scores_are_made_of(run, folder, rows):
    _, out, _ = run("score", rows, "--model", folder, "--details")
    for record in lines(out):
        for candidate, score, detail in zip(
            record["candidates"], record["scores"], record["details"], strict=True
        ):
            assert detail["score"] == score
            assert sum(t["logprob"] for t in detail["tokens"]) == pytest.approx(score, abs=1e-4)
            text = "".join(token["text"] for token in detail["tokens"]).strip()
            if isinstance(candidate, list):
                assert [each["word"] for each in detail["variants"]] == candidate
                assert text == detail["word"] and text in candidate
            else:
                assert text == candidate


def test_stats_say_what_it_took(run, folder, rows):
    code, _, err = run("score", rows, "--model", folder, "--stats")
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("method tree, passes ") and "tokens reused" in err and "bytes" in err


def test_details_in_text_add_up(run, folder, columns):
    options = ["--details", "--weight", 0.5, "--word-insertion-bonus", 2]
    for correction, ends in ([], 0), (["--trailing-space-correction"], 1):
        _, out, _ = run("score", columns, "--model", folder, *options, *correction)
        assert out
        for line in out.splitlines():
            _, word, score, _, parts = line.split("\t")
            texts, nats = zip(*json.loads(parts), strict=True)
            assert texts.count("") == ends and "".join(texts).strip() == word
            assert 0.5 * sum(nats) + 2 == pytest.approx(float(score), abs=1e-5)


def test_text_in_two_columns_gives_text_in_four(run, folder, columns, stock):
    code, out, err = run("score", columns, "--model", folder)
    assert (code, err) == (0, "")
    found = [line.split("\t") for line in out.splitlines()]
    assert [each[:2] for each in found] == [
        ["he is", "happy"],
        ["he is", "sad"],
        ["he is", "here"],
        ["", "so"],
    ]
    scorer = BruteScorer(*stock)
    expected = [scorer.score(context, word) for context, word, _, _ in found]
    assert [float(each[2]) for each in found] == pytest.approx(expected, abs=CLOSE)
    # Ranks are among all lines of one context, wherever they stand.
    ranks = [1 + sum(other > score for other in expected[:3]) for score in expected[:3]]
    assert [int(each[3]) for each in found] == [*ranks, 1]
    _, detailed, _ = run("score", columns, "--model", folder, "--details")
    for line, plain in zip(detailed.splitlines(), out.splitlines(), strict=True):
        *same, tokens = line.split("\t")
        assert "\t".join(same) == plain
        total = sum(logprob for _, logprob in json.loads(tokens))
        assert total == pytest.approx(float(same[2]), abs=1e-4)


def test_reads_standard_input(run, folder, rows, columns):
    for path, options in ((rows, []), (columns, ["--format", "tsv"])):
        # As it comes from Windows, too.
        data = b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")
        stdin = io.TextIOWrapper(io.BytesIO(data))
        piped = run("score", "-", "--model", folder, *options, stdin=stdin)
        assert piped == run("score", path, "--model", folder) and piped[0] == 0


def test_a_file_has_the_same_lines_and_goes_on_where_it_was(run, folder, rows, tmp_path):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = ["score", rows, "--model", folder, "-o"]
    _, printed, _ = run(*command[:-1])
    code, out, err = run(*command, whole)
    assert (code, out) == (0, "") and "written" in err
    records = lines(whole.read_text())
    assert [{k: v for k, v in r.items() if k != "key"} for r in records] == lines(printed)
    # A line that a kill cut short is made again.
    raw = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(raw[0] + raw[1] + raw[2][:20])
    code, _, err = run(*command, output)
    assert code == 0 and "2 of 4 rows are done already" in err
    after = lines(output.read_text())
    assert [r.pop("scores") for r in after] == [
        pytest.approx(r.pop("scores"), abs=CLOSE) for r in records
    ]
    assert after == records
    assert output.read_bytes().startswith(raw[0] + raw[1])
    made = output.read_bytes()
    for other in (["--weight", 2], ["--details"], ["--aggregate", "logsumexp"]):
        code, _, err = run(*command, output, *other)
        assert code == 2 and err.count("\n") == 1 and "other settings" in err
    changed = [dict(ROWS[0], id="b"), *ROWS[1:]]
    write(rows, changed)
    code, _, err = run(*command, output)
    assert code == 2 and "another input" in err and output.read_bytes() == made


LONG = {"context": "x" * 300, "candidates": ["y"], "id": 7}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_that_cannot_be_scored_fails_alone(run, folder, tmp_path, batch_size, stock):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [*ROWS[:3], LONG, ROWS[3]])
    command = ["score", source, "--model", folder, "--batch-size", batch_size]
    code, out, err = run(*command, "-o", output)
    assert (code, out) == (1, "") and "1 of 5 rows failed, see their records" in err
    records = lines(output.read_text())
    assert [record["row"] for record in records] == [0, 1, 2, 3, 4]
    failed = records.pop(3)
    assert failed.pop("error").startswith(f"{source}, line 4: candidates[0]: ")
    assert failed == {"row": 3, "key": failed["key"], **LONG}
    check([{**r, "row": i} for i, r in enumerate(records)], ROWS, BruteScorer(*stock))
    code, out, _ = run(*command)
    assert code == 1 and [r["row"] for r in lines(out)] == [0, 1, 2, 3, 4]
    assert "256" in lines(out)[3]["error"]
    # Once more, only the row that failed is tried; it fails again, and counts.
    made = output.read_text().splitlines()
    code, _, err = run(*command, "-o", output)
    assert code == 1 and "4 of 5 rows are done already" in err and "1 of 5 rows failed" in err
    assert output.read_text().splitlines() == [*made[:3], made[4], made[3]]


def test_a_text_file_is_whole_or_not_there_and_goes_on_where_it_was(
    run, folder, tmp_path, monkeypatch
):
    source, output = tmp_path / "in.txt", tmp_path / "out.tsv"
    source.write_text(TEXT + "x" * 300 + "\ty\n" + "x\ty\nno word\n")
    command = ["score", source, "--model", folder, "--batch-size", 1, "-o", output]
    scored = command_module.scored

    def interrupted(scorer, rows, details):
        if rows[0].context == "x":
            raise KeyboardInterrupt
        return scored(scorer, rows, details)

    monkeypatch.setattr(command_module, "scored", interrupted)
    code, _, err = run(*command)
    assert code == 130 and not output.exists()
    assert "are done and saved; rerun the same command to go on" in err
    monkeypatch.setattr(command_module, "scored", scored)
    code, out, err = run(*command)
    assert (code, out) == (1, "") and "2 of 5 rows are done already" in err
    # What is not in the text is on standard error, also what failed before the interruption.
    assert f"not scored: {source}, line 6: candidates[0]: " in err
    assert f"not scored: {source}, line 8: must be a context, a tab and a word" in err
    assert "2 of 5 rows failed" in err
    code, printed, again = run(*command[:-2])
    assert code == 1 and again.count("not scored") == 2
    made, printed = (
        [line.split("\t") for line in text.splitlines()] for text in (output.read_text(), printed)
    )
    assert [float(each.pop(2)) for each in made] == [
        pytest.approx(float(each.pop(2)), abs=CLOSE) for each in printed
    ]
    assert made == printed and [each[1] for each in made] == ["happy", "sad", "here", "so", "y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.tsv"]
    # Named so, the same results are JSON.
    code, _, _ = run(*command[:-1], tmp_path / "out.jsonl")
    records = lines((tmp_path / "out.jsonl").read_text())
    assert code == 1 and [r.get("context") for r in records] == ["he is", "", "x" * 300, "x", None]
    assert records[0]["candidates"] == ["happy", "sad", "here"]
    assert ["error" in record for record in records] == [False, False, True, False, True]


@pytest.mark.parametrize("header", ["context\tword", "Context\t Candidate \r"])
def test_a_header_is_no_row(run, folder, columns, header):
    plain = run("score", columns, "--model", folder)
    columns.write_text(f"{header}\n{TEXT}")
    assert run("score", columns, "--model", folder) == plain
    # Elsewhere it is a line like any other.
    columns.write_text(f"{TEXT}{header}\n")
    assert len(run("score", columns, "--model", folder)[1].splitlines()) == 5


def test_lines_of_many_contexts_are_named(run, folder, tmp_path):
    source = tmp_path / "in.tsv"
    long, other = "x" * 300, "z" * 300
    source.write_text("".join(f"{long}\t{i}\na\t{i}\n" for i in range(9)) + f"{other}\ty\n" * 2)
    code, out, err = run("score", source, "--model", folder)
    assert code == 1 and len(out.splitlines()) == 9
    assert f"{source}, lines 1, 3, 5, 7, 9 and 4 more: candidates[0]" in err
    assert f"{source}, lines 19 to 20: candidates[0]" in err and "2 of 3 rows failed" in err


def test_a_file_without_one_good_row_has_a_record_for_each(run, folder, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"context": "a"}\n\nnothing\n')
    code, _, err = run("score", source, "--model", folder, "-o", output)
    records = lines(output.read_text())
    assert code == 1 and "2 of 2 rows failed" in err
    assert [record["row"] for record in records] == [0, 1] and records[0]["context"] == "a"
    assert f"{source}, line 1: " in records[0]["error"]
    assert f"{source}, line 3: not JSON" in records[1]["error"]
    (tmp_path / "in.txt").write_text("nothing\n")
    code, out, err = run("score", tmp_path / "in.txt", "--model", folder)
    assert (code, out) == (1, "") and "in.txt, line 1: " in err and "1 of 1 rows failed" in err


def test_a_terminal_gets_a_table_unless_it_is_long(run, folder, rows, columns, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run("score", rows, "--model", folder)
    assert code == 0 and "context" in out and "rank" in out and "{" not in out
    for word in ("he is also", "(empty)", "sea / see", "no candidates", "on and on"):
        assert word in out
    _, out, _ = run("score", rows, "--model", folder, "--details")
    assert "tokens, nats" in out and "'h' -" in out
    _, out, _ = run("score", columns, "--model", folder)
    assert "happy" in out and "\t" not in out
    monkeypatch.setattr(command_module, "TABLE_SIZE", 3)
    _, out, _ = run("score", rows, "--model", folder)
    assert len(lines(out)) == 4


def test_a_progress_bar_shows_only_where_work_takes_long(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    def shown(long, terminal):
        class Timer:
            """Work outlasts the patience at once, or never."""

            def __init__(self, seconds, begin):
                self.begin = begin

            def start(self):
                if long:
                    self.begin()

            def cancel(self):
                pass

            join = cancel

        monkeypatch.setattr(command_module, "Timer", Timer)
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with command_module.patient_progress(console, 3, 1) as advance:
            advance()
        return console.file.getvalue()

    assert "2/3 rows" in shown(long=True, terminal=True)
    assert shown(long=False, terminal=True) == shown(long=True, terminal=False) == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"context": "a"', ["not JSON"]),
        ('["a"]', ["not a JSON object"]),
        ("null", ["not a JSON object"]),
        ('{"candidates": ["a"]}', ['there is no "context"']),
        ('{"context": "a"}', ['there is no "candidates"']),
        ('{"context": 3, "candidates": []}', ["context must be text, got 3"]),
        ('{"context": "a", "candidates": "b"}', ['candidates must be a list, got "b"']),
        ('{"context": "a", "candidates": ["b", " "]}', ["candidates[1]", 'got " "']),
        ('{"context": "a", "candidates": [""]}', ["candidates[0]", 'got ""']),
        ('{"context": "a", "candidates": ["b", ["c", 1]]}', ["candidates[1]", 'got ["c", 1]']),
        ('{"context": "a", "candidates": [[]]}', ["candidates[0]", "got []"]),
        ('{"context": "a", "candidates": [null]}', ["candidates[0]", "got null"]),
        ('{"context": "a", "candidates": ["b"], "scores": 1}', ['"scores"', "rename"]),
        ('{"context": "a", "candidates": ["b"], "row": 1}', ['"row"', "rename"]),
        ('{"context": "a", "candidates": ["b"], "error": 1}', ['"error"', "rename"]),
        ('{"context": "a", "context": "b", "candidates": []}', ['key "context"', "twice"]),
        ('{"context": "a", "candidates": [], "n": {"m": 1, "m": 1}}', ['key "m"', "twice"]),
        ('{"context": "a", "candidates": [], "n": NaN}', ["NaN is not a number in JSON"]),
        ('{"context": "a", "candidates": [], "n": -Infinity}', ["-Infinity is not a number"]),
        ('{"context": "a", "candidates": [], "n": [1e999]}', ["1e999 is too large"]),
        ('{"context": "a", "candidates": [], "n": ' + "1" * 5000 + "}", ["not JSON"]),
        ('{"context": "a", "candidates": [], "n": ' + "[" * 500 + "]" * 500 + "}", ["levels"]),
        ("[" * 100_000, ["recursion"]),
        ('{"context": "\\ud800", "candidates": []}', ["surrogate"]),
        (b'{"context": "\xff", "candidates": []}', ["UTF-8"]),
        (b"\x00" * 100, ["not JSON"]),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(run, folder, rows, tmp_path, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    good = rows.read_bytes()
    rows.write_bytes(line + b"\n" + good + line + b"\n")
    output = tmp_path / "out.jsonl"
    code, out, err = run("score", rows, "--model", folder, "-o", output)
    assert (code, out) == (1, "") and "2 of 6 rows failed" in err and "Traceback" not in err
    first, *others, last = lines(output.read_text())
    assert all("scores" in record for record in others) and len(others) == 4
    for number, record in ((1, first), (6, last)):
        for word in (f"{rows}, line {number}: ", *words):
            assert word in record["error"]
        assert "scores" not in record and record.keys() >= {"row", "key", "error"}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"alone", "got 1 columns"),
        (b"a\tb\tc", "got 3 columns"),
        (b"a\t ", "the word is empty"),
        (b"caf\xe9\tb", "not UTF-8 text"),
    ],
)
def test_a_bad_line_of_text_is_named_and_the_others_stand(run, folder, columns, line, word):
    _, good, _ = run("score", columns, "--model", folder)
    columns.write_bytes(line + b"\n" + TEXT.encode() + line + b"\n")
    code, out, err = run("score", columns, "--model", folder)
    assert (code, out) == (1, good) and "2 of 4 rows failed" in err
    for number in (1, 7):
        assert f"not scored: {columns}, line {number}: " in err
    assert err.count(word) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}/none.jsonl"], ["none.jsonl", "cannot be read"]),
        (["{folder}"], ["must end in .jsonl, .tsv, .txt", "--format"]),
        (["{folder}", "--format", "tsv"], ["cannot be read"]),
        (["{rows}", "--format", "csv"], ["--format", "jsonl or tsv", "'csv'"]),
        (["{empty}"], ["empty.txt has no rows"]),
        (["{rows}", "-o", "{folder}/out.tsv"], ["--output", ".jsonl"]),
        (["{rows}", "-o", "{folder}/none/out.jsonl"], ["--output", "cannot be written"]),
        (["{rows}", "--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["{rows}", "--max-kv-bytes", "lots"], ["--max-kv-bytes", "lots"]),
        (["{rows}", "--weight", "nan"], ["weight", "nan"]),
        (["{rows}", "--aggregate", "mean"], ["aggregate", "'mean'", "logsumexp"]),
        (["{rows}", "--truecase", "german"], ["--truecase", "english", "'german'"]),
        (["{rows}", "--max-context-tokens", "0"], ["max_context_tokens", "at least 1"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, folder, rows, tmp_path, arguments, words):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    given = [each.format(rows=rows, folder=folder, empty=empty) for each in arguments]
    code, out, err = run("score", *given, "--model", folder)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--batch-size", 1], True),
        (["--chunk-size", 8], True),
        (["--max-kv-bytes", "1GB"], True),
        (["--model", "{moved}"], True),
        (["--model", "{rope_theta}"], False),
        (["--model", "{tokenizer}"], False),
        (["--details"], False),
        (["--truecase", "english"], False),
        (["--max-context-tokens", 2], False),
        (["--weight", 0.5], False),
        (["--word-insertion-bonus", 1], False),
        (["--trailing-space-correction"], False),
    ],
)
def test_whatever_changes_a_score_makes_other_rows(run, folder, tmp_path, options, same):
    """Where nothing changes, rows are done; where something does, the file is left alone."""
    copies = {name: tmp_path / name for name in ("moved", "rope_theta", "tokenizer")}
    for path in copies.values():
        shutil.copytree(folder, path)
    for name, file, change in (
        ("rope_theta", "config.json", {"rope_theta": 500.0}),
        ("tokenizer", "tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ):
        path = copies[name] / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"context": "he is", "candidates": ["a", "b"]}])
    command = ["score", source, "--model", folder, "-o", output]
    assert run(*command)[0] == 0
    made = output.read_bytes()
    code, _, err = run(*command, *(str(option).format(**copies) for option in options))
    assert output.read_bytes() == made
    if same:
        assert code == 0 and "1 of 1 rows are done already" in err
    else:
        assert code == 2 and "line 1 is of another input, other settings or another model" in err
