"""Whole texts against every text alone through stock mlx-lm."""

from tempo_mlx import ContinuationScorer, PositionedModel
from tests.brute_scorer import BruteScorer
from tests.tiny_models import tiny_model
from tests.unit.test_scoring import CONTEXTS, TOKENIZER, WORDS, PieceTokenizer

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-3

TEXTS = st.lists(WORDS, max_size=5).map(" ".join)


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def model(request):
    return tiny_model(request.param, seed=1)


class Alone:
    """Scores of whole texts by the definition."""

    def __init__(self, model):
        self.brute = BruteScorer(model, TOKENIZER)

    def log_p(self, text):
        """log P of all of a text behind the start, and of its end."""
        ids = [0, *self.brute.ids(text)]
        rows = self.brute.log_p(ids)
        return sum(rows[i - 1, ids[i]] for i in range(1, len(ids))), rows[-1, 1]

    def score(self, joined, context, end):
        total, over = self.log_p(joined)
        score = total - self.log_p(context)[0]
        if isinstance(end, str) and joined != context and joined[-1] not in end:
            ways = [sum(self.log_p(joined + mark)) - total for mark in end]
            over = np.logaddexp.reduce([over, *ways])
        return score + over if end else score


@settings(max_examples=25, phases=[Phase.generate])
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=5),
    context=CONTEXTS,
    end=st.sampled_from([False, True, ".?", "?"]),
)
def test_a_text_scores_as_alone(model, texts, context, end):
    scorer = ContinuationScorer(PositionedModel.of(model), TOKENIZER)
    alone = Alone(model)
    scores = scorer.score_texts(texts, context, end)
    for text, score in zip(texts, scores, strict=True):
        joined = scorer.joined(context, text)
        expected = alone.score(joined, context.rstrip(), end)
        assert score.logprob == score.total == pytest.approx(expected, abs=TOLERANCE)
        parts = score.words.sum() - score.replaced + (score.end or 0)
        assert parts == pytest.approx(score.logprob, abs=1e-6)
        assert (score.n_words, score.n_tokens) == (len(text.split()), len(score.tokens))
        assert len(score.words) == score.n_words


def test_text_and_end_take_one_pass():
    scorer = ContinuationScorer(tiny_model("llama", seed=1), TOKENIZER)
    scorer.score_texts(["ab ca", "ab dead", ""], end=".?")
    assert scorer.stats().passes == 1


def test_totals_are_divided_by_words_or_tokens():
    scorer = ContinuationScorer(tiny_model("llama", seed=1), TOKENIZER)
    texts = ["ab dead ca e", "", "e"]
    for unit in ("words", "tokens"):
        for score in scorer.score_texts(texts, end=True, normalize=unit):
            n = {"words": score.n_words, "tokens": score.n_tokens}[unit]
            assert score.total == pytest.approx(score.logprob / max(1, n))
    assert set(score.to_dict()) >= {"total", "words", "tokens", "end"}


def test_contexts_may_differ_and_duplicates_cost_nothing():
    scorer = ContinuationScorer(tiny_model("llama", seed=1), TOKENIZER)
    pairs = scorer.score_texts(["a b", "a b", "a b"], context=["e", "dead", "e"])
    assert pairs[0] is pairs[2] and pairs[0].total != pairs[1].total
    assert pairs[1].total == scorer.score_texts(["a b"], context="dead")[0].total


def test_an_end_behind_a_cut_context():
    model = tiny_model("llama", seed=1)
    scorer = ContinuationScorer(model, TOKENIZER, max_context_tokens=3)
    context, text = "a b c d e a e", "ca e"
    (found,) = scorer.score_texts([text], context, end="?")
    brute = BruteScorer(model, TOKENIZER, max_context_tokens=3)
    head = brute.cut([0, *brute.ids(context)])
    own = brute.ids(f"{context} {text}")[len(brute.ids(context)) :]
    marked = brute.ids(f"{context} {text}?")[len(brute.ids(context)) :]
    plain = brute.sum(head, own)
    ways = [ids_end(brute, head, ids) - plain for ids in (own, marked)]
    assert found.logprob == pytest.approx(plain + np.logaddexp.reduce(ways), abs=TOLERANCE)


def ids_end(brute, head, ids):
    return brute.sum(head, ids) + brute.log_p(head + ids)[-1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a"}, "texts must be a list"),
        ({"texts": [3]}, r"texts\[0\] must be a text"),
        ({"texts": ["a"], "end": ",."}, "end must be True, False or marks"),
        ({"texts": ["a"], "end": ""}, "end must be True, False or marks"),
        ({"texts": ["a"], "normalize": "length"}, "normalize must be one of words, tokens"),
        ({"texts": ["a"], "context": ["b", "c"]}, "one for each of 1 texts, got 2"),
    ],
)
def test_what_cannot_be_scored_is_named(arguments, message):
    scorer = ContinuationScorer(tiny_model("llama", seed=1), TOKENIZER)
    with pytest.raises(ValueError, match=message):
        scorer.score_texts(**arguments)


@pytest.mark.parametrize("start", [True, "", 10_000, [], [1, "a"], 1.5])
def test_a_start_is_tokens_of_the_model(start):
    with pytest.raises(ValueError, match="start must be a text, token ids in"):
        ContinuationScorer(tiny_model("llama", seed=1), TOKENIZER, start=start)


def test_a_start_stands_before_every_context_once():
    model = tiny_model("llama", seed=1)
    brute = BruteScorer(model, PieceTokenizer())
    for start, ids in ((1, [1]), ("ab", brute.ids("ab")), ([1, 0, 1], [1, 0, 1]), ("auto", [0])):
        scorer = ContinuationScorer(model, TOKENIZER, start=start)
        for context in ("", "ca"):
            (found,) = scorer.score_texts(["dead"], context)
            before = ids + brute.ids(context)
            word = brute.ids(f"{context} dead".strip())[len(brute.ids(context)) :]
            assert found.total == pytest.approx(brute.sum(before, word), abs=TOLERANCE)
    # A text that begins with it has it already.
    scorer = ContinuationScorer(model, TOKENIZER, start="ab")
    whole, rest = scorer.score_texts(["dead", "ab dead"], ["ab", ""])
    assert whole.total == pytest.approx(rest.total, abs=1e-6)
