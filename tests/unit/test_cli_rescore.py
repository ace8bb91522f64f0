"""``tempo-mlx rescore``: lists in, ranked lists out, resumable; and weights that are tuned."""

import json

from tempo_mlx.scoring import ContinuationScorer, Weights, rescore
from tempo_mlx.weights import load

import pytest

ROWS = [
    {"utt": "a", "nbest": [{"text": "so it goes", "ac": -3.0}, {"text": "so it is", "ac": -2.0}]},
    {"utt": "b", "nbest": []},
    {"utt": "c", "nbest": [{"text": "a", "ac": -1}, ""], "speaker": "s"},
]

SLF = "N=3 L=2\nI=0\nI=1\nI=2\nJ=0 S=0 E=1 W=so a=-1\nJ=1 S=1 E=2 W=it a=-1\n"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_every_list_has_its_record(run, folder, rows):
    weights = ["--alpha", 0.3, "--word-bonus", 1, "--acoustic-scale", 2, "--token-penalty", -0.1]
    code, out, err = run("rescore", rows, "--model", folder, *weights)
    first, failed, last = lines(out)
    assert code == 1 and "1 of 3 lists failed" in err
    assert "line 2" in failed["error"] and failed["utt"] == "b"
    scorer = ContinuationScorer(*load(folder))
    given = Weights(acoustic_scale=2.0, alpha=0.3, word_bonus=1.0, token_penalty=-0.1)
    expected = [each.to_dict() for each in rescore(scorer, [ROWS[0], ROWS[2]], given)]
    for record, wanted in zip((first, last), expected, strict=True):
        assert record["best"] == wanted["best"] and record.get("speaker") == wanted.get("speaker")
        for one, other in zip(record["nbest"], wanted["nbest"], strict=True):
            assert one["total"] == pytest.approx(other["total"], abs=1e-3)


def test_a_run_goes_on_where_it_was(run, folder, rows, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ("rescore", rows, "--model", folder, "--output", output)
    run(*arguments)
    whole = sorted(lines(output.read_text()), key=lambda record: record["row"])
    output.write_text("".join(json.dumps(r) + "\n" for r in whole[:1]))
    code, _, err = run(*arguments)
    assert code == 1 and "1 of 3 lists are done already" in err
    again = sorted(lines(output.read_text()), key=lambda record: record["row"])
    assert [r["row"] for r in again] == [0, 1, 2] and again[0] == whole[0]
    code, _, err = run(*arguments, "--alpha", 0.1)
    assert code == 2 and "other settings" in err


def test_lattices_are_read_by_their_paths_or_in_one_pass(run, folder, tmp_path):
    path = tmp_path / "u1.slf"
    path.write_text(SLF)
    common = ("rescore", path, "--format", "slf", "--model", folder)
    (exact,), (approximate,) = (lines(run(*common, *more)[1]) for more in ([], ["--one-pass"]))
    assert exact["utt"] == approximate["utt"] == "u1" and exact["all_paths"]
    assert approximate["approximate"].startswith("one pass")
    assert exact["nbest"][0]["total"] == pytest.approx(approximate["nbest"][0]["total"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--end", "x"], "end must be True, False or marks"),
        (["--format", "nbest"], "--format must be one of jsonl, tsv"),
        (["--beams", 3], "--beams goes with --format nemo"),
        (["--one-pass"], "--one-pass is for lattices"),
        (["--words", "w.txt"], "--words has no effect on --format jsonl"),
    ],
)
def test_what_makes_no_sense_is_refused(run, folder, rows, arguments, message):
    code, out, err = run("rescore", rows, "--model", folder, *arguments)
    assert (code, out) == (2, "") and message in err


def test_tuned_weights_are_those_that_rescore_takes(run, folder, tmp_path):
    pytest.importorskip("jiwer")
    rows, said = tmp_path / "in.jsonl", tmp_path / "said.tsv"
    lists = [
        {
            "utt": f"u{i}",
            "speaker": f"s{i % 6}",
            "nbest": [{"text": f"wrong {i}", "ac": -1}, {"text": "so it goes", "ac": -1.5}],
        }
        for i in range(18)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in lists))
    said.write_text("".join(f"u{i}\tSo it goes.\n" for i in range(18)))
    scored, weights = tmp_path / "scored.jsonl", tmp_path / "weights.json"
    assert run("rescore", rows, "--model", folder, "-o", scored, "--alpha", 0)[0] == 0
    common = ("--references", said, "--group-by", "speaker", "--restarts", 2)
    # Scores that are there need no model.
    code, out, _ = run("rescore", "tune", scored, *common, "--model", "nowhere", "-o", weights)
    assert code == 0 and "oracle" in out and "word_bonus" in out
    found = json.loads(weights.read_text())
    assert found["oracle"]["wer"] == found["tuned"]["wer"] == 0 < found["first"]["wer"]
    code, out, _ = run("rescore", rows, "--model", folder, "--weights", weights)
    assert code == 0 and {record["best"] for record in lines(out)} == {"so it goes"}
    direct = tmp_path / "direct.json"
    run("rescore", "tune", rows, *common, "--model", folder, "-o", direct)
    assert json.loads(direct.read_text())["tuned"]["wer"] == 0
