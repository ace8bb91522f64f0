"""Options that mlx-lm's users know, in every command that generates or scores, against mlx-lm."""

import importlib
import json
import sys

from tempo_mlx.cli import load_command
from tempo_mlx.errors import TempoError
from tests.tiny_folder import save_adapters, save_tiny_model

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step

#: Uses an argument of its own, and opens the answer only where it is asked to.
TEMPLATE = (
    "{% if loud %}LOUD {% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

CHAT = ("--chat", "--system-prompt", "be brief", "--chat-template-config", '{"loud": true}')


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """(folder of a model, folder of its adapters)."""
    folder = save_tiny_model(tmp_path_factory.mktemp("talking"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder, save_adapters(folder, folder.parent / "adapters")


@pytest.fixture
def stock(monkeypatch, talking):
    """What ``mlx_lm.generate`` with these arguments hands to its generation: (model, ids)."""
    module = importlib.import_module("mlx_lm.generate")

    def call(prompt, *arguments):
        found = []
        monkeypatch.setattr(
            module, "generate", lambda model, tokenizer, ids, **_: found.append((model, ids))
        )
        given = ["--model", str(talking[0]), "--prompt", prompt, *arguments]
        monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *given])
        module.main()
        return found[0]

    return call


def greedy(model, ids, n):
    return [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=n)]


def log_p(model, ids, n):
    """log P of the last n of these tokens given those before them, in one pass."""
    rows = np.array(model(mx.array([ids]))[0].astype(mx.float32), np.float64)
    rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    return sum(rows[i - 1, ids[i]] for i in range(len(ids) - n, len(ids)))


STOCK_CHAT = [each for each in CHAT if each != "--chat"]


@pytest.mark.parametrize("prefill", [None, "Well, "])
@pytest.mark.parametrize("command", ["generate", "search"])
def test_a_prompt_goes_through_the_template_as_in_mlx_lm(run, talking, stock, command, prefill):
    folder, adapters = talking
    more = () if prefill is None else ("--prefill-response", prefill)
    model, ids = stock("hi", *STOCK_CHAT, *more, "--adapter-path", str(adapters))
    common = ("--model", folder, "--adapter-path", adapters, "--threshold", 1, "-m", 4, "-o", "-")
    code, out, err = run(command, "hi", *CHAT, *more, *common)
    assert code == 0, err
    data = json.loads(out)
    tokens = data["tokens"] if command == "search" else data["paths"][0]["tokens"]
    assert data["prompt_tokens"] == list(ids)
    assert tokens == greedy(model, ids, 4)


def test_rows_of_a_file_go_through_the_template_too(run, talking, stock, tmp_path):
    folder, _ = talking
    file = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "ho"}]
    file.write_text(f'{{"prompt": "hi"}}\n{json.dumps({"prompt": messages})}\n')
    options = ("--prefill-response", "Well, ")
    arguments = (*CHAT, *options, "--model", folder, "--threshold", 1, "-m", 3)
    code, out, err = run("generate", "--prompts-file", file, *arguments)
    assert code == 0, err
    text, given = [json.loads(line)["prompt"] for line in out.splitlines()]
    _, tokenizer = mlx_lm.load(str(folder))
    assert text == tokenizer.decode(stock("hi", *STOCK_CHAT, *options)[1])
    assert given == "LOUD <user>ho\n<assistant>"


@pytest.mark.parametrize("command", ["generate", "search"])
def test_a_stop_text_ends_a_text_before_it(run, talking, stock, command):
    folder, _ = talking
    common = ("--model", folder, "--threshold", 1, "-o", "-")
    _, out, _ = run(command, "hi", *common, "-m", 6)
    whole = json.loads(out)["text"]
    stop = whole[2:4]
    code, out, err = run(command, "hi", *common, "-m", 6, "--stop", stop)
    data = json.loads(out)
    assert code == 0, err
    assert data["text"] == whole[: whole.index(stop)] and data["finish_reason"] == "stop"


def test_rollouts_of_a_search_end_at_a_stop_text(run, talking):
    folder, _ = talking
    model, tokenizer = mlx_lm.load(str(folder))
    for prompt in map(chr, range(97, 123)):
        ids = tokenizer.encode(prompt)
        tokens = greedy(model, ids, 5)
        first, stop = (tokenizer.decode([token]) for token in tokens[:2])
        if "\ufffd" not in first + stop and first != stop:
            break
    common = ("search", prompt, "--model", folder, "--threshold", 1, "-m", 9, "-s", 1, "-o", "-")
    rollout = ("--evaluation", "rollout", "--depth", 4)
    for stops, n in (((), 5), (("--stop", stop), 2)):
        _, out, _ = run(*common, *rollout, *stops)
        [child] = json.loads(out)["choices"][0]["children"]
        mean = log_p(model, [*ids, *tokens[:n]], n) / n
        assert child["value"] == pytest.approx(np.exp(mean), abs=1e-4)


def test_a_candidate_is_scored_as_the_answer(run, talking, tmp_path):
    folder, adapters = talking
    file = tmp_path / "in.jsonl"
    file.write_text('{"context": "hi ", "candidates": ["yes", " no "]}\n')
    arguments = (*CHAT, "--model", folder, "--adapter-path", adapters)
    code, out, err = run("score", file, *arguments)
    assert code == 0, err
    data = json.loads(out)
    model, tokenizer = mlx_lm.load(str(folder), adapter_path=str(adapters))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi "}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, loud=True)
    for word, score in zip(["yes", " no "], data["scores"], strict=True):
        ids = tokenizer.encode(word, add_special_tokens=False)
        assert score == pytest.approx(log_p(model, [*before, *ids], len(ids)), abs=1e-4)
    assert data["context"] == "hi "


def test_hypotheses_are_rescored_with_adapters(run, talking, tmp_path):
    folder, adapters = talking
    file = tmp_path / "in.jsonl"
    file.write_text('{"nbest": ["so it is", "so it goes"]}\n')
    arguments = ("--model", folder, "--adapter-path", adapters, "--start", "a", "--end", "no")
    _, out, err = run("rescore", file, *arguments)
    model, tokenizer = mlx_lm.load(str(folder), adapter_path=str(adapters))
    for found in json.loads(out)["nbest"]:
        ids = tokenizer.encode("a" + found["text"])
        assert found["new"] == pytest.approx(log_p(model, ids, len(ids) - 1), abs=1e-4), err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", ["hi"]),
        ("search", ["hi"]),
        ("chat", []),
        ("serve", ["--port", 0]),
        ("experiment", ["run", "parallel-attention"]),
    ],
)
def test_every_command_loads_the_adapters(run, monkeypatch, tmp_path, command, arguments):
    def load(name, adapter_path=None):
        raise TempoError(f"adapters: {adapter_path}")

    monkeypatch.setattr(f"tempo_mlx.cli.{command}.load", load)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(command, *arguments, "--adapter-path", "some/folder")
    assert code == 2 and "adapters: some/folder" in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_cache_that_forgets_is_refused_with_the_reason(run, command):
    code, _, err = run(command, "--max-kv-size", 100)
    assert code == 2 and "--max-kv-size" in err and "forgets" in err and "--kv-bits" in err
    hidden = next(p for p in load_command(command).params if p.name == "max_kv_size")
    assert hidden.hidden


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "--prefill-response", "a"), "--prefill-response has no effect"),
        (("search", "hi", "--chat-template-config", "{}"), "--chat-template-config has no effect"),
        (("generate", "hi", "--chat", "--chat-template-config", "[]"), "must be a JSON object"),
        (("score", "-", "--chat", "--separator", "x"), "--separator has no effect with --chat"),
        (("score", "-", "--system-prompt", "x"), "--system-prompt has no effect without --chat"),
    ],
)
def test_what_has_no_effect_is_refused(run, arguments, words):
    code, _, err = run(*arguments)
    assert code == 2 and words in err
