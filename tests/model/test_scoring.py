"""Scores of continuations by the embedded model, against every text alone through stock mlx-lm."""

import copy
import random

from tempo_mlx import ContinuationScorer
from tests.brute_scorer import BruteScorer

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

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


@pytest.fixture(scope="module")
def beginning(embedded):
    """The tokenizer of the embedded model, which puts its BOS token before every text."""
    model, tokenizer = embedded
    changed = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    changed._tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert changed.encode("sea") == [1, *tokenizer.encode("sea")]
    return model, changed


def test_a_bos_token_stands_before_a_text_once(embedded, beginning, brute):
    """Typed or not, it is the one that stock mlx-lm reads when it stands in the text itself."""
    bos, plain = "<|im_start|>", ContinuationScorer(*embedded)
    expected = brute.score(f"{bos}{TEXT}", "again")
    assert abs(expected - brute.score(f"{bos}{bos}{TEXT}", "again")) > 0.01
    scorer = ContinuationScorer(*beginning)
    found = scorer.score_continuations([TEXT, f"{bos}{TEXT}"], [["again"]] * 2)
    np.testing.assert_allclose(found, [[expected]] * 2, atol=1e-3)
    typed = plain.score_continuations([f"{bos}{TEXT}"], [["again"]])
    np.testing.assert_allclose(typed, [[expected]], atol=1e-3)


def test_spellings_that_truecasing_makes_alike_count_once(embedded, brute):
    from tempo_mlx.scoring.truecase import english

    scorer = ContinuationScorer(*embedded, truecase=english(), aggregate="logsumexp")
    exact = BruteScorer(*embedded, truecase=english())
    london, paris = (exact.score("he lives in", word) for word in ("london", "paris"))
    ((found, both),) = scorer.score_continuations(
        ["he lives in"], [[["london", "London", "LONDON"], ["paris", "London", "london"]]]
    )
    assert abs(found - london) < 1e-3 and abs(both - np.logaddexp(london, paris)) < 1e-3


def test_english_case_and_where_words_end(embedded, brute):
    from tempo_mlx.scoring.truecase import english

    options = {"truecase": english(), "trailing_space_correction": True}
    scorer = ContinuationScorer(*embedded, **options)
    exact = BruteScorer(*embedded, **options)
    compare(scorer, exact, ["he lives in", ""], [["london", "a"], ["monday"]])
