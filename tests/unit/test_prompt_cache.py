"""Prompts behind a text that was read already: begun with it, appended to it, or refused."""

import json
import shutil

from tempo_mlx import PositionedModel, batch_generate, generate, load
from tempo_mlx.decode.prompt_cache import PromptCache
from tempo_mlx.generation import Failure
from tests.comparison import assert_close
from tests.tiny_folder import END, save_tiny_model

import mlx.core as mx
import pytest
from tokenizers.processors import TemplateProcessing

SETTINGS = {"max_tokens": 5, "threshold": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cache") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load(folder)
    return PositionedModel.of(model), tokenizer


@pytest.fixture(scope="module")
def with_bos(folder, tmp_path_factory):
    """The same model, with a tokenizer that puts a token before every text."""
    model, tokenizer = load(shutil.copytree(folder, tmp_path_factory.mktemp("bos") / "model"))
    id = tokenizer.convert_tokens_to_ids(END)
    tokenizer._tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, id)]
    )
    assert tokenizer.encode("a")[0] == id
    return model, tokenizer


def assert_same_run(result, expected):
    assert result.lattice.prompt_tokens == expected.lattice.prompt_tokens
    one, other = result.to_dict(3), expected.to_dict(3)
    for data in (one, other):
        del data["stats"], data["prompt"]
    assert_close(one, other)


@pytest.mark.parametrize("saved", [False, True])
def test_a_prompt_that_does_not_begin_with_the_text_stands_behind_it(loaded, tmp_path, saved):
    model, tokenizer = loaded
    cache = PromptCache.read(model, tokenizer, "Once upon")
    if saved:
        cache.save(tmp_path / "c.safetensors")
        cache = PromptCache.load(tmp_path / "c.safetensors", model, tokenizer)
    ids = tokenizer.encode("Once upon")
    for prompt, tokens in (
        (" a time", tokenizer.encode("Once upon a time")),
        ("Once", tokenizer.encode("Once uponOnce")),
        ([3, 4, 5], [*ids, 3, 4, 5]),
    ):
        result = generate(model, tokenizer, prompt, prompt_cache=cache, **SETTINGS)
        assert_same_run(result, generate(model, tokenizer, tokens, **SETTINGS))
        assert result.prompt == tokenizer.decode(tokens)
        assert [s.position for s in result.lattice.steps[:2]] == [len(tokens), len(tokens) + 1]


def test_a_prompt_that_begins_with_the_text_goes_on_from_there(loaded):
    model, tokenizer = loaded
    cache = PromptCache.read(model, tokenizer, "Once upon")
    ids = tokenizer.encode("Once upon")
    for prompt in ("Once upon a time", "Once upon", [*ids, 7]):
        joined = cache.join(model, tokenizer, prompt)
        assert not joined.appended and cache.covers(joined.tokens) == min(
            len(ids), len(joined.tokens) - 1
        )
        result = generate(model, tokenizer, prompt, prompt_cache=cache, **SETTINGS)
        expected = generate(model, tokenizer, prompt, **SETTINGS)
        assert_same_run(result, expected)
        assert result.prompt == expected.prompt


def test_rows_of_a_batch_are_joined_one_by_one(loaded):
    model, tokenizer = loaded
    cache = PromptCache.read(model, tokenizer, "ab")
    prompts = ["abc", "c", "ab", [5, 6], "x" * 20, [{"role": "user", "content": "ab"}], "c"]
    batch = batch_generate(model, tokenizer, prompts, prompt_cache=cache, batch_size=3, **SETTINGS)
    wholes = ["abc", "abc", "ab", None, "ab" + "x" * 20, None, "abc"]
    for result, prompt, whole in zip(batch.results, prompts, wholes, strict=True):
        if whole is not None:
            assert_same_run(result, generate(model, tokenizer, whole, **SETTINGS))
            assert result.prompt == whole
        elif prompt == [5, 6]:
            assert result.lattice.prompt_tokens == [*tokenizer.encode("ab"), 5, 6]
        else:
            assert isinstance(result, Failure) and "conversation" in result.error


def test_no_token_for_the_beginning_of_a_text_stands_inside_it(with_bos):
    model, tokenizer = with_bos
    bos, *letters = tokenizer.encode("one two")
    cache = PromptCache.read(model, tokenizer, "one")
    result = generate(model, tokenizer, " two", prompt_cache=cache, **SETTINGS)
    assert result.lattice.prompt_tokens == [bos, *letters]
    assert result.prompt == "one two"
    result = generate(model, tokenizer, "one two", prompt_cache=cache, **SETTINGS)
    assert result.lattice.prompt_tokens == [bos, *letters] and result.prompt == "one two"


def test_a_conversation_goes_on_from_its_beginning_and_from_nothing_else(loaded):
    model, tokenizer = loaded
    first = [{"role": "user", "content": "hi"}]
    # This template ends with a prompt for the answer, so a text can be its beginning.
    cache = PromptCache.read(model, tokenizer, "user: hi\n")
    result = generate(model, tokenizer, first, prompt_cache=cache, **SETTINGS)
    assert_same_run(result, generate(model, tokenizer, first, **SETTINGS))
    for other in ("hello", "user: hi\nanswer: yes"):
        cache = PromptCache.read(model, tokenizer, other)
        with pytest.raises(ValueError, match="conversation cannot be appended") as error:
            generate(model, tokenizer, first, prompt_cache=cache, **SETTINGS)
        assert "\n" not in str(error.value)


def test_both_texts_together_must_fit_the_context(loaded):
    model, tokenizer = loaded
    cache = PromptCache.read(model, tokenizer, "a" * 200)
    assert cache.join(model, tokenizer, "b" * 55).tokens[-1] == tokenizer.encode("b")[0]
    with pytest.raises(
        ValueError, match="prompt has 256 tokens, but the model's context holds 256"
    ):
        generate(model, tokenizer, "b" * 56, prompt_cache=cache, **SETTINGS)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, tokenizer, "", prompt_cache=cache, **SETTINGS)


def test_caches_of_another_configuration_tokenizer_or_weights_are_refused(folder, tmp_path):
    model, tokenizer = load(folder)
    path = tmp_path / "c.safetensors"
    PromptCache.read(model, tokenizer, "hello").save(path)

    def changed(name, change):
        other = shutil.copytree(folder, tmp_path / name.replace(".", "-"))
        data = json.loads((other / name).read_text())
        change(data)
        (other / name).write_text(json.dumps(data))
        return load(other)

    def refused(model, tokenizer, message):
        with pytest.raises(ValueError, match=message):
            PromptCache.load(path, model, tokenizer)

    other, same = changed("config.json", lambda c: c.update(rope_theta=500.0))
    refused(other, same, "another model")
    same, other = changed("tokenizer.json", lambda t: t["added_tokens"][0].update(lstrip=True))
    refused(same, other, "another tokenizer")
    cache = PromptCache.load(path, same)
    with pytest.raises(ValueError, match="another tokenizer"):
        generate(same, other, "hello you", prompt_cache=cache)
    with pytest.raises(ValueError, match="another tokenizer"):
        batch_generate(same, other, ["hello you"], prompt_cache=cache)
    loaded = PromptCache.load(path, model, tokenizer)
    # An end of text more changes no key.
    tokenizer.add_eos_token("a")
    assert generate(model, tokenizer, "hello", prompt_cache=loaded, max_tokens=1).text
    model.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="another model"):
        generate(model, tokenizer, "hello", prompt_cache=loaded)
    model.model.norm.weight[0] -= 1
    model.set_dtype(mx.float16)
    refused(model, tokenizer, "another model")


def test_the_command_line_says_which_of_both_it_was(run, folder, tmp_path):
    cache = tmp_path / "c.safetensors"
    common = ["--model", folder, "-m", 3, "--prompt-cache", cache]
    code, _, err = run("generate", "hello", *common)
    assert code == 0 and "c.safetensors" in err and "prompt cache:" not in err
    code, out, err = run("generate", "hello you", *common)
    assert code == 0 and out.startswith("hello you")
    assert "prompt cache: the prompt begins with its text; 5 of its 5 tokens are used\n" in err
    code, out, err = run("generate", " you", *common, "-o", tmp_path / "out.json")
    assert code == 0 and out.startswith("hello you")
    assert "prompt cache: the prompt is appended to its 5 tokens\n" in err
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["prompt"] == "hello you" and len(data["prompt_tokens"]) == 9
    code, out, err = run("generate", "bye", *common, "--chat")
    assert code == 2 and out == "" and "conversation cannot be appended" in err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello you\n you\n he\n")
    code, out, err = run("generate", "--prompts-file", prompts, *common)
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["hello you", "hello you", "hello he"]
    assert_close(records[0]["steps"], records[1]["steps"])
    expected = "1 of 3 prompts begin with its text, 2 are appended to its 5 tokens"
    assert f"prompt cache: {expected}\n" in err


def test_a_cache_of_another_model_is_one_line(run, folder, tmp_path):
    cache = tmp_path / "c.safetensors"
    run("generate", "hello", "--model", folder, "-m", 1, "--prompt-cache", cache)
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello you\n")
    for which in (["hello you"], ["--prompts-file", prompts, "-o", tmp_path / "out.jsonl"]):
        code, out, err = run("generate", *which, "--model", other, "--prompt-cache", cache)
        assert code == 2 and out == "" and "another model" in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
