"""What decoders call today, with the numbers that stock mlx-lm gives each text alone."""

from tempo_mlx.scoring import ContinuationScorer, compat, ctc_decoder_lm
from tempo_mlx.weights import load
from tests.brute_scorer import BruteScorer

import mlx_lm
import pytest

CLOSE = 1e-3
TEXTS = ["so it goes", "a", "so it is", "so it goes"]


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def brute(folder):
    model, tokenizer = mlx_lm.load(folder)
    tokenizer.bos_token = tokenizer.eos_token
    return BruteScorer(model, tokenizer)


def test_texts_score_all_tokens_behind_the_start(loaded, brute):
    sums = [brute.sum([brute.start], brute.ids(text)) for text in TEXTS]
    counts = [len(brute.ids(text)) for text in TEXTS]
    assert compat.score_texts_batch(*loaded, TEXTS, "cpu", 2) == pytest.approx(sums, abs=CLOSE)
    means = [total / n for total, n in zip(sums, counts, strict=True)]
    found = compat.score_texts_batch(*loaded, TEXTS, length_normalize=True)
    assert found == pytest.approx(means, abs=CLOSE)
    # The start is a token, too.
    penalised = [total - 0.5 * (n + 1) for total, n in zip(sums, counts, strict=True)]
    assert compat.rescore_with_gpt2(*loaded, TEXTS, 0.5) == pytest.approx(penalised, abs=CLOSE)


def test_words_score_behind_contexts(loaded, brute):
    ((found,), other) = compat.score_continuations(*loaded, ["so it", ""], [["goes"], ["a", "so"]])
    assert found == pytest.approx(brute.score("so it", "goes"), abs=CLOSE)
    assert other == pytest.approx([brute.score("", "a"), brute.score("", "so")], abs=CLOSE)


class State:
    """As CTCDecoderLMState: a child for each word, the same object for the same word."""

    def __init__(self):
        self.children = {}

    def child(self, index):
        return self.children.setdefault(index, State())


class Base:
    """As CTCDecoderLM: must be initialised."""

    def __init__(self):
        self.is_ready = True


def test_a_ctc_decoder_lm_scores_texts_word_by_word(loaded, brute):
    scorer = ContinuationScorer(*loaded, weight=0.5, word_insertion_bonus=1.0)
    words = ["so", "it", "goes"]
    lm = ctc_decoder_lm(scorer, words, base=Base, state=State)
    assert lm.is_ready
    state, total = lm.start(False), 0.0
    for index in range(3):
        state, score = lm.score(state, index)
        total += score
    state, score = lm.finish(state)
    total += score
    ids = [brute.start, *brute.ids("so it goes")]
    expected = brute.sum(ids[:1], ids[1:]) + brute.log_p(ids)[-1, brute.start]
    assert total == pytest.approx(0.5 * expected + 3, abs=CLOSE)


def test_says_what_a_ctc_decoder_lm_needs(loaded):
    with pytest.raises(ValueError, match="torchaudio or flashlight-text"):
        ctc_decoder_lm(ContinuationScorer(*loaded), [])
