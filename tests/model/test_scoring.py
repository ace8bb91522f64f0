"""Scores of continuations by the embedded model, against every text alone through stock mlx-lm."""

import copy
import random
import re

from tempo_mlx import ContinuationScorer
from tests.brute_scorer import BruteScorer
from tests.sweeps import mostly_slow

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

#: <|endoftext|>, which the recipe puts before every text.
END_OF_DOCUMENT = 0

TEXT = """the old man walked slowly down to the river because he wanted to see whether the boats
had come back from the sea"""
STORY = TEXT.split()
BEAMS = [" ".join(STORY[:n]) for n in range(14, 24)]
WORDS = ["and", "before", "antidisestablishmentarianism", ".", "yesterday"]


@pytest.fixture(scope="module")
def brute(embedded):
    return BruteScorer(*embedded, start=END_OF_DOCUMENT)


def compare(scorer, brute, contexts, words):
    expected = np.concatenate(brute.score_continuations(contexts, words))
    found = np.concatenate(scorer.score_continuations(contexts, words))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_beams_share_one_short_sequence(embedded, brute):
    scorer = ContinuationScorer(*embedded)
    compare(scorer, brute, BEAMS[:3], [WORDS] * 3)
    assert scorer.stats().passes == 1
    before = scorer.stats().tokens_computed
    # The next word of the beam search.
    compare(scorer, brute, BEAMS[3:4], [WORDS])
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


@pytest.mark.slow
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
    bos, plain = "<|im_start|>", ContinuationScorer(*embedded, start=None)
    expected = BruteScorer(*embedded).score(TEXT, "again")
    assert abs(expected - brute.score(TEXT, "again")) > 0.01
    model, tokenizer = beginning
    model = copy.copy(model)
    model.start_of_text = None
    scorer = ContinuationScorer(model, tokenizer)
    found = scorer.score_continuations([TEXT, f"{bos}{TEXT}"], [["again"]] * 2)
    np.testing.assert_allclose(found, [[expected]] * 2, atol=1e-3)
    typed = plain.score_continuations([f"{bos}{TEXT}"], [["again"]])
    np.testing.assert_allclose(typed, [[expected]], atol=1e-3)


def test_spellings_that_truecasing_makes_alike_count_once(embedded, brute):
    from tempo_mlx.scoring.truecase import english

    scorer = ContinuationScorer(*embedded, truecase=english(), aggregate="logsumexp")
    exact = BruteScorer(*embedded, truecase=english(), start=END_OF_DOCUMENT)
    london, paris = (exact.score("he lives in", word) for word in ("london", "paris"))
    ((found, both),) = scorer.score_continuations(
        ["he lives in"], [[["london", "London", "LONDON"], ["paris", "London", "london"]]]
    )
    assert abs(found - london) < 1e-3 and abs(both - np.logaddexp(london, paris)) < 1e-3


def test_english_case_and_where_words_end(embedded, brute):
    from tempo_mlx.scoring.truecase import english

    options = {"truecase": english(), "trailing_space_correction": True}
    scorer = ContinuationScorer(*embedded, **options)
    exact = BruteScorer(*embedded, **options, start=END_OF_DOCUMENT)
    compare(scorer, exact, ["he lives in", ""], [["london", "a"], ["monday"]])


@pytest.mark.parametrize(
    ("context", "word", "separator", "nats"),
    [
        ("今天天气很", "好", " ", -14.03),
        ("今天天气很", "好", "", -3.27),
        ("It", "’s", " ", -5.64),
        ("He doesn", "'t", " ", -0.15),
        ("by 5", "%", " ", -5.67),
        # "does" has become "doesn": its log-probability is taken off.
        ("He does", "n't", " ", -2.79),
    ],
)
def test_words_are_glued_where_they_are_in_print(embedded, context, word, separator, nats):
    scorer = ContinuationScorer(*embedded, start=None, separator=separator)
    ((found,),) = scorer.score_continuations([context], [[word]])
    assert found == pytest.approx(nats, abs=0.01)


SENTENCES = [
    "He doesn't know what they've said, but he'll find out.",
    'The cats\' owner shouted: "No way!" (twice, I think).',
    "Prices grew by 5% in May… and 'cause of that we left.",
    "UNKNOWN words such as blorptfangle cost 3.50 a piece.",
    "Ünïcödé, 今天天气很好 and so on etc.",
]


@pytest.mark.parametrize("start", mostly_slow(["auto", None, 1, "Once upon a time"], ["auto"]))
def test_a_sentence_is_the_sum_of_its_words_and_its_end(embedded, start):
    """The chain rule, in two ways of asking and against stock mlx-lm."""
    model, tokenizer = embedded
    scorer = ContinuationScorer(model, tokenizer, start=start)
    ids = {"auto": [0], None: [], 1: [1]}.get(start) or (tokenizer.encode(start) if start else [])
    oracle = BruteScorer(model, tokenizer)
    for sentence in SENTENCES:
        # Without a start, the first word has no probability.
        words = re.findall(r"\w+|[^\w\s]+", sentence)
        text, rest = ("", words) if start else (words[0], words[1:])
        first, total = text, 0.0
        for word in rest:
            total += scorer.score_continuations([text], [[word]])[0][0]
            text = scorer.joined(text, word)
        total += scorer.log_p_end([text])[0]
        behind = text[len(first) :].strip()
        (whole,) = scorer.score_texts([behind], context=first, end=True)
        assert whole.logprob == pytest.approx(total, abs=1e-3)
        both = ids + tokenizer.encode(text, add_special_tokens=False)
        n = len(ids) or len(tokenizer.encode(first, add_special_tokens=False))
        rows = oracle.log_p(both)
        expected = sum(rows[i - 1, both[i]] for i in range(n, len(both)))
        expected += np.logaddexp.reduce(rows[-1, sorted(tokenizer.eos_token_ids)])
        assert whole.logprob == pytest.approx(expected, abs=1e-3)
        assert whole.words.sum() + whole.end == pytest.approx(whole.logprob, abs=1e-9)
