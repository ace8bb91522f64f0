"""What a Python user sees: public names, a result in three lines, hints at typing errors."""

import pathlib
import sys
from importlib.metadata import version
from typing import get_type_hints

import tempo_mlx
from tempo_mlx import (
    GenerationResult,
    Lattice,
    Path,
    Settings,
    generate,
    keywords,
    load,
    stream_batch_generate,
    stream_generate,
    stream_search,
)
from tempo_mlx.lattice.lattice import Ending
from tempo_mlx.plots import plot_lattice
from tempo_mlx.search import SearchResult, SearchSettings
from tempo_mlx.search import keywords as search_keywords

import mypy.api
import numpy as np
import pytest


def test_every_public_name_is_there():
    for name in tempo_mlx.__all__:
        assert getattr(tempo_mlx, name) is not None
    assert tempo_mlx.__version__ == version("tempo-mlx")


@pytest.mark.parametrize("visibility", ["recombined", "isolated"])
def test_a_result_is_shown_in_three_lines(folder, visibility):
    model, tokenizer = load(folder)
    result = generate(model, tokenizer, "The cat", max_tokens=3, visibility=visibility)
    assert isinstance(result, GenerationResult) and isinstance(result.lattice, Lattice)
    assert isinstance(result.paths(1)[0], Path)
    prompt, text, steps = repr(result).splitlines()
    assert "'The cat'" in prompt and text.startswith("  text: '")
    assert f"{len(result.lattice)} steps, {result.lattice.n_tokens} tokens" in steps


def test_a_result_whose_text_is_not_known_is_shown(folder):
    model, tokenizer = load(folder)
    settings = Settings(max_tokens=3, threshold=0.01, visibility="isolated")
    result = generate(model, tokenizer, "The cat", settings=settings, paths=0)
    assert "find_paths" in repr(result)


def test_a_typing_error_gets_a_hint_and_the_names_in_order(folder):
    model, tokenizer = load(folder)
    with pytest.raises(TypeError, match="did you mean 'threshold'") as error:
        generate(model, tokenizer, "The cat", treshold=0.1)
    names = str(error.value).split("settings are ")[1].split(", ")
    assert names == sorted(names) and "threshold" in names
    with pytest.raises(TypeError) as error:
        generate(model, tokenizer, "The cat", qqq=0.1)
    assert "did you mean" not in str(error.value)


def test_attention_is_that_of_each_layer_and_sums_to_what_was_received(folder):
    model, tokenizer = load(folder)
    result = generate(model, tokenizer, "The cat", max_tokens=4, threshold=0.01, max_parallel=3)
    found = result.attention()
    layers, heads, queries, keys = found.weights.shape
    assert found.axes == ("layer", "head", "query", "key")
    assert found.layers == tuple(range(layers)) and len(found.slots) == queries == keys
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1, atol=1e-5)
    mean = found.weights.mean(axis=(0, 1))
    for step, paid in result.received_attention().items():
        rows = [token.slot for token in result.lattice.steps[step].tokens]
        np.testing.assert_allclose(mean[rows].mean(axis=0), paid, atol=1e-6)
    # A token of a set with parents sees the prompt, its ancestors and itself: nothing else.
    token = result.lattice.steps[-1].tokens[-1]
    chain = {each.slot for each in result.lattice.tokens_to(token.slot)}
    prompt = set(range(len(result.lattice.prompt_tokens)))
    assert set(np.flatnonzero(found.weights[:, :, token.slot].max(axis=(0, 1)))) == chain | prompt
    assert found.slots[token.slot] == token.text
    np.testing.assert_array_equal(result.attention([1]).weights[0], found.weights[1])
    with pytest.raises(ValueError, match=f"layers must be at most {layers - 1}, got {layers}"):
        result.attention(layers=[layers])


def test_a_frame_has_a_row_for_each_token_and_ending(folder):
    model, tokenizer = load(folder)
    result = generate(model, tokenizer, "The cat", max_tokens=4, threshold=0.01, max_parallel=3)
    end = result.vocabulary.end_tokens
    result.lattice.steps[1].endings.append(Ending(next(iter(end)), 0.25))
    frame = result.to_frame()
    tokens = frame[frame["kind"] == "token"]
    data = [token for step in result.to_dict()["steps"] for token in step["tokens"]]
    assert len(tokens) == len(data) and len(frame) == len(data) + 1
    for name in ("id", "text", "probability", "slot", "parent", "logprob"):
        assert tokens[name].tolist() == [token[name] for token in data]
    assert tokens["pruned_at"].isna().all() and tokens["pruned_at"].dtype == "Int64"
    ending = frame[frame["kind"] == "ending"].iloc[0]
    assert (ending["step"], ending["probability"]) == (1, 0.25)


def test_without_pandas_a_frame_is_refused_in_one_line(folder, monkeypatch):
    model, tokenizer = load(folder)
    result = generate(model, tokenizer, "The cat", max_tokens=1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="^to_frame needs pandas: pip install pandas$"):
        result.to_frame()


def test_plot_draws_what_the_command_draws_and_shows_itself(folder, tmp_path):
    model, tokenizer = load(folder)
    result = generate(model, tokenizer, "The cat", max_tokens=4, threshold=0.01, max_parallel=3)
    figure = result.plot(tmp_path / "a.svg")
    plot_lattice(result, tmp_path / "b.svg", best=result.paths(1)[0].tokens)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "best-path" in [artist.get_gid() for artist in figure.axes[0].get_children()]
    result.plot(tmp_path / "c.svg", attention=True)
    assert 'id="arc-' in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("keywords", "owner"),
    [(keywords.SettingsKeywords, Settings), (search_keywords.SettingsKeywords, SearchSettings)],
)
def test_the_keywords_that_an_editor_shows_are_the_settings(keywords, owner):
    assert list(get_type_hints(keywords).items()) == list(get_type_hints(owner).items())


@pytest.mark.parametrize(
    ("shown", "function", "beside"),
    [
        (keywords.GenerateKeywords, stream_generate, {"model", "tokenizer", "prompt"}),
        (
            keywords.BatchKeywords,
            stream_batch_generate,
            {"model", "tokenizer", "prompts", "settings"},
        ),
        (search_keywords.SearchKeywords, stream_search, {"model", "tokenizer", "prompt", "value"}),
    ],
)
def test_the_keywords_beside_the_settings_are_the_arguments(shown, function, beside):
    given = get_type_hints(function)
    settings = search_keywords if shown is search_keywords.SearchKeywords else keywords
    own = shown.__annotations__.keys() - settings.SettingsKeywords.__annotations__.keys()
    assert own == given.keys() - beside - {"kwargs", "return"}
    hints = get_type_hints(shown, localns={"SearchResult": SearchResult})
    assert {name: hints[name] for name in own} == {name: given[name] for name in own}


PROGRAM = """
from tempo_mlx import batch_generate, generate, load, search, stream_generate

model, tokenizer = load("smollm2-135m")
generate(model, tokenizer, "a", threshold=0.1, verbose=True, kv_bits=8, verify=True)
for response in stream_generate(model, tokenizer, "a", max_tokens=3, paths=2):
    print(response.result.text)
batch_generate(model, tokenizer, ["a"], batch_size=2, top_p=0.9)
search(model, tokenizer, "a", simulations=3)
generate(model, tokenizer, "a", treshold=0.1)
stream_generate(model, tokenizer, "a", threshold="high")
batch_generate(model, tokenizer, ["a"], batchsize=2)
search(model, tokenizer, "a", simulation=3)
"""


@pytest.mark.slow
def test_a_type_checker_knows_the_keywords(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    config = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    told, _, status = mypy.api.run(["--config-file", str(config), "--strict", str(program)])
    found = [line for line in told.splitlines() if "program.py" in line and "error" in line]
    lines = [int(line.split(":")[1]) for line in found]
    assert status == 1 and lines == [10, 11, 12, 13], told
