"""A conversation is read once: what the cache holds of it is exact, and is not read again."""

import json
from dataclasses import replace

from tempo_mlx import PositionedModel, Settings, load
from tempo_mlx.conversation import Conversation
from tempo_mlx.errors import TempoError
from tempo_mlx.text.chat import encode_chat
from tests.comparison import assert_close
from tests.tiny_folder import save_tiny_model
from tests.tiny_models import tiny_model

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.sample_utils import make_logits_processors

#: An answer is written as it was begun.
TEMPLATE = """
{%- for m in messages -%}{{ m['role'] }}:{{ m['content'] }};{%- endfor -%}
{%- if add_generation_prompt -%}assistant:{%- endif -%}"""

#: Bytes that are no letters are not text, and would be other tokens once they have been one.
LETTERS = {i: -50.0 for i in range(257) if not 64 <= i < 90}
#: No probability is as near to the threshold as rounding moves it: 0.03 has one, 1e-9 above.
SETTINGS = Settings(max_tokens=6, threshold=0.0295, logit_bias=LETTERS)
PLAIN = replace(SETTINGS, threshold=1.0)
WINDOWED, RECURRENT = "gemma3_text", "qwen3_next"


@pytest.fixture(scope="module")
def llama(folder):
    return load(folder, tokenizer_config={"chat_template": TEMPLATE})


@pytest.fixture
def passed(monkeypatch):
    """Tokens that went through a model, in a list of one number."""
    count = [0]
    forward = PositionedModel.__call__

    def counted(self, tokens, *arguments, **options):
        count[0] += tokens.size
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(PositionedModel, "__call__", counted)
    return count


def say(conversation, text):
    for _ in conversation.ask(text):
        pass
    return conversation.turns[-1].answer


def fresh(conversation, text):
    """The same answer by a conversation that has read nothing yet."""
    other = Conversation(conversation.model, conversation.tokenizer, conversation.settings)
    other.system, other.template = conversation.system, conversation.template
    other.turns = list(conversation.turns)
    say(other, text)
    assert other.reading.kept == 0
    return other.turns[-1].result


def check_next(conversation, text, passed=None):
    """The next answer is that of a fresh conversation; returns how much was kept."""
    expected = fresh(conversation, text)
    if passed is not None:
        passed[0] = 0
    say(conversation, text)
    found = conversation.turns[-1].result
    assert found.lattice.prompt_tokens == expected.lattice.prompt_tokens
    assert_close(found.lattice.steps_to_dict(), expected.lattice.steps_to_dict())
    reading = conversation.reading
    assert reading.read + reading.kept == len(found.lattice.prompt_tokens)
    return reading


def of(name, tokenizer, **overrides):
    ends = {"vocab_size": len(tokenizer)}
    return tiny_model(name, seed=2, **ends, **overrides)


@pytest.mark.parametrize("visibility", ["recombined", "tree", "isolated", "visible", "hidden"])
def test_later_answers_are_those_of_a_fresh_reading(llama, visibility):
    model, tokenizer = llama
    settings = replace(SETTINGS, visibility=visibility)
    conversation = Conversation(model, tokenizer, settings, system="Be short.")
    say(conversation, "one")
    assert conversation.reading.kept == 0
    first = conversation.turns[-1].result.lattice
    reading = check_next(conversation, "two")
    answer = conversation.turns[0].path.tokens
    assert reading.kept >= len(first.prompt_tokens)
    if visibility in ("recombined", "tree"):
        # The last token was selected and not appended; the end of the prompt is always read.
        assert reading.kept >= len(first.prompt_tokens) + len(answer) - 1
    check_next(conversation, "three")


def test_the_numbers_are_what_went_through_the_model(llama, passed):
    model, tokenizer = llama
    conversation = Conversation(model, tokenizer, replace(PLAIN, max_tokens=1))
    say(conversation, "one")
    passed[0] = 0
    say(conversation, "two")
    # A single step selects from the prompt's last token: nothing else is appended.
    assert passed[0] == conversation.reading.read
    assert conversation.reading.kept > 0


def test_threshold_1_gives_the_text_of_stock_mlx_lm_on_the_whole_conversation(llama):
    model, tokenizer = llama
    processors = make_logits_processors(LETTERS)
    conversation = Conversation(model, tokenizer, PLAIN)
    for text in ("one", "two", "three"):
        messages = [*conversation.messages(), {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        expected = [
            response.token
            for response in mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=6, logits_processors=processors
            )
            if response.token not in tokenizer.eos_token_ids
        ]
        say(conversation, text)
        assert conversation.turns[-1].path.tokens == expected
    assert conversation.reading.kept > conversation.reading.read


@pytest.mark.parametrize("visibility", ["recombined", "tree", "isolated"])
def test_a_picked_path_goes_on_from_the_cache(llama, visibility):
    model, tokenizer = llama
    settings = replace(SETTINGS, visibility=visibility)
    conversation = Conversation(model, tokenizer, settings)
    say(conversation, "one")
    paths = conversation.paths()
    assert len(paths) > 2
    assert conversation.pick(3) == paths[2]
    assert conversation.messages()[-1]["content"] == paths[2].text
    reading = check_next(conversation, "two")
    assert reading.kept >= len(conversation.turns[0].result.lattice.prompt_tokens)
    with pytest.raises(TempoError, match="pick"):
        conversation.pick(9)


def test_what_is_undone_is_cut_back(llama):
    conversation = Conversation(*llama, SETTINGS)
    say(conversation, "one")
    say(conversation, "two")
    assert conversation.undo().user == "two"
    reading = check_next(conversation, "other")
    first = conversation.turns[0].result.lattice
    assert reading.kept > len(first.prompt_tokens)
    conversation.undo()
    conversation.undo()
    with pytest.raises(TempoError, match="no answer yet"):
        conversation.undo()


def test_an_answer_that_was_stopped_is_kept_and_can_go_on(llama):
    model, tokenizer = llama
    conversation = Conversation(model, tokenizer, PLAIN)
    whole = say(conversation, "one")
    conversation.undo()
    for response in conversation.ask("one"):
        if response.step.step == 2:
            conversation.stop()
    turn = conversation.turns[-1]
    assert turn.result.finish_reason == "interrupted" and len(turn.ids) == 3
    conversation.settings = replace(PLAIN, max_tokens=3)
    for _ in conversation.go_on():
        pass
    assert conversation.turns[-1].answer == whole and len(conversation.turns) == 1
    assert conversation.reading.read == 1
    conversation.settings = SETTINGS
    check_next(conversation, "two")


@pytest.mark.parametrize("visibility", ["recombined", "isolated"])
def test_an_interrupted_set_counts(llama, visibility):
    settings = replace(SETTINGS, visibility=visibility)
    conversation = Conversation(*llama, settings)
    responses = conversation.ask("one")
    for _ in range(3):
        next(responses)
    responses.close()
    assert len(conversation.turns) == 1 and conversation.turns[0].answer
    check_next(conversation, "two")


def test_nothing_is_recorded_before_the_first_step(llama):
    conversation = Conversation(*llama, Settings(max_tokens=2, prefill_step_size=4))
    responses = conversation.ask("one")
    conversation._while_reading = lambda done, total: conversation.stop()
    with pytest.raises(TempoError):
        conversation.paths()
    responses.close()
    assert conversation.turns == []


def test_sliding_windows_are_cut_back(llama):
    tokenizer = llama[1]
    model = of(WINDOWED, tokenizer, sliding_window=8)
    conversation = Conversation(model, tokenizer, SETTINGS)
    say(conversation, "one")
    say(conversation, "two")
    conversation.undo()
    reading = check_next(conversation, "other")
    assert reading.kept > 8 and reading.reread_because is None


@pytest.mark.parametrize("settings", [SETTINGS, PLAIN])
def test_recurrent_states_go_on_and_are_read_anew_where_they_cannot_be_cut(llama, settings):
    tokenizer = llama[1]
    conversation = Conversation(of(RECURRENT, tokenizer), tokenizer, settings)
    say(conversation, "one")
    first = conversation.turns[0].result.lattice
    reading = check_next(conversation, "two")
    assert reading.kept >= len(first.prompt_tokens) and reading.reread_because is None
    conversation.undo()
    reading = check_next(conversation, "other")
    assert reading.kept == 0 and "cannot be cut back" in reading.reread_because


def test_a_picked_path_of_a_recurrent_model_goes_on_from_its_state(llama):
    tokenizer = llama[1]
    conversation = Conversation(of(RECURRENT, tokenizer), tokenizer, SETTINGS)
    say(conversation, "one")
    conversation.pick(2)
    reading = check_next(conversation, "two")
    assert reading.kept >= len(conversation.turns[0].result.lattice.prompt_tokens)


def test_without_a_template_the_text_goes_on(llama):
    model, tokenizer = llama
    conversation = Conversation(model, tokenizer, PLAIN, template=False)
    answer = say(conversation, "ab")
    say(conversation, " cd")
    tokens = conversation.turns[-1].result.lattice.prompt_tokens
    assert tokens == tokenizer.encode("ab" + answer + " cd")
    assert conversation.reading.kept > 2


def test_a_model_without_a_template_is_refused_in_a_line(tmp_path):
    folder = save_tiny_model(tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    model, tokenizer = load(folder)
    with pytest.raises(TempoError, match="--no-chat"):
        Conversation(model, tokenizer)
    assert say(Conversation(model, tokenizer, PLAIN, template=False), "ab")


def test_the_template_gets_its_arguments(llama):
    tokenizer = llama[1]
    messages = [{"role": "user", "content": "a"}]
    begun = [*messages, {"role": "assistant", "content": "Well"}]
    config = {"continue_final_message": True, "add_generation_prompt": False}
    assert tokenizer.decode(encode_chat(tokenizer, messages)).endswith("assistant:")
    assert tokenizer.decode(encode_chat(tokenizer, begun, config)) == "user:a;assistant:Well"


def test_the_last_set_and_the_record(llama):
    conversation = Conversation(*llama, SETTINGS)
    say(conversation, "one")
    step = conversation.last_set()
    assert step is not None and len(step.tokens) + len(step.endings) > 1
    data = json.loads(json.dumps(conversation.to_dict()))
    assert [m["role"] for m in data["messages"]] == ["user", "assistant"]
    assert data["answers"][0]["text"] == conversation.turns[0].answer
    mx.eval(mx.zeros(1))
