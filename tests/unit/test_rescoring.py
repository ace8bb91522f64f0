"""Rescored lists against sums by hand, lattices against all their paths, files as written."""

import gzip
import itertools
import json
import math

from tempo_mlx import ContinuationScorer
from tempo_mlx.cli.rescore import LATTICES, read
from tempo_mlx.scoring import Hypothesis, NBest, Weights, rescore
from tempo_mlx.scoring.lattice_files import slf_lattice
from tempo_mlx.scoring.nbest_files import READERS, spoken
from tempo_mlx.scoring.word_lattices import Arc, WordLattice, paths_of, rescore_in_one_pass
from tests.tiny_models import tiny_model
from tests.unit.test_score_texts import Alone
from tests.unit.test_scoring import TOKENIZER

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

#: Fails where log-probabilities of fp32 logits differ by more than the product promises.
CLOSE = 1e-3

WEIGHTS = Weights(acoustic_scale=0.7, alpha=0.4, word_bonus=1.5, token_penalty=-0.3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def scorer(model):
    return ContinuationScorer(model, TOKENIZER, weight=3.0, word_insertion_bonus=9.0)


@pytest.fixture(scope="module")
def total(model):
    alone = Alone(model)

    def by_hand(text, ac, lm, context="", weights=WEIGHTS):
        joined = f"{context} {text}".strip()
        new = alone.score(joined, context, True)
        tokens = len(alone.brute.ids(joined)) - len(alone.brute.ids(context))
        return (
            weights.acoustic_scale * ac
            + (1 - weights.alpha) * lm
            + weights.alpha * new
            + weights.word_bonus * len(text.split())
            + weights.token_penalty * tokens
        )

    return by_hand


ROWS = [
    {
        "utt": "one",
        "context": "dead e",
        "speaker": "s",
        "nbest": [
            {"text": "ab ca", "ac": -5.5, "lm": -2.0, "id": 1},
            {"text": "ab e", "ac": -4.0, "lm": -1.5},
            {"text": "ab ca", "ac": -6.0},
        ],
    },
    {"utt": 2, "nbest": ["", "e", "dead ca e"]},
]


def test_totals_are_sums_and_lists_are_ranked_by_them(scorer, total):
    found = rescore(scorer, ROWS, WEIGHTS)
    for row, result in zip(ROWS, found, strict=True):
        assert [each.total for each in result.ranked] == sorted(
            (each.total for each in result.ranked), reverse=True
        )
        assert sum(each.posterior for each in result.ranked) == pytest.approx(1)
        for each in result.ranked:
            h = each.hypothesis
            by_hand = total(h.text, h.ac, h.lm, row.get("context", ""))
            assert each.total == pytest.approx(by_hand, abs=CLOSE)
        best = [each.posterior for each in result.ranked if each.hypothesis.text == result.best]
        assert result.confidence == pytest.approx(sum(best))
    record = found[0].to_dict()
    assert (record["utt"], record["speaker"], record["context"]) == ("one", "s", "dead e")
    assert {each.get("id") for each in record["nbest"]} == {1, None}
    assert json.loads(json.dumps(record)) == record


def test_what_was_rescored_can_be_rescored_again(scorer):
    (first, _) = rescore(scorer, ROWS, WEIGHTS)
    (again,) = rescore(scorer, [{**first.to_dict(), "row": 0, "key": "k"}], WEIGHTS)
    old, new = first.to_dict(), again.to_dict()
    assert old.keys() == new.keys() and old["best"] == new["best"]
    for one, other in zip(old["nbest"], new["nbest"], strict=True):
        assert one.keys() == other.keys()
        assert one["total"] == pytest.approx(other["total"], abs=CLOSE)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([{"nbest": []}], r"lists\[0\]: .*at least 1 hypothesis"),
        ([NBest("a", [])], r"lists\[0\] has no hypotheses"),
        ([{"nbest": ["a", 3]}], r"nbest\[1\] must be a text or an object"),
        ([{"nbest": [{"text": "a", "ac": "x"}]}], r"nbest\[0\].ac must be a number"),
        ([3], r"lists\[0\] must be an NBest or an object"),
    ],
)
def test_what_is_no_list_is_named(scorer, lists, message):
    with pytest.raises(ValueError, match=message):
        rescore(scorer, lists)


def entries(path, *arguments):
    found = read(str(path), *arguments)
    return {e.nbest.utt: e.nbest for e in found if e.nbest}, [e.error for e in found if e.error]


def test_tables_with_and_without_a_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("u1\t-1.5\t-2\the is\nu2\t-1\t-3\tso\nu1\t-2\t-1\tshe is\nu2\nu2\tx\tso\n")
    lists, errors = entries(path)
    assert [h.text for h in lists["u1"].hypotheses] == ["he is", "she is"]
    assert lists["u2"].hypotheses == [Hypothesis("so", -1.0, -3.0)]
    assert "columns" in errors[0] and "not a number" in errors[1] and len(errors) == 2
    path.write_text("text\tutt\tcontext\tspeaker\nhe is\tu1\tso\ts\n")
    lists, errors = entries(path)
    assert (lists["u1"].context, errors) == ("so", [])
    assert lists["u1"].hypotheses == [Hypothesis("he is", given={"speaker": "s"})]


def test_srilm_lists_are_in_logarithms_to_base_10(tmp_path):
    folder = tmp_path / "nbest"
    folder.mkdir()
    (folder / "u1.gz").write_bytes(gzip.compress(b"-10 -2 2 <s> he is </s>\n-11 -1 1 ++UM++ so\n"))
    (folder / "u2").write_text("NBestList1.0\n(-977) he is\n")
    timed = "he ( st: 0 et: 1 g: -10 a: -20 ) is ( st: 1 et: 2 g: -30 a: -40 )"
    (folder / "u3").write_text(f"NBestList2.0\n(-100) {timed}\n")
    (folder / "u4").write_text("words only\n")
    lists, errors = entries(folder, "srilm")
    assert lists["u1"].hypotheses == [
        Hypothesis("he is", pytest.approx(-10 * math.log(10)), pytest.approx(-2 * math.log(10))),
        Hypothesis("so", pytest.approx(-11 * math.log(10)), pytest.approx(-math.log(10))),
    ]
    unit = 1024 / 10000.5
    assert lists["u2"].hypotheses == [Hypothesis("he is", pytest.approx(-977 * unit))]
    (h,) = lists["u3"].hypotheses
    assert (h.text, h.ac, h.lm) == ("he is", pytest.approx(-60 * unit), pytest.approx(-40 * unit))
    assert len(errors) == 1 and "ac, lm, number of words" in errors[0]


def test_kaldi_lists_are_costs(tmp_path):
    (tmp_path / "words_text").write_text("u-a-1 he is\nu-a-2 she is\nu-b-1\n")
    (tmp_path / "acwt").write_text("u-a-1 10.5\nu-a-2 11\nu-b-1 3\n")
    (tmp_path / "lmwt.withlm").write_text("u-a-1 2\nu-a-2 1\nu-b-1 0.5\n")
    lists, _ = entries(tmp_path, "kaldi")
    assert lists["u-a"].hypotheses == [
        Hypothesis("he is", -10.5, -2.0),
        Hypothesis("she is", -11.0, -1.0),
    ]
    assert lists["u-b"].hypotheses == [Hypothesis("", -3.0, -0.5)]


def test_nemo_beams_are_a_fixed_number_an_utterance(tmp_path):
    path = tmp_path / "beams.tsv"
    path.write_text("he is\t-1.5\n\t-2\nso\t-1\nsue\t-4\n")
    lists, _ = entries(path, "nemo", 2)
    assert lists["0"].hypotheses == [Hypothesis("he is", -1.5), Hypothesis("", -2.0)]
    assert lists["1"].hypotheses == [Hypothesis("so", -1.0), Hypothesis("sue", -4.0)]
    with pytest.raises(ValueError, match="not a multiple of --beams 3"):
        entries(path, "nemo", 3)


@pytest.mark.parametrize("word", ["<s>", "</s>", "!NULL", "<sil>", "++NOISE++", "[NOISE]"])
def test_fillers_are_no_words(word):
    assert spoken(["a", word, "b"]) == "a b" and spoken(["<unk>"]) == "<unk>"


WORDS = ["", "a", "ab", "ca", "dead"]


@st.composite
def lattices(draw):
    n = draw(st.integers(2, 6))
    scores = st.floats(-5, 0).map(lambda x: round(x, 3))
    arcs = []
    for source, target in itertools.combinations(range(n), 2):
        for word in draw(st.lists(st.sampled_from(WORDS), max_size=2)):
            features = [draw(scores), draw(scores), 0, len(word.split()), 0]
            arcs.append(Arc(source, target, word, np.array(features)))
    # One way through at least.
    arcs += [Arc(i, i + 1, "e", np.array([-3.0, -3.0, 0, 1, 0])) for i in range(n - 1)]
    ends = {n - 1: np.array([-0.5, -0.25, 0, 0, 0])}
    if draw(st.booleans()):
        ends[n - 2] = np.zeros(5)
    return arcs, ends


def all_paths(arcs, ends, state=0, words=(), features=0.0):
    if state in ends:
        yield " ".join(words), features + ends[state]
    for arc in arcs:
        if arc.source == state:
            longer = (*words, arc.word) if arc.word else words
            yield from all_paths(arcs, ends, arc.target, longer, features + arc.features)


@settings(max_examples=60)
@given(lattices(), st.integers(1, 40))
def test_the_best_texts_of_a_lattice_are_those_of_all_its_paths(given_lattice, n):
    arcs, ends = given_lattice
    lattice = WordLattice(0, arcs, ends)
    paths = list(all_paths(arcs, ends))
    assert lattice.n_paths[0] == len(paths)
    best = {}
    for text, features in paths:
        score = float(features @ WEIGHTS.factors)
        best[text] = max(score, best.get(text, -np.inf))
    expected = sorted(best.values(), reverse=True)[:n]
    found = lattice.best_texts(WEIGHTS.factors, n)
    scores = [float(features @ WEIGHTS.factors) for _, features in found]
    assert scores == pytest.approx(expected)
    assert [best[text] for text, _ in found] == pytest.approx(scores)
    assert len({text for text, _ in found}) == len(found)
    assert lattice.best_histories(WEIGHTS.factors)[0] == ""


def arc(source, target, word, ac=0.0, lm=0.0):
    return Arc(source, target, word, np.array([ac, lm, 0, len(word.split()), 0]))


def test_one_pass_is_exact_where_each_state_has_one_history(scorer, total):
    arcs = [arc(0, 1, "ab", -1, -2), arc(0, 2, "e", -2, -1), arc(1, 3, "ca", -1), arc(1, 4, "dead")]
    arcs += [arc(2, 5, "", -0.5), arc(5, 6, "bb", 0, -1)]
    lattice = WordLattice(0, arcs, {s: np.zeros(5) for s in (3, 4, 6)})
    found = rescore_in_one_pass(scorer, "u", lattice, WEIGHTS, 10)
    exact = rescore(scorer, [paths_of("u", lattice, WEIGHTS, 10)], WEIGHTS)[0]
    assert "approximate" in found.to_dict() and exact.to_dict()["all_paths"] is True
    texts = [each.hypothesis.text for each in exact.ranked]
    assert texts == [each.hypothesis.text for each in found.ranked]
    for one, other in zip(found.ranked, exact.ranked, strict=True):
        assert one.total == pytest.approx(other.total, abs=CLOSE)
        h = other.hypothesis
        assert other.total == pytest.approx(total(h.text, h.ac, h.lm), abs=CLOSE)


def test_one_pass_scores_a_word_behind_the_best_history(scorer, model):
    arcs = [arc(0, 1, "ab", -1), arc(0, 1, "e", -9), arc(1, 2, "ca")]
    found = rescore_in_one_pass(scorer, "u", WordLattice(0, arcs, {2: np.zeros(5)}), Weights(), 5)
    by_text = {each.hypothesis.text: each.new for each in found.ranked}
    alone = Alone(model)
    shared = alone.log_p("ab ca")[0] - alone.log_p("ab")[0] + alone.log_p("ab ca")[1]
    for first in ("ab", "e"):
        expected = alone.log_p(first)[0] + shared
        assert by_text[f"{first} ca"] == pytest.approx(expected, abs=CLOSE)


def test_a_lattice_that_is_none_is_refused():
    with pytest.raises(ValueError, match="cycle"):
        WordLattice(0, [arc(0, 1, "a"), arc(1, 0, "b")], {1: np.zeros(5)})
    with pytest.raises(ValueError, match="no path"):
        WordLattice(0, [arc(0, 1, "a")], {2: np.zeros(5)})
    deep = WordLattice(0, [arc(i, i + 1, "a") for i in range(5000)], {5000: np.zeros(5)})
    assert deep.n_paths[0] == 1


NODES = """# as pocketsphinx writes it
VERSION=1.0
start=0 end=4
N=5 L=5
I=0 t=0.00 W=<s>
I=1 t=0.10 W=ab v=1
I=2 t=0.10 W="ca"
I=3 t=0.50 W=<sil>
I=4 t=0.90 W=</s>
J=0 S=0 E=1 a=-1.5
J=1 S=0 E=2 a=-2.5
J=2 S=1 E=3 a=-1
J=3 S=2 E=4 a=-1
J=4 S=3 E=4 a=-0.25
"""

LINKS = """VERSION=1.0
base=10
NODES=3 LINKS=3
I=0
I=1
I=2
J=0 START=0 END=1 WORD=ab acoustic=-1 language=-2
J=1 S=0 E=1 W=ca a=-2 l=-1
J=2 S=1 E=2 W=!NULL a=0 l=-0.5
"""


def texts(lattice):
    found = paths_of("u", lattice, Weights(), 100).hypotheses
    return {h.text: (h.ac, h.lm) for h in found}


def test_htk_lattices_with_words_on_nodes_or_links():
    found = texts(slf_lattice(NODES))
    assert found == {"ab": pytest.approx((-2.75, 0.0)), "ca": pytest.approx((-3.5, 0.0))}
    ten = math.log(10)
    found = texts(slf_lattice(LINKS))
    assert found["ab"] == pytest.approx((-ten, -2.5 * ten))
    assert found["ca"] == pytest.approx((-2 * ten, -1.5 * ten))


def test_broken_lattices_are_errors_beside_the_others(tmp_path):
    (tmp_path / "good.slf").write_text(NODES)
    (tmp_path / "bad.slf").write_text(NODES.replace("E=4 a=-1\n", "E=9 a=-1\n"))
    (tmp_path / "none.slf").write_text("he is\n")
    found = {e.utt or e.given["utt"]: e for e in read(str(tmp_path), "slf")}
    assert found["good"].lattice is not None
    assert "node 9" in found["bad"].error and "no nodes" in found["none"].error


KALDI = """u1
0 1 5 1.5,2.5,3_3_4
0 1 6 1,3,3_4
1 2 0 0,0.5,
2 0.25,0.75,

12345
0 1 6 6 1,3
1

"""


def test_kaldi_archives_in_text(tmp_path):
    path, words = tmp_path / "lat.txt", tmp_path / "words.txt"
    path.write_text(KALDI)
    words.write_text("<eps> 0\nab 5\nca 6\n")
    found = {e.utt: texts(e.lattice) for e in read(str(path), "kaldi-lattice", None, words)}
    assert found["u1"]["ab"] == pytest.approx((-3.75, -1.75))
    assert found["u1"]["ca"] == pytest.approx((-4.25, -1.25))
    assert found["12345"] == {"ca": (-3.0, -1.0)}


def test_openfst_files_are_those_that_kaldifst_writes(tmp_path):
    kaldifst = pytest.importorskip("kaldifst")
    folder, words = tmp_path / "fsts", tmp_path / "words.txt"
    folder.mkdir()
    words.write_text("<eps> 0\nab 5\nca 6\n")
    text = "0 1 5 5 1.5\n0 1 6 6 2\n1 2 0 0 0.5\n2 0.25\n"
    assert kaldifst.compile(text).write(str(folder / "std.fst"))
    lattice = kaldifst.Lattice()
    for _ in range(3):
        lattice.add_state()
    lattice.start = 0
    for arc in ((0, 5, 1.5, 2.5, 1), (0, 6, 1.0, 3.0, 1), (1, 0, 0.0, 0.5, 2)):
        source, label, graph, acoustic, target = arc
        weight = kaldifst.LatticeWeight(graph, acoustic)
        lattice.add_arc(source, kaldifst.LatticeArc(label, label, weight, target))
    lattice.set_final(2, kaldifst.LatticeWeight(0.25, 0.75))
    assert lattice.write(str(folder / "lat.fst"))
    (folder / "none.fst").write_bytes(b"nothing")
    found = {e.utt or e.given["utt"]: e for e in read(str(folder), "openfst", None, words)}
    assert texts(found["std"].lattice)["ab"] == pytest.approx((-2.25, 0.0))
    assert texts(found["lat"].lattice)["ab"] == pytest.approx((-3.75, -1.75))
    assert texts(found["lat"].lattice)["ca"] == pytest.approx((-4.25, -1.25))
    assert "not an OpenFst file" in found["none"].error


def test_each_format_has_a_test():
    assert {*READERS, *LATTICES} == {
        *("jsonl", "tsv", "srilm", "kaldi", "nemo"),
        *("slf", "kaldi-lattice", "openfst"),
    }
