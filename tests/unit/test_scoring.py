"""Scores of continuations against a scorer that runs every text alone through stock mlx-lm."""

import itertools
import random
import re

from tempo_mlx import ContinuationScorer, PositionedModel, UnsupportedModelError
from tempo_mlx.decode.decoder import CacheBudgetError
from tempo_mlx.rules.selection import NonFiniteLogitsError
from tempo_mlx.scoring.prefix_tree import NONE
from tempo_mlx.scoring.prefix_tree_scorer import PrefixTreeScorer
from tempo_mlx.text.vocabulary import encode_prompt
from tests.brute_scorer import BruteScorer
from tests.sweeps import mostly_slow
from tests.tiny_models import architectures, each_architecture, shared_model, tiny_model

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-3


class PieceTokenizer:
    """Cuts text into the longest pieces it knows; some go over the end of a word."""

    PIECES = (
        *"abcdeABCDE ,.'?",
        *(f" {letter}" for letter in "abcdeABCDE"),
        *(first + second for first, second in itertools.product("abc", repeat=2)),
        *(" ab", " abc", " dead", ",.", "..", "a,", "e'", "'a", ".'", " B", "?.", "b c"),
    )
    bos_token = None
    name_or_path = "pieces"

    def __init__(self, bos=0, adds_bos=False):
        self.pieces = {piece: 2 + i for i, piece in enumerate(dict.fromkeys(self.PIECES))}
        self.texts = {id: piece for piece, id in self.pieces.items()} | {0: "", 1: ""}
        self.bos_token_id, self.eos_token_id, self.eos_token_ids = bos, 1, {1}
        self.adds_bos = adds_bos

    def encode(self, text, add_special_tokens=True):
        ids = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        while text:
            piece = next(text[:n] for n in range(5, 0, -1) if text[:n] in self.pieces)
            ids.append(self.pieces[piece])
            text = text[len(piece) :]
        return ids

    def decode(self, ids):
        return "".join(self.texts[id] for id in ids)

    def __len__(self):
        return 2 + len(self.pieces)


TOKENIZER = PieceTokenizer()

WORDS = st.sampled_from(["a", "ab", "abc", "dead", "ca", "e", ",", ".", "'", "'a", "?", "bb", "Ab"])
CONTEXTS = st.lists(WORDS, max_size=9).map(" ".join) | st.lists(WORDS, max_size=4).map("".join)


def same(scores, expected):
    assert [len(each) for each in scores] == [len(each) for each in expected]
    np.testing.assert_allclose(np.concatenate(scores), np.concatenate(expected), atol=TOLERANCE)


#: Attention of several kinds.
NAMES = ["llama", "gemma3_text", "gemma2", "deepseek_v2"]
#: Short convolutions beside attention, gated delta rules beside attention, Mamba without attention,
#: ids of the last tokens.
RECURRENT = ["lfm2", "qwen3_next", "mamba", "longcat_flash_ngram"]
#: Attention, its windows, a state beside it and a state alone.
FEW = ["llama", "gemma3_text", "mamba"]


@pytest.fixture(scope="module", params=mostly_slow([*NAMES, *RECURRENT], FEW))
def model(request):
    return tiny_model(request.param, seed=1)


@settings(max_examples=15, phases=[Phase.generate])
@pytest.mark.usefixtures("uncompiled")
@given(
    calls=st.lists(
        st.lists(st.tuples(CONTEXTS, st.lists(WORDS, max_size=4)), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    chunk_size=st.sampled_from([1, 3, 8, 512]),
    slots=st.sampled_from([60, 10_000]),
    states=st.sampled_from([3, 8, 10_000]),
    kept=st.sampled_from([None, 3, 11]),
    correct=st.booleans(),
)
def test_scores_are_those_of_every_text_alone(
    model, calls, chunk_size, slots, states, kept, correct
):
    positioned = PositionedModel.of(model)
    slot_bytes = positioned.slot_bytes + positioned.hidden_bytes
    budget = slots * slot_bytes + states * positioned.state_bytes
    scorer = ContinuationScorer(
        positioned,
        TOKENIZER,
        weight=0.7,
        word_insertion_bonus=1.5,
        max_context_tokens=kept,
        trailing_space_correction=correct,
        chunk_size=chunk_size,
        max_kv_bytes=budget,
    )
    brute = BruteScorer(model, TOKENIZER, 0.7, 1.5, None, kept, correct)
    for call in calls:
        contexts, words = map(list, zip(*call, strict=True))
        if any(words):
            same(
                scorer.score_continuations(contexts, words),
                brute.score_continuations(contexts, words),
            )
    stats = scorer.stats()
    assert stats.bytes <= budget
    assert stats.slots * slot_bytes + stats.states * positioned.state_bytes <= stats.bytes


#: Those that stock mlx-lm cannot run on every device.
BROKEN = {"bitnet", "muse_spark", "olmo", "phi3small"}


@each_architecture(name for name in architectures() if name not in BROKEN)
def test_every_architecture_is_scored_one_way_or_the_other(name):
    model = shared_model(name)
    contexts = ["a dead", "a dead ca", "a dead ca bb", "e e", ""]
    words = [["abc", "ca"], ["bb", "."], ["abc"], ["ab", "a"], ["dead"]]
    expected = BruteScorer(model, TOKENIZER).score_continuations(contexts, words)
    scorer = ContinuationScorer(model, TOKENIZER)
    try:
        PositionedModel(model)
        method = "tree"
    except UnsupportedModelError:
        method = "full passes"
    assert scorer.stats().method == method
    same(scorer.score_continuations(contexts, words), expected)
    # Again, in another order and with a word more.
    contexts.append("a dead ca bb abc")
    words.append(["abc", "bb"])
    expected = BruteScorer(model, TOKENIZER).score_continuations(contexts, words)
    same(scorer.score_continuations(contexts[::-1], words[::-1]), expected[::-1])


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", seed=1)


def test_shared_beginnings_are_read_once(llama):
    scorer = ContinuationScorer(llama, TOKENIZER)
    contexts = ["a a a a", "a a a a a", "a a a a a a"]
    words = [["b", "c", "d"]] * 3
    scorer.score_continuations(contexts, words)
    stats = scorer.stats()
    # The start, "a" and five " a"; the words are one token each, looked up and not read.
    assert (stats.passes, stats.tokens_computed, stats.rows) == (1, 7, 3)
    assert stats.tokens_reused == 5 + 6 + 7 + 2 * (5 + 6 + 7) - 7
    scorer.score_continuations(["a a a a a a b"], [["c"]])
    assert (stats.passes, stats.tokens_computed, stats.rows) == (2, 8, 4)
    # Other words in a context that was read before take no pass.
    scorer.score_continuations(contexts, [["e"], ["d", "a"], []])
    assert (stats.passes, stats.tokens_computed, stats.rows) == (2, 8, 6)


def test_duplicates_cost_nothing(llama):
    one, many = (ContinuationScorer(llama, TOKENIZER) for _ in range(2))
    (expected,) = one.score_continuations(["ab ca"], [["dead", "abc"]])
    found = many.score_continuations(["ab ca"] * 7, [["dead", "abc", "dead"]] * 7)
    assert found == [[*expected, expected[0]]] * 7
    costs = [(s.stats().passes, s.stats().tokens_computed, s.stats().rows) for s in (one, many)]
    assert costs[0] == costs[1]


def test_unrelated_contexts_take_one_pass(llama):
    rng = random.Random(0)
    contexts = [" ".join(rng.choices(["ab", "ca", "dead", "e", "bb"], k=12)) for _ in range(20)]
    scorer = ContinuationScorer(llama, TOKENIZER)
    same(
        scorer.score_continuations(contexts, [["abc"]] * 20),
        BruteScorer(llama, TOKENIZER).score_continuations(contexts, [["abc"]] * 20),
    )
    assert scorer.stats().passes == 1


def test_what_was_used_longest_ago_is_dropped(llama):
    model = PositionedModel.of(llama)
    room = 40 * (model.slot_bytes + model.hidden_bytes)
    scorer = ContinuationScorer(model, TOKENIZER, max_kv_bytes=room)
    brute = BruteScorer(llama, TOKENIZER)
    rng = random.Random(1)
    for _ in range(15):
        contexts = [" ".join(rng.choices("abcde", k=rng.randint(1, 30))) for _ in range(4)]
        words = [["ca", "dead"]] * 4
        same(
            scorer.score_continuations(contexts, words), brute.score_continuations(contexts, words)
        )
        assert scorer.stats().slots <= 40
        assert scorer.stats().bytes <= 1.1 * room
    assert scorer.stats().dropped > 100
    with pytest.raises(CacheBudgetError, match="max_kv_bytes allows"):
        scorer.score_continuations(["a " * 60], [["b"]])
    # Nothing is lost by that but what was held.
    assert scorer.stats().slots == 0 and scorer.stats().dropped > 100
    same(scorer.score_continuations(["a b"], [["c"]]), brute.score_continuations(["a b"], [["c"]]))


def test_a_pass_copies_nothing_of_what_is_held(llama):
    scorer = ContinuationScorer(llama, TOKENIZER)
    rng = random.Random(2)
    contexts = [" ".join(rng.choices("abcde", k=60)) for _ in range(60)]
    scorer.score_continuations(contexts, [["ca"]] * 60)
    store = scorer._reader._trie.store
    assert store.capacity > store.n_slots + 9 > 3000
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    scorer.score_continuations([f"{contexts[0]} e"], [["b"]])
    assert scorer.stats().tokens_reused and store.n_slots > 3000
    assert mx.get_peak_memory() - held < store.nbytes / 20


@pytest.fixture(scope="module", params=["lfm2", "mamba"])
def recurrent(request):
    return PositionedModel(tiny_model(request.param, seed=1))


def computed(scorer, contexts, words):
    """Passes and tokens that a call takes, whose scores are those of every text alone."""
    before = scorer.stats()
    passes, tokens = before.passes, before.tokens_computed
    correct = scorer.trailing_space_correction
    brute = BruteScorer(scorer._reader.model.model, TOKENIZER, 1.0, 0.0, None, None, correct)
    same(scorer.score_continuations(contexts, words), brute.score_continuations(contexts, words))
    after = scorer.stats()
    return after.passes - passes, after.tokens_computed - tokens


def test_what_is_read_continues_the_state_of_the_token_before_it(recurrent, monkeypatch):
    """Every token is read behind its parent, or behind its parent's state."""
    rng = random.Random(3)
    single, chunks = 0, 0
    read = PrefixTreeScorer._read

    def watched(reader, nodes, rows):
        nonlocal single, chunks
        trie = reader._trie
        assert len(nodes) <= reader._chunk_size and len({*nodes.tolist()}) == len(nodes)
        parents = trie.parent[nodes]
        within = np.isin(parents, nodes)
        single, chunks = single + (not within.any()), chunks + bool(within.any())
        assert (parents[within] == nodes[np.flatnonzero(within) - 1]).all()
        sources = parents[~within]
        begins = (sources == NONE).all()
        assert begins or trie.have_states(sources).all()
        read(reader, nodes, rows)
        # One row of the model for each state.
        ends = np.setdiff1d(nodes, parents[within])
        assert trie.have_states(ends).all()
        assert not trie.have_states(np.setdiff1d(nodes, ends)).any()

    monkeypatch.setattr(PrefixTreeScorer, "_read", watched)
    for n_states in (3, 7, 40):
        budget = 90 * (recurrent.slot_bytes + recurrent.hidden_bytes)
        budget += 2 * n_states * recurrent.state_bytes
        scorer = ContinuationScorer(recurrent, TOKENIZER, chunk_size=16, max_kv_bytes=budget)
        for _ in range(5):
            contexts = [" ".join(rng.choices("abcde", k=rng.randint(1, 20))) for _ in range(6)]
            contexts += [f"{context} {rng.choice('abcde')}" for context in contexts[:3]]
            scorer.score_continuations(contexts, [["b ca e", "dead", "b ca b"]] * len(contexts))
            trie = scorer._reader._trie
            nodes = np.array([*trie._children.values()])
            held = int(trie.have_states(nodes).sum())
            assert held == scorer.stats().states <= trie.n_states
    assert single and chunks


def test_long_texts_are_read_in_chunks(recurrent):
    context = " ".join(random.Random(0).choices("abcde", k=300))
    scorer = ContinuationScorer(recurrent, TOKENIZER, chunk_size=128)
    assert computed(scorer, [context], [["b"]]) == (3, 301)
    # A word more is a token more.
    assert computed(scorer, [f"{context} e"], [["b"]]) == (1, 1)
    # Two texts of the same length side by side.
    assert computed(scorer, [f"{context} a b c", f"{context} b b c"], [["b"], ["b"]]) == (1, 6)


def test_texts_of_different_lengths_take_few_passes(recurrent):
    rng = random.Random(0)
    contexts = [
        f"{first} {' '.join(rng.choices('abcde', k=n))}"
        for first, n in zip("abcde" * 4, range(10, 30), strict=True)
    ]
    passes, tokens = computed(ContinuationScorer(recurrent, TOKENIZER), contexts, [["b"]] * 20)
    # A pass for each depth would be 31.
    assert tokens > 300 and passes <= 15


def test_a_text_that_goes_on_where_no_state_is_held(recurrent):
    scorer = ContinuationScorer(recurrent, TOKENIZER)
    assert computed(scorer, ["a b c d e"], [["b"]]) == (1, 6)
    # Its own tokens and those before it: a chunk's only state is that of its last token.
    assert computed(scorer, ["a b c b"], [["b"]])[1] == 5
    # Nothing goes on here.
    assert computed(scorer, ["a b", "a b c"], [["b", "c"], ["d"]]) == (0, 0)
    # There is a state now where texts branched.
    assert computed(scorer, ["a b c b b", "a b c b e"], [["b"], ["b"]])[1] == 2


def test_states_are_held_where_contexts_and_texts_end(recurrent):
    scorer = ContinuationScorer(recurrent, TOKENIZER)
    computed(scorer, ["a b"], [["c d e"]])
    # "b" and "d"; "e" is looked up only.
    assert scorer.stats().states == 2
    assert computed(scorer, ["a b"], [["e d e"]])[1] == 2
    assert scorer.stats().states == 3
    assert scorer.stats().bytes >= 3 * recurrent.state_bytes


def test_states_are_counted_where_slots_move_between_the_parts_of_a_chain(recurrent):
    budget = 60 * (recurrent.slot_bytes + recurrent.hidden_bytes) + 3 * recurrent.state_bytes
    scorer = ContinuationScorer(
        recurrent,
        TOKENIZER,
        trailing_space_correction=True,
        chunk_size=1,
        max_kv_bytes=budget,
    )
    for contexts, words in (
        (["a a", "a ca ca ca ?", "dead"], [["a", "bb"], ["a", "."], ["a"]]),
        (["", "a a a a ca ca ca ?"], [["a", "ab", "dead"], ["a", "ab", "."]]),
    ):
        computed(scorer, contexts, words)
        assert scorer.stats().states <= scorer._reader._trie.n_states
        assert scorer.stats().bytes <= budget


def test_no_more_states_than_there_is_room_for(recurrent):
    least = 3 * recurrent.state_bytes + recurrent.slot_bytes + recurrent.hidden_bytes
    with pytest.raises(CacheBudgetError, match=f"at least {least:,}, the bytes of 3 states"):
        ContinuationScorer(recurrent, TOKENIZER, max_kv_bytes=least - 1)
    room = least + 30 * (recurrent.slot_bytes + recurrent.hidden_bytes)
    scorer = ContinuationScorer(recurrent, TOKENIZER, max_kv_bytes=room)
    rng = random.Random(2)
    for _ in range(6):
        contexts = [" ".join(rng.choices("abcde", k=rng.randint(1, 12))) for _ in range(5)]
        computed(scorer, contexts, [["ca b", "dead"]] * 5)
        assert scorer.stats().bytes <= room
    assert scorer.stats().dropped > 0
    with pytest.raises(CacheBudgetError, match="max_kv_bytes allows .* beside recurrent states"):
        scorer.score_continuations(["a " * 60], [["b"]])
    assert (scorer.stats().slots, scorer.stats().states) == (0, 0)
    computed(scorer, ["a b"], [["c"]])


def test_words_that_change_the_tokens_of_their_context(llama):
    scorer, brute = ContinuationScorer(llama, TOKENIZER), BruteScorer(llama, TOKENIZER)
    (details,) = scorer.score_details(["b ca"], [[",", "c"]])
    # "a," is one token, so the sum begins with it.
    assert [[token.text for token in each.tokens] for each in details] == [["a,"], [" c"]]
    same([[d.score for d in details]], brute.score_continuations(["b ca"], [[",", "c"]]))
    # Not even the first token stays: it is scored as behind an empty context.
    (details,) = scorer.score_details(["e"], [["'"]])
    assert [token.text for token in details[0].tokens] == ["e'"]
    same([[details[0].score]], brute.score_continuations(["e"], [["'"]]))


def test_case_depends_on_the_word(llama):
    def truecase(text):
        return text.title() if text.endswith("a") else text

    scorer = ContinuationScorer(llama, TOKENIZER, truecase=truecase)
    brute = BruteScorer(llama, TOKENIZER, truecase=truecase)
    contexts, words = ["dead e", "dead e", "dead"], [["a", "b"], ["b", "ca"], ["e"]]
    expected = brute.score_continuations(contexts, words)
    for _ in range(2):
        same(scorer.score_continuations(contexts, words), expected)
    (details, *_) = scorer.score_details(contexts, words)
    assert [d.context for d in details] == ["Dead E", "dead e"]
    assert [d.word for d in details] == ["A", "b"]


def test_truecasing_may_change_case_only(llama):
    scorer = ContinuationScorer(llama, TOKENIZER, truecase=lambda text: text + ".")
    with pytest.raises(ValueError, match=r"candidate_words\[0\]\[0\]: truecase must change"):
        scorer.score_continuations(["a"], [["b"]])


@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_empty_context_is_what_begins_a_text(llama, adds_bos):
    tokenizer = PieceTokenizer(adds_bos=adds_bos)
    (details,) = ContinuationScorer(llama, tokenizer).score_details([""], [["ab"]])
    brute = BruteScorer(llama, tokenizer)
    assert abs(details[0].score - brute.score("", "ab")) < TOLERANCE
    assert [token.text for token in details[0].tokens] == ["ab"]


def test_an_empty_context_without_such_a_token(llama):
    tokenizer = PieceTokenizer(bos=None)
    scorer = ContinuationScorer(llama, tokenizer)
    brute = BruteScorer(llama, PieceTokenizer(bos=1))
    same(scorer.score_continuations([""], [["ab"]]), brute.score_continuations([""], [["ab"]]))
    tokenizer.eos_token_id, tokenizer.eos_token_ids = None, set()
    scorer = ContinuationScorer(llama, tokenizer)
    with pytest.raises(ValueError, match=r"candidate_words\[0\]\[0\]: no token stands before"):
        scorer.score_continuations([""], [["ab"]])
    with pytest.raises(ValueError, match=r"contexts\[0\]: a context is empty"):
        scorer.log_p_end([""])


def test_a_token_before_every_text_is_kept(llama):
    tokenizer = PieceTokenizer(adds_bos=True)
    scorer = ContinuationScorer(llama, tokenizer, max_context_tokens=3)
    log_p = BruteScorer(llama, tokenizer).log_p
    ids = tokenizer.encode("a b c d", add_special_tokens=False)
    expected = log_p([0, *ids[1:3]])[-1, ids[3]]
    assert abs(scorer.score_continuations(["a b c"], [["d"]])[0][0] - expected) < TOLERANCE


class BeginningTokenizer(PieceTokenizer):
    """Puts special tokens before every text, each of which may be typed: "<s>" and "<t>"."""

    TYPED = ("<s>", "<t>")

    def __init__(self, before):
        super().__init__()
        self.before = before

    def encode(self, text, add_special_tokens=True):
        ids = list(self.before) if add_special_tokens else []
        for part in re.split("(<.>)", text):
            ids += [self.TYPED.index(part)] if part in self.TYPED else super().encode(part, False)
        return ids


@pytest.mark.parametrize(("before", "typed"), [([0], "<s>"), ([1, 0], "<t><s>")])
@pytest.mark.parametrize("correct", [False, True])
def test_a_beginning_that_was_typed_is_not_put_there_again(llama, before, typed, correct):
    tokenizer = BeginningTokenizer(before)
    scorer = ContinuationScorer(llama, tokenizer, trailing_space_correction=correct)
    brute = BruteScorer(llama, tokenizer)
    contexts = ["dead ca", f"{typed}dead ca"]
    scores = scorer.score_continuations(contexts, [["abc", "ca"]] * 2)
    assert scores[0] == scores[1]
    ids = [*before, *tokenizer.encode("dead ca abc", False)]
    start = len(before) + len(tokenizer.encode("dead ca", False))
    rows = brute.log_p(ids)
    expected = sum(rows[i - 1, ids[i]] for i in range(start, len(ids)))
    if correct:
        expected += brute.ended(rows[-1]) - brute.ended(rows[start - 1])
    assert scores[0][0] == pytest.approx(expected, abs=TOLERANCE)
    ends = scorer.log_p_end([*contexts, "", typed])
    assert ends[0] == ends[1] == pytest.approx(rows[start - 1, 1], abs=TOLERANCE)
    assert ends[2] == ends[3] == pytest.approx(brute.log_p(before)[-1, 1], abs=TOLERANCE)
    # A word behind nothing is the text's beginning.
    assert len(set(scorer.score_continuations([""], [["ab", f"{typed}ab"]])[0])) == 1
    # A word that only looks like one is scored.
    (details,) = scorer.score_details(["dead"], [[f"{typed}ab"]])
    assert len(details[0].tokens) == len(tokenizer.encode(f" {typed}ab", False))


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_little_context_behind_a_beginning(llama, kept):
    tokenizer = BeginningTokenizer([1, 0])
    scorer = ContinuationScorer(llama, tokenizer, max_context_tokens=kept)
    ids = [tokenizer.pieces[piece] for piece in ("a", " b", " c", " d")]
    before = ids[:3][3 - max(0, kept - 2) :]
    expected = BruteScorer(llama, tokenizer).log_p([1, 0, *before])[-1, ids[3]]
    for context in ("a b c", "<t><s>a b c"):
        found = scorer.score_continuations([context], [["d"]])[0][0]
        assert found == pytest.approx(expected, abs=TOLERANCE)


def test_prompts_get_a_beginning_once(llama):
    tokenizer = BeginningTokenizer([1, 0])
    tokens = [1, 0, *tokenizer.encode("a b", False)]
    for prompt in ("a b", "<t><s>a b"):
        assert encode_prompt(tokenizer, prompt, PositionedModel.of(llama)) == tokens
    # Half of it is no beginning.
    assert encode_prompt(tokenizer, "<s>a b", PositionedModel.of(llama)) == [1, 0, 0, *tokens[2:]]


@pytest.mark.parametrize("correct", [False, True])
def test_spellings_of_the_same_tokens_count_once(llama, correct):
    given = {"aggregate": "logsumexp", "truecase": str.lower, "trailing_space_correction": correct}
    scorer = ContinuationScorer(llama, TOKENIZER, **given)
    spellings = ["ab", "ca", "Ab", " ab ", "AB", "ca"]
    ab, ca = scorer.score_continuations(["e"], [["ab", "ca"]])[0]
    ((found, alone),) = scorer.score_continuations(["e"], [[spellings, ["ab", "AB"]]])
    assert found == pytest.approx(np.logaddexp(ab, ca)) and alone == pytest.approx(ab)
    ((detail, _),) = scorer.score_details(["e"], [[spellings, "ab"]])
    assert detail.logprob == pytest.approx(found)
    assert [each.logprob for each in detail.variants] == [ab, ca, ab, ab, ab, ca]


def test_homophones(llama):
    words = ["ab", "ca", "dead"]
    each = ContinuationScorer(llama, TOKENIZER).score_continuations(["e"], [words])[0]
    for aggregate, total in (("max", max(each)), ("logsumexp", np.logaddexp.reduce(each))):
        scorer = ContinuationScorer(llama, TOKENIZER, 2.0, 0.5, aggregate=aggregate)
        ((found, single),) = scorer.score_continuations(["e"], [[words, "ab"]])
        assert found == pytest.approx(2 * total + 0.5, abs=TOLERANCE)
        assert single == pytest.approx(2 * each[0] + 0.5, abs=TOLERANCE)
        ((detail, _),) = scorer.score_details(["e"], [[words, "ab"]])
        assert detail.score == pytest.approx(found)
        assert detail.word == words[int(np.argmax(each))]
        assert [d.word for d in detail.variants] == words
        assert [d.logprob for d in detail.variants] == pytest.approx(each)


def test_details_add_up(llama):
    scorer = ContinuationScorer(llama, TOKENIZER, 0.3, -1, trailing_space_correction=True)
    contexts, words = ["ab e", ""], [["dead", "?"], ["ca"]]
    scores = scorer.score_continuations(contexts, words)
    for each, details in zip(scores, scorer.score_details(contexts, words), strict=True):
        for score, detail in zip(each, details, strict=True):
            assert detail.score == pytest.approx(score)
            total = sum(token.logprob for token in detail.tokens) + detail.boundary
            assert detail.logprob == pytest.approx(total)
            assert detail.score == pytest.approx(0.3 * total - 1)
            assert detail.to_dict()["tokens"][0]["logprob"] == detail.tokens[0].logprob


def test_the_end_of_a_text(llama):
    scorer = ContinuationScorer(llama, TOKENIZER)
    brute = BruteScorer(llama, TOKENIZER)
    texts = ["ab ca", "", "dead"]
    expected = [brute.log_p([0, *brute.ids(text)])[-1, 1] for text in texts]
    np.testing.assert_allclose(scorer.log_p_end(texts * 2), expected * 2, atol=TOLERANCE)
    assert (scorer.stats().passes, scorer.stats().rows) == (1, 3)


def test_nothing_to_score(llama):
    scorer = ContinuationScorer(llama, TOKENIZER)
    assert scorer.score_continuations([], []) == []
    assert scorer.score_continuations(["a", "b"], [[], []]) == [[], []]
    assert scorer.stats().passes == 0


@pytest.mark.parametrize(
    "contexts, words, message",
    [
        (["a"], [["b", ""]], r"candidate_words\[0\]\[1\] is empty"),
        (["a"], [["  "]], r"candidate_words\[0\]\[0\] is empty"),
        (["a", "b"], [["c"], [float("nan")]], r"candidate_words\[1\]\[0\] must be a word"),
        (["a"], [[None]], r"candidate_words\[0\]\[0\] must be a word"),
        (["a"], [[["b", 3]]], r"candidate_words\[0\]\[0\] must be a text, got 3"),
        (["a"], [[[]]], r"candidate_words\[0\]\[0\] must be a word"),
        ([float("nan")], [["b"]], r"contexts\[0\] must be a text, got nan"),
        (["a"], ["b"], r"candidate_words\[0\] must be a list, got 'b'"),
        ("a", [["b"]], "contexts must be a list"),
        (["a"], [["b"], ["c"]], "a list for each of 1 contexts, got 2"),
    ],
)
def test_what_cannot_be_scored_is_named(llama, contexts, words, message):
    with pytest.raises(ValueError, match=message):
        ContinuationScorer(llama, TOKENIZER).score_continuations(contexts, words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": float("nan")}, "weight must be finite"),
        ({"weight": "1"}, "weight must be a number"),
        ({"word_insertion_bonus": float("inf")}, "word_insertion_bonus must be finite"),
        ({"max_context_tokens": 0}, "max_context_tokens must be at least 1, got 0"),
        ({"max_context_tokens": 2.5}, "an integer of at least 1, got 2.5"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"max_kv_bytes": 10}, "max_kv_bytes must be at least .* the bytes of one token"),
        ({"aggregate": "mean"}, "aggregate must be one of max, logsumexp"),
        ({"truecase": "german"}, 'truecase must be "english" or a function'),
    ],
)
def test_arguments_out_of_range(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        ContinuationScorer(llama, TOKENIZER, **arguments)


def test_numbers_that_are_none_leave_nothing_behind(llama):
    scorer = ContinuationScorer(llama, TOKENIZER)
    head = llama.lm_head.weight
    try:
        llama.lm_head.weight = head * float("nan")
        with pytest.raises(NonFiniteLogitsError):
            scorer.score_continuations(["a b"], [["c"]])
    finally:
        llama.lm_head.weight = head
    assert scorer.stats().slots == 0
    brute = BruteScorer(llama, TOKENIZER)
    same(scorer.score_continuations(["a b"], [["c"]]), brute.score_continuations(["a b"], [["c"]]))


def test_a_text_longer_than_the_model_takes(llama):
    args, before = llama.args, llama.args.max_position_embeddings
    try:
        args.max_position_embeddings = 8
        scorer = ContinuationScorer(llama, TOKENIZER)
        with pytest.raises(ValueError, match=r"candidate_words\[0\]\[0\]: .* set max_context_tok"):
            scorer.score_continuations(["a b c d e a b c"], [["d"]])
    finally:
        args.max_position_embeddings = before
