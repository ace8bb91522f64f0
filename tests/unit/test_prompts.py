"""A prompt is text, token ids or chat messages; anything else is refused with a reason."""

from collections import UserDict
from types import SimpleNamespace

from tempo_mlx import ContinuationScorer, PromptCache, batch_generate, generate, search
from tempo_mlx.errors import TempoError
from tempo_mlx.generation import Failure
from tempo_mlx.models import PlainModel, PositionedModel
from tempo_mlx.text.vocabulary import encode_prompt
from tempo_mlx.weights import load
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest

#: Refuses a system message and roles that do not take turns, as templates of real models do.
STRICT = """
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate') }}
{%- endif -%}
{{ m['role'] }}: {{ m['content'] | trim }};
{%- endfor -%}answer:"""

#: Writes the roles that it knows and passes over the others.
DEAF = """
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}Q: {{ m['content'] }}{%- endif -%}
{%- if m['role'] == 'assistant' -%}A: {{ m['content'] }}{%- endif -%}
{%- endfor -%}A:"""


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture
def model():
    """All of a model that a prompt is compared with."""
    return SimpleNamespace(vocabulary_size=300, context_length=100)


@pytest.fixture
def tokenizer(loaded):
    _, tokenizer = loaded
    before = tokenizer.chat_template
    yield tokenizer
    tokenizer._tokenizer.chat_template = before


def user(content):
    return {"role": "user", "content": content}


def test_integers_are_token_ids_whatever_holds_them(tokenizer, model):
    for prompt in (
        [3, 0, 7],
        (3, 0, 7),
        np.array([3, 0, 7]),
        np.array([3, 0, 7], np.uint8),
        [np.int64(3), np.int32(0), 7],
        mx.array([3, 0, 7]),
        [mx.array(3), 0, mx.array(7)],
    ):
        ids = encode_prompt(tokenizer, prompt, model)
        assert ids == [3, 0, 7] and all(type(id) is int for id in ids)
    assert encode_prompt(tokenizer, range(4), model) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, ["text, token ids or chat messages", "None"]),
        (5, ["text, token ids or chat messages", "5"]),
        (b"abc", ["text, token ids or chat messages", "b'abc'", "decode"]),
        (bytearray(b"abc"), ["decode"]),
        ({1, 2}, ["text, token ids or chat messages"]),
        ((id for id in (1, 2)), ["text, token ids or chat messages"]),
        ("", ["empty"]),
        ([], ["empty"]),
        ((), ["empty"]),
        (np.array([], int), ["empty"]),
        ("caf\udce9", ["prompt is not Unicode text", "character 4"]),
        (["The cat", "The dog"], ["'The cat'", "batch_generate"]),
        ([[1, 2], [3]], ["[1, 2]", "batch_generate"]),
        (np.array([[1, 2], [3, 4]]), ["[1, 2]", "batch_generate"]),
        ([1.7, 2.2], ["prompt[0] must be a token id", "1.7"]),
        ([1, 2.0], ["prompt[1] must be a token id", "2.0"]),
        (np.array([1.0, 2.0]), ["prompt[0]", "1.0"]),
        (mx.array([1.0]), ["prompt[0]", "1.0"]),
        ([True, False], ["prompt[0]", "True"]),
        (np.array([True]), ["prompt[0]", "True"]),
        (mx.array([True]), ["prompt[0]", "True"]),
        ([1, None], ["prompt[1]", "None"]),
        ([1, "a"], ["'a'"]),
        (np.array(3), ["text, token ids or chat messages", "3"]),
        ([1, 300], ["token id 300", "[0, 300)"]),
        ([-1], ["token id -1", "[0, 300)"]),
        ([10**30], ["token id 1000", "[0, 300)"]),
        ([10**5000], ["[0, 300)"]),
        ([1] * 100, ["100 tokens", "context holds 100"]),
        ("x" * 100, ["100 tokens", "context holds 100"]),
        ({"role": "user", "content": "Hi"}, ["one chat message", "list of messages"]),
        ([{}], ["prompt[0] needs a role"]),
        ([{"content": "Hi"}], ["prompt[0] needs a role"]),
        ([{"role": None, "content": "Hi"}], ["prompt[0] needs a role", "None"]),
        ([{"role": 3, "content": "Hi"}], ["prompt[0] needs a role", "3"]),
        ([{"role": "", "content": "Hi"}], ["prompt[0] needs a role"]),
        ([{"role": "user"}], ["prompt[0] has no content"]),
        ([user("Hi"), user(None)], ["prompt[1].content", "None"]),
        ([user(5)], ["prompt[0].content", "5"]),
        ([user({})], ["prompt[0].content", "{}"]),
        ([user([])], ["prompt[0].content", "[]"]),
        ([user(["Hi"])], ["prompt[0].content[0]", "'Hi'"]),
        ([user([{"type": "text"}])], ["prompt[0].content[0]", '"text": "..."']),
        ([user([{"type": "text", "text": 3}])], ["prompt[0].content[0]", "3"]),
        (
            [user([{"type": "text", "text": "a"}, {"type": "image", "url": "x"}])],
            ["prompt[0].content[1]", "'image'", "only parts of type 'text'"],
        ),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], ["'image_url'"]),
        ([user("caf\udce9")], ["prompt[0].content is not Unicode text"]),
        ([{"role": "us\udce9r", "content": "Hi"}], ["not Unicode text"]),
        ([user("Hi"), "Hello"], ["prompt[1] must be a chat message", "'Hello'"]),
        ([user("Hi"), 5], ["prompt[1] must be a chat message", "5"]),
        ([1, user("Hi")], ["prompt[1] must be a token id"]),
    ],
)
def test_invalid_prompts_are_refused_with_a_reason(tokenizer, model, prompt, words):
    with pytest.raises(TempoError) as caught:
        encode_prompt(tokenizer, prompt, model)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_text_parts_are_joined(tokenizer, model):
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    assert encode_prompt(tokenizer, [user(parts)], model) == encode_prompt(
        tokenizer, [user("Good day")], model
    )
    given = user(parts)
    encode_prompt(tokenizer, [given], model)
    assert given == user(parts)
    assert encode_prompt(tokenizer, [UserDict(user("a"))], model) == encode_prompt(
        tokenizer, [user("a")], model
    )


def test_a_message_with_tool_calls_needs_no_content(tokenizer, model):
    tokenizer._tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls[0].name }};{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    ids = encode_prompt(tokenizer, [user("time?"), call], model)
    assert tokenizer.decode(ids) == "user:time?;assistant:clock;"


def test_errors_of_the_template_are_reported_in_one_line(tokenizer, model):
    tokenizer._tokenizer.chat_template = STRICT
    ids = encode_prompt(tokenizer, [user(" a "), {"role": "assistant", "content": "b"}], model)
    assert tokenizer.decode(ids) == "user: a;assistant: b;answer:"
    system = {"role": "system", "content": "Be kind."}
    for messages, why in (
        ([system, user("a")], "System role not supported"),
        ([user("a"), user("b")], "Roles must alternate"),
    ):
        with pytest.raises(TempoError, match=f"chat template refuses the messages: {why}"):
            encode_prompt(tokenizer, messages, model)
    tokenizer._tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(TempoError, match="chat template refuses the messages: can only conc"):
        encode_prompt(tokenizer, [user("a")], model)
    tokenizer._tokenizer.chat_template = "{{ messages[0].name.first }}"
    with pytest.raises(TempoError, match="chat template refuses the messages: .*name"):
        encode_prompt(tokenizer, [user("a")], model)


@pytest.mark.parametrize("role", ["system", "tool", "narrator"])
def test_a_message_that_the_template_ignores_is_refused(tokenizer, model, role):
    tokenizer._tokenizer.chat_template = DEAF
    known = [user("a"), {"role": "assistant", "content": "b"}, user("")]
    assert tokenizer.decode(encode_prompt(tokenizer, known, model)) == "Q: aA: bQ: A:"
    with pytest.raises(TempoError, match=rf"prompt\[1\] is ignored .* role '{role}'"):
        encode_prompt(tokenizer, [user("a"), {"role": role, "content": "b"}], model)


def test_chat_needs_a_template(model):
    with pytest.raises(TempoError, match="no chat template"):
        encode_prompt(TinyTokenizer(9), [user("a")], model)


def test_text_of_tokens_that_the_embedding_lacks_is_refused(folder):
    model, tokenizer = load(folder)
    size = PositionedModel.of(model).vocabulary_size
    tokenizer._tokenizer.add_tokens(["<new>"])
    assert len(tokenizer) == size + 1 and tokenizer.encode("<new>") == [size]
    message = rf"token id {size}, but the model's vocabulary is \[0, {size}\)"
    for prompt in ("a<new>b", [size], [user("<new>")]):
        for function in (generate, search, PromptCache.read):
            with pytest.raises(TempoError, match=message):
                function(model, tokenizer, prompt)
        (failure,) = batch_generate(model, tokenizer, [prompt]).results
        assert isinstance(failure, Failure) and str(size) in failure.error
    scorer = ContinuationScorer(model, tokenizer)
    with pytest.raises(TempoError, match=rf"candidate_words\[0\]\[1\]: .*token id {size}"):
        scorer.score_continuations(["a"], [["b", "<new>"]])
    with pytest.raises(TempoError, match=rf"contexts\[0\]: .*token id {size}"):
        scorer.log_p_end(["<new>"])


def test_tokens_that_the_model_lacks_neither_follow_a_word_nor_end_a_text(folder):
    model, tokenizer = load(folder)
    before = ContinuationScorer(model, tokenizer, trailing_space_correction=True)
    expected = before.score_continuations(["a b", ""], [["c"], ["d"]]), before.log_p_end(["a"])
    tokenizer._tokenizer.add_tokens([" new", ", newer"])
    tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, len(tokenizer) - 1, 10**6}
    after = ContinuationScorer(model, tokenizer, trailing_space_correction=True)
    assert (after.score_continuations(["a b", ""], [["c"], ["d"]]), after.log_p_end(["a"])) == (
        expected
    )


def test_ids_without_text_are_accepted_if_the_embedding_has_them():
    model = tiny_model("llama", vocab_size=200)
    tokenizer = TinyTokenizer(9)
    assert PositionedModel.of(model).vocabulary_size == 200
    assert PlainModel(model).vocabulary_size == 200
    assert encode_prompt(tokenizer, [150], PlainModel(model)) == [150]
    with pytest.raises(TempoError, match=r"token id 200, .*\[0, 200\)"):
        generate(model, tokenizer, [200])
    with pytest.raises(TempoError, match=r"token id 200, .*\[0, 200\)"):
        generate(model, tokenizer, [200], visibility="tree", branching="replicate")


def test_a_bad_prompt_fails_alone(loaded):
    model, tokenizer = loaded
    bad = [None, b"abc", "caf\udce9", [1.5], np.array([0.5]), [user(None)], {}, 7, ""]
    batch = batch_generate(model, tokenizer, ["ab", *bad, "ba"], max_tokens=2, threshold=1.0)
    first, *failed, last = batch.results
    assert first.text == generate(model, tokenizer, "ab", max_tokens=2, threshold=1.0).text
    assert last.text == generate(model, tokenizer, "ba", max_tokens=2, threshold=1.0).text
    assert all(isinstance(each, Failure) for each in failed) and batch.status.failed == len(bad)
    shown = [each.to_dict()["prompt"] for each in failed]
    assert shown[:5] == [None, "b'abc'", "caf\udce9", [1.5], [0.5]]


def test_anything_but_a_list_of_prompts_is_refused(loaded):
    model, tokenizer = loaded
    for prompts in ("ab", b"ab", 5, None, {"a": 1}):
        with pytest.raises(TempoError, match="prompts must be a list of prompts"):
            batch_generate(model, tokenizer, prompts)
    for settings in (5, {"threshold": 0.5}, [5]):
        with pytest.raises(TempoError, match="settings must be Settings"):
            batch_generate(model, tokenizer, ["a"], settings)


CALLS = [
    lambda model, tokenizer: generate(model, tokenizer, "a", max_tokens=1),
    lambda model, tokenizer: generate(
        model, tokenizer, "a", max_tokens=1, visibility="tree", branching="replicate"
    ),
    lambda model, tokenizer: batch_generate(model, tokenizer, ["a"], max_tokens=1),
    lambda model, tokenizer: search(model, tokenizer, "a", max_tokens=1),
    lambda model, tokenizer: PromptCache.read(model, tokenizer, "a"),
    ContinuationScorer,
]


@pytest.mark.parametrize("call", CALLS)
def test_swapped_or_missing_models_and_tokenizers_are_named(loaded, call):
    model, tokenizer = loaded
    call(model, tokenizer)
    for args, words in (
        ((tokenizer, model), "model must be .*TokenizerWrapper; model and tokenizer are swapped"),
        ((loaded, tokenizer), "model must be .* got tuple"),
        ((None, tokenizer), "model must be .* got NoneType"),
        ((model, None), "tokenizer must be .* got NoneType"),
        ((model, model), "tokenizer must be .* got Model"),
        ((model, tokenizer._tokenizer), "tokenizer must be mlx-lm's tokenizer wrapper"),
    ):
        with pytest.raises(TempoError, match=words):
            call(*args)


@pytest.mark.parametrize("given", [[], {}, "cache", 3])
def test_a_prompt_cache_is_one_of_ours(loaded, given):
    model, tokenizer = loaded
    with pytest.raises(TempoError, match="prompt_cache must be a PromptCache"):
        generate(model, tokenizer, "a", prompt_cache=given)
    with pytest.raises(TempoError, match="prompt_cache must be a PromptCache"):
        batch_generate(model, tokenizer, ["a"], prompt_cache=given)
