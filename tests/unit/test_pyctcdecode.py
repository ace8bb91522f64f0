"""``PyctcdecodeLM``: scored by hand, and inside the real beam search where that is installed."""

import inspect
import subprocess
import sys

from tempo_mlx.scoring import ContinuationScorer, PyctcdecodeLM, batched
from tempo_mlx.weights import load
from tests.brute_scorer import BruteScorer

import mlx_lm
import numpy as np
import pytest

WEIGHT, BONUS = 0.7, -0.4
#: Fails where log-probabilities of fp32 logits differ by more than the product promises.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def scorer(loaded):
    return ContinuationScorer(*loaded, weight=WEIGHT, word_insertion_bonus=BONUS)


@pytest.fixture(scope="module")
def by_hand(folder):
    """Log p of words behind a context, and of the end after them, each by a pass of mlx-lm."""
    model, tokenizer = mlx_lm.load(folder)
    # What an empty context is, for want of a token that begins a text.
    tokenizer.bos_token = tokenizer.eos_token
    brute = BruteScorer(model, tokenizer)
    (end,) = tokenizer.eos_token_ids

    def score(text, context=""):
        total = 0.0
        for word in text.split():
            total += brute.score(context, word)
            context += word if not context or word == "," else f" {word}"
        return total, brute.log_p([end, *brute.ids(context)])[-1, end]

    return score


def total(by_hand, text, context=""):
    """What the language model adds to a beam."""
    logprob, end = by_hand(text, context)
    return WEIGHT * (logprob + end) + BONUS * len(text.split())


def through(lm, text, state):
    words, score = text.split(), 0.0
    for i, word in enumerate(words):
        added, state = lm.score(state, word, is_last_word=i == len(words) - 1)
        score += added
    return score, state


@pytest.mark.parametrize(
    ("text", "context"), [("a", ""), ("so it goes", ""), ("it goes on", "and so"), ("a a a", "a")]
)
def test_a_text_scores_as_by_hand_word_by_word(scorer, by_hand, text, context):
    lm = PyctcdecodeLM(scorer)
    score, state = through(lm, text, context or lm.get_start_state())
    assert score == pytest.approx(total(by_hand, text, context), abs=CLOSE)
    assert state == f"{context} {text}".strip() and hash(state) is not None
    score, _ = through(PyctcdecodeLM(scorer, score_boundary=False), text, context)
    logprob, _ = by_hand(text, context)
    assert score == pytest.approx(WEIGHT * logprob + BONUS * len(text.split()), abs=CLOSE)


def test_a_text_can_end_where_no_word_is_open(scorer, by_hand):
    lm = PyctcdecodeLM(scorer)
    assert lm.score("so", "") == (0.0, "so")
    score, state = lm.score("so", "", is_last_word=True)
    assert (score, state) == (pytest.approx(WEIGHT * by_hand("so")[1], abs=CLOSE), "so")
    score, state = lm.score("", "", is_last_word=True)
    assert (score, state) == (pytest.approx(WEIGHT * by_hand("")[1], abs=CLOSE), "")


def test_punctuation_joins_the_text_as_the_scorer_reads_it(scorer, by_hand):
    lm = PyctcdecodeLM(scorer, score_boundary=False)
    score, state = through(lm, "so , it", "")
    assert state == "so, it"
    assert score == pytest.approx(WEIGHT * by_hand("so , it")[0] + 3 * BONUS, abs=CLOSE)


def test_words_that_no_unigram_begins_with_cost_an_offset(scorer):
    plain = PyctcdecodeLM(scorer)
    lm = PyctcdecodeLM(scorer, unigrams=["hello", "help", "he"], unk_score_offset=-3.0)
    assert [plain.score_partial_token(part) for part in ("h", "zz", "z" * 12)] == [0, 0, 0]
    parts = ["h", "he", "hel", "help", "helpe", "i", "helloo"]
    assert [lm.score_partial_token(part) for part in parts] == [0, 0, 0, 0, -3, -3, -3]
    assert lm.score_partial_token("z" * 12) == -6
    for word, offset in (("hello", 0), ("hel", -3), ("zoo", -3)):
        difference = lm.score("so", word)[0] - plain.score("so", word)[0]
        assert difference == pytest.approx(WEIGHT * offset, abs=CLOSE)


def test_parameters_can_be_changed_between_decodes(scorer, by_hand):
    lm = PyctcdecodeLM(scorer)
    lm.reset_params(alpha=2.0, beta=None, score_boundary=False)
    logprob, end = by_hand("so it")
    score, _ = through(lm, "so it", "")
    assert score == pytest.approx(2 * logprob + 2 * BONUS, abs=CLOSE)
    lm.reset_params(alpha=None, beta=0.25, score_boundary=True)
    score, _ = through(lm, "so it", "")
    assert score == pytest.approx(2 * (logprob + end) + 0.5, abs=CLOSE)
    for wrong, word in (
        ({"alpha": 1.0, "beta": float("nan")}, "beta"),
        ({"alpha": 1.0, "score_boundary": 1}, "score_boundary"),
        ({"alpha": 1.0, "gamma": 1.0}, "gamma"),
    ):
        with pytest.raises(ValueError, match=word):
            lm.reset_params(**wrong)
    assert through(lm, "so it", "")[0] == score


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"order": 0}, "order must be an integer of at least 1, got 0"),
        ({"order": 2.5}, "order .* got 2.5"),
        ({"unigrams": "hello"}, "unigrams must be a collection of words, got 'hello'"),
        ({"unigrams": ["a", 1]}, "unigrams .* 1"),
        ({"unigrams": []}, "unigrams must hold at least 1 word"),
        ({"unk_score_offset": float("inf")}, "unk_score_offset must be a finite number, got inf"),
        ({"score_boundary": "no"}, "score_boundary must be True or False, got 'no'"),
    ],
)
def test_bad_arguments_are_named(scorer, arguments, words):
    with pytest.raises(ValueError, match=words):
        PyctcdecodeLM(scorer, **arguments)


def test_saving_loading_and_forks_are_refused(scorer, tmp_path, monkeypatch):
    lm = PyctcdecodeLM(scorer)
    with pytest.raises(NotImplementedError, match="ContinuationScorer"):
        lm.save_to_dir(str(tmp_path))
    with pytest.raises(NotImplementedError, match="ContinuationScorer"):
        PyctcdecodeLM.load_from_dir(str(tmp_path))
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="pool=None"):
        lm.score("", "so")


def test_needs_no_pyctcdecode():
    code = (
        "import sys; sys.modules['pyctcdecode'] = None\n"
        "from tempo_mlx.scoring import PyctcdecodeLM; print(PyctcdecodeLM.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "PyctcdecodeLM", done.stderr


# What follows runs the real package, where it is installed.

LABELS = ["", " ", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def pyctcdecode():
    return pytest.importorskip("pyctcdecode")


@pytest.fixture
def decoder(pyctcdecode):
    """Makes a decoder with a language model, or None."""
    made = []

    def make(lm):
        alphabet = pyctcdecode.Alphabet.build_alphabet(LABELS)
        made.append(pyctcdecode.BeamSearchDecoderCTC(alphabet, lm))
        return made[-1]

    yield make
    for each in made:
        each.cleanup()


def acoustics(*letters):
    """Log-probabilities [frames, labels] of what is heard: a letter a frame, blanks between.

    Args:
        letters: each a text, or letters with their probabilities.
    """
    heard = []
    for part in letters:
        for each in [part] if isinstance(part, dict) else part:
            heard += [each if isinstance(each, dict) else {each: 0.98}, {"": 0.98}]
    rows = np.empty((len(heard), len(LABELS)))
    for row, given in zip(rows, heard, strict=True):
        row[:] = (1 - sum(given.values())) / (len(LABELS) - len(given))
        row[[LABELS.index(letter) for letter in given]] = list(given.values())
    return np.log(rows)


def ambiguous(by_hand, context=""):
    """Sounds between two texts, of which the model prefers one and the sounds the other."""
    texts = ["so it got on", "so it hot on"]
    texts.sort(key=lambda text: total(by_hand, text, context), reverse=True)
    liked, heard = texts
    margin = total(by_hand, liked, context) - total(by_hand, heard, context)
    assert margin > 0.5, "the model must care, or the test shows nothing"
    return liked, heard, acoustics("so it ", {liked[6]: 0.45, heard[6]: 0.54}, "ot on")


def test_has_the_methods_of_the_abstract_class(pyctcdecode, scorer):
    abstract = pyctcdecode.language_model.AbstractLanguageModel
    for name, method in inspect.getmembers(abstract, inspect.isfunction):
        ours = inspect.signature(getattr(PyctcdecodeLM, name)).parameters
        assert list(ours) == list(inspect.signature(method).parameters)
    assert abstract.__abstractmethods__ <= set(dir(PyctcdecodeLM))
    assert isinstance(PyctcdecodeLM(scorer).order, int)


def test_the_model_decides_between_what_sounds_alike(decoder, scorer, by_hand):
    liked, heard, logits = ambiguous(by_hand)
    assert decoder(None).decode(logits) == heard
    assert decoder(PyctcdecodeLM(scorer)).decode(logits) == liked


def test_every_beam_scores_as_by_hand(decoder, scorer, by_hand):
    _, _, logits = ambiguous(by_hand)
    beams = decoder(PyctcdecodeLM(scorer)).decode_beams(
        logits, beam_prune_logp=-200.0, token_min_logp=-9.0, beam_width=8
    )
    assert len(beams) == 8
    for text, state, _, logit_score, combined in beams:
        assert combined - logit_score == pytest.approx(total(by_hand, text), abs=CLOSE)
        assert state == text


def test_weight_zero_is_no_language_model(decoder, loaded, by_hand):
    _, heard, logits = ambiguous(by_hand)
    lm = PyctcdecodeLM(ContinuationScorer(*loaded, weight=0.0))
    options = {"token_min_logp": -9.0, "beam_width": 8}
    found, plain = (
        [(text, frames, logit, combined) for text, _, frames, logit, combined in beams]
        for beams in (
            decoder(lm).decode_beams(logits, **options),
            decoder(None).decode_beams(logits, **options),
        )
    )
    assert len(found) == 8 and found == plain and found[0][0] == heard


def test_decoding_goes_on_from_a_text(decoder, scorer, by_hand):
    liked, heard, logits = ambiguous(by_hand, "and")
    decode = decoder(PyctcdecodeLM(scorer)).decode_beams
    text, state, _, logit_score, combined = decode(logits, lm_start_state="and")[0]
    assert (text, state) == (liked, f"and {liked}")
    assert combined - logit_score == pytest.approx(total(by_hand, liked, "and"), abs=CLOSE)


def test_beams_are_merged_by_order_words_only(decoder, scorer):
    # Two texts that differ in their first word and have the next two in common.
    logits = acoustics({"a": 0.5, "i": 0.49}, " so be")
    options = {"prune_history": True, "token_min_logp": -2.0, "beam_prune_logp": -30.0}

    def texts(**arguments):
        lm = PyctcdecodeLM(scorer, score_boundary=False, **arguments)
        return {beam[0] for beam in decoder(lm).decode_beams(logits, **options)}

    assert texts() == texts(order=4) == {"a so be", "i so be"}
    assert len(texts(order=2)) == 1


def test_the_decoder_changes_parameters(decoder, scorer, by_hand):
    liked, heard, logits = ambiguous(by_hand)
    made = decoder(PyctcdecodeLM(scorer))
    assert made.decode(logits) == liked
    made.reset_params(alpha=0.0, beta=0.0, lm_score_boundary=False)
    assert made.decode(logits) == heard


def test_a_batched_decoder_finds_the_same_with_one_call_a_step(decoder, scorer, by_hand):
    _, _, logits = ambiguous(by_hand)
    options = {"beam_prune_logp": -200.0, "token_min_logp": -9.0, "beam_width": 8}
    lm, calls = PyctcdecodeLM(scorer), []
    ask = scorer.score_continuations

    def watched(contexts, words, **more):
        calls.append(len(contexts))
        return ask(contexts, words, **more)

    plain = decoder(PyctcdecodeLM(scorer)).decode_beams(logits, **options)
    scorer.score_continuations = watched
    found = batched(decoder(lm)).decode_beams(logits, **options)
    assert max(calls) > 1 and len(calls) <= len(logits) + 1
    for one, other in zip(found, plain, strict=True):
        assert one[0] == other[0] and one[-1] == pytest.approx(other[-1], abs=CLOSE)
    with pytest.raises(ValueError, match="must be a BeamSearchDecoderCTC"):
        batched(decoder(None))


def test_a_word_and_the_end_take_one_pass(scorer):
    lm = PyctcdecodeLM(scorer)
    lm.score("so it", "goes", is_last_word=True)
    assert scorer.stats().passes == 1
