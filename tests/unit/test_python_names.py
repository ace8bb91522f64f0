"""What a Python user sees: public names, a result in three lines, hints at typing errors."""

from importlib.metadata import version

import tempo_mlx
from tempo_mlx import GenerationResult, Lattice, Path, Settings, generate, load

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
