"""Scores of continuations by the embedded model, against every text alone through stock mlx-lm."""

import random

from tempo_mlx import ContinuationScorer
from tests.brute_scorer import BruteScorer

import numpy as np
import pytest

TEXT = """the old man walked slowly down to the river because he wanted to see whether the boats
had come back from the sea"""
STORY = TEXT.split()
BEAMS = [" ".join(STORY[:n]) for n in range(14, 24)]
WORDS = ["and", "before", "antidisestablishmentarianism", ".", "yesterday"]


@pytest.fixture(scope="module")
def brute(embedded):
    return BruteScorer(*embedded)


def compare(scorer, brute, contexts, words):
    expected = np.concatenate(brute.score_continuations(contexts, words))
    found = np.concatenate(scorer.score_continuations(contexts, words))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_beams_share_one_short_sequence(embedded, brute):
    scorer = ContinuationScorer(*embedded)
    compare(scorer, brute, BEAMS[:4], [WORDS] * 4)
    assert scorer.stats().passes == 1
    before = scorer.stats().tokens_computed
    # The next word of the beam search.
    compare(scorer, brute, BEAMS[4:6], [WORDS] * 2)
    assert scorer.stats().tokens_computed - before < 20


def test_words_whose_tokens_go_over_the_end_of_their_context(embedded, brute):
    pairs = [("what?", "!"), ("and so on etc.", "."), ("a :", ")"), ("foo.", ","), ("end.", ")")]
    _, tokenizer = embedded
    for context, word in pairs:
        alone, together = (brute.ids(text) for text in (context, context + word))
        assert together[: len(alone)] != alone, "not such a case"
    contexts, words = zip(*pairs, strict=True)
    scorer = ContinuationScorer(*embedded)
    compare(scorer, brute, list(contexts), [[word, "then"] for word in words])


def test_unrelated_contexts_in_any_order_and_little_memory(embedded, brute):
    rng = random.Random(3)
    contexts = [" ".join(rng.sample(STORY, 6)) for _ in range(4)] + [""]
    words = [["river", "tomorrow"]] * 5
    compare(ContinuationScorer(*embedded, chunk_size=16), brute, contexts, words)
    tight = ContinuationScorer(*embedded, max_kv_bytes=1_000_000)
    compare(tight, brute, contexts[::-1], words)
    assert tight.stats().dropped > 0
    assert tight.stats().bytes <= 1_100_000


def test_english_case_and_where_words_end(embedded, brute):
    from tempo_mlx.scoring.truecase import english

    options = {"truecase": english(), "trailing_space_correction": True}
    scorer = ContinuationScorer(*embedded, **options)
    exact = BruteScorer(*embedded, **options)
    compare(scorer, exact, ["he lives in", ""], [["london", "a"], ["monday"]])
