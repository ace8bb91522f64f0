"""Texts of the embedded model whose characters are split over tokens, beside mlx-lm's own."""

from tempo_mlx import generate
from tempo_mlx.text.printable import spelled
from tests.sweeps import mostly_slow

import mlx_lm
import pytest

PROMPTS = ["今天天气很好，我们去", "Emoji party: 😏😐", "สวัสดีครับ วันนี้", "안녕하세요, 오늘은"]


@pytest.mark.parametrize("prompt", mostly_slow(PROMPTS, PROMPTS[:1]))
def test_greedy_text_is_that_of_mlx_lm_without_an_unfinished_character(embedded, prompt):
    model, tokenizer = embedded
    whole = None
    for max_tokens in (12, 11):
        result = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=max_tokens)
        stock = mlx_lm.generate(
            model, tokenizer, tokenizer.encode(prompt), max_tokens=max_tokens, verbose=False
        )
        # mlx-lm leaves out a space at the beginning.
        assert result.text.removeprefix(" ") == stock.rstrip("\ufffd")
        assert "\ufffd" not in result.text
        assert whole is None or whole.startswith(result.text)
        whole = result.text
        raw = b"".join(bytes(t["bytes"]) for s in result.to_dict()["steps"] for t in s["tokens"])
        assert raw.decode(errors="ignore") == result.text


@pytest.mark.parametrize(
    "visibility", mostly_slow(["recombined", "isolated", "tree"], ["recombined", "isolated"])
)
def test_sets_show_bytes_and_their_paths_are_texts(embedded, visibility):
    model, tokenizer = embedded
    result = generate(
        model, tokenizer, PROMPTS[0], threshold=0.05, max_tokens=8, visibility=visibility
    )
    texts = {token.text for step in result.lattice.steps for token in step.tokens}
    assert any(text.startswith("⟨") for text in texts)
    assert not any("\ufffd" in text for text in texts)
    for path in result.paths(3):
        raw = b"".join(result.vocabulary.bytes_of(id) for id in path.tokens)
        assert path.text == raw.decode(errors="ignore") and spelled(raw).startswith(path.text)


def test_a_stop_of_split_characters_ends_a_run(embedded):
    model, tokenizer = embedded
    run = generate(model, tokenizer, "Emoji: 😏😐", threshold=1.0, max_tokens=12, stop=("😐",))
    free = generate(model, tokenizer, "Emoji: 😏😐", threshold=1.0, max_tokens=12)
    assert "😐" in free.text and run.text == free.text.split("😐")[0]
    assert run.finish_reason == "stop"


@pytest.mark.slow
def test_stops_are_looked_for_in_the_best_path(embedded):
    """In merged sets the argmax tokens are no text: " in the" is on the best path only."""
    model, tokenizer = embedded
    prompt = "Once upon a time, there was a"
    settings = {"threshold": 0.1, "max_tokens": 10, "visibility": "isolated"}
    free = generate(model, tokenizer, prompt, **settings)
    argmax = "".join(step.tokens[0].text for step in free.lattice.steps)
    stop = next(
        free.text[i : i + 7]
        for i in range(len(free.text) - 7)
        if free.text[i : i + 7] not in argmax
    )
    run = generate(model, tokenizer, prompt, stop=(stop,), **settings)
    assert run.finish_reason == "stop" and run.text == free.text.split(stop)[0]
    # What only the argmax tokens spell stops nothing.
    stop = next(
        argmax[i : i + 9] for i in range(len(argmax) - 9) if argmax[i : i + 9] not in free.text
    )
    run = generate(model, tokenizer, prompt, stop=(stop,), **settings)
    assert (run.finish_reason, run.text) == (free.finish_reason, free.text)
