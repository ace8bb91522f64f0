"""Text that a grammar allows: every path is valid, and the sets show what the grammar leaves."""

import json

from tempo_mlx import Settings, batch_generate, generate, search
from tempo_mlx.rules.grammar import Grammar, compiled
from tests.sweeps import mostly_slow

import mlx.core as mx
import numpy as np
import pytest
import regex
from mlx_lm.generate import generate_step

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
YEAR = r" (19|20)[0-9]{2}(, (19|20)[0-9]{2}){1,2}\."
LARK = """
start: " " animal (" and " animal)? "."
animal: "the cat" | "the dog" | "no cow"
"""


def is_person(text):
    value = json.loads(text)
    return set(value) == {"name", "age"} and isinstance(value["age"], int)


def is_year(text):
    return regex.fullmatch(YEAR, text) is not None


@pytest.mark.parametrize("visibility", mostly_slow(["recombined", "tree"], ["recombined"]))
def test_every_path_follows_the_grammar_and_sets_show_alternatives(embedded, visibility):
    settings = {"threshold": 0.05, "visibility": visibility, "beam_width": 5}
    cases = [
        ("Alice is a person: ", {"json_schema": PERSON}, 40, is_person),
        ("The years were", {"regex": YEAR}, 20, is_year),
        ("There were", {"grammar": LARK}, 12, lambda text: text.endswith(".")),
    ]
    for prompt, grammar, max_tokens, valid in cases:
        result = generate(*embedded, prompt, max_tokens=max_tokens, **settings, **grammar)
        assert result.finish_reason == "stop"
        assert all(valid(path.text) for path in result.paths(5)), result.paths(5)
        assert valid(result.text)
        assert max(len(step.tokens) for step in result.lattice.steps) > 1


def test_at_each_step_the_tokens_are_those_that_a_partial_match_allows(embedded):
    """Against the ``regex`` package, token by token over the whole vocabulary."""
    model, tokenizer = embedded
    prompt = tokenizer.encode("The years were")
    processor = Grammar(compiled(regex=YEAR), tokenizer, len(prompt))
    texts = {
        id: tokenizer.decode([id])
        for id in range(len(tokenizer))
        if id not in tokenizer.all_special_ids
    }
    for said in ["", " ", " 19", " 1984, 2", " 1984, 2001"]:
        tokens = mx.array([*prompt, *tokenizer.encode(said)])
        logits = processor(tokens, mx.zeros((1, 49152)))
        allowed = set(np.flatnonzero(np.isfinite(np.array(logits[0]))).tolist())
        expected = {
            id for id, text in texts.items() if regex.fullmatch(YEAR, said + text, partial=True)
        }
        assert allowed == expected, said
    ended = processor(mx.array([*prompt, *tokenizer.encode(" 1984, 2001.")]), mx.zeros((1, 49152)))
    assert set(np.flatnonzero(np.isfinite(np.array(ended[0])))) == set(tokenizer.eos_token_ids)


def test_threshold_one_is_greedy_decoding_under_the_same_mask(embedded):
    model, tokenizer = embedded
    prompt = tokenizer.encode("Alice is a person: ")
    processor = Grammar(compiled(json_schema=PERSON), tokenizer, len(prompt))
    theirs: list[int] = []
    for token, _ in generate_step(
        mx.array(prompt), model, max_tokens=40, logits_processors=[processor]
    ):
        if int(token) in tokenizer.eos_token_ids:
            break
        theirs.append(int(token))
    ours = generate(model, tokenizer, prompt, threshold=1.0, max_tokens=40, json_schema=PERSON)
    assert [step.tokens[0].id for step in ours.lattice.steps if step.tokens] == theirs
    assert is_person(ours.text)


@pytest.mark.slow
def test_rows_of_a_batch_follow_grammars_of_their_own(embedded):
    prompts = ["The years were", "There were", "Once upon a time"]
    base = {"threshold": 0.2, "max_tokens": 12}
    each = [Settings(**base, regex=YEAR), Settings(**base, grammar=LARK), Settings(**base)]
    together = batch_generate(*embedded, prompts, each).results
    for prompt, settings, found in zip(prompts, each, together, strict=True):
        alone = generate(*embedded, prompt, **base, regex=settings.regex, grammar=settings.grammar)
        assert found.text == alone.text
        assert [[t.id for t in s.tokens] for s in found.lattice.steps] == [
            [t.id for t in s.tokens] for s in alone.lattice.steps
        ]


@pytest.mark.slow
def test_every_text_of_a_search_follows_the_grammar_and_is_scored_by_the_model(embedded):
    model, tokenizer = embedded
    found = search(
        model, tokenizer, "The years were", regex=YEAR, max_tokens=20, simulations=3,
        evaluation="rollout", rollout_temp=0.8,
    )  # fmt: skip
    assert is_year(found.text)
    prompt = tokenizer.encode("The years were")
    ids = [choice.id for choice in found.choices]
    logits = np.array(model(mx.array([*prompt, *ids])[None])[0].astype(mx.float32), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for place, choice in enumerate(found.choices, len(prompt) - 1):
        assert choice.probability == pytest.approx(p[place][choice.id], rel=1e-3)
    assert max(len(choice.children) for choice in found.choices) > 1
