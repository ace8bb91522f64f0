"""Prompt caches of the embedded model, whose tokens are longer than a letter."""

from tempo_mlx import generate
from tempo_mlx.decode.prompt_cache import PromptCache
from tests.comparison import assert_close

SETTINGS = {"max_tokens": 5, "threshold": 0.05}


def test_a_prompt_behind_a_cached_text_is_the_run_of_both(embedded):
    model, tokenizer = embedded
    cache = PromptCache.read(model, tokenizer, "The capital of France")
    result = generate(model, tokenizer, " is the city of", prompt_cache=cache, **SETTINGS)
    expected = generate(model, tokenizer, "The capital of France is the city of", **SETTINGS)
    assert result.prompt == expected.prompt
    assert result.lattice.prompt_tokens == expected.lattice.prompt_tokens
    assert_close(result.lattice.steps_to_dict(), expected.lattice.steps_to_dict())


def test_a_token_that_reaches_over_the_end_of_the_cached_text_is_read_as_a_whole(embedded):
    model, tokenizer = embedded
    cache = PromptCache.read(model, tokenizer, "The cats are hap")
    joined = cache.join(model, tokenizer, "The cats are happy")
    assert joined.tokens == tokenizer.encode("The cats are happy") and not joined.appended
    assert cache.covers(joined.tokens) == 3 < len(cache.tokens)
    result = generate(model, tokenizer, "The cats are happy", prompt_cache=cache, **SETTINGS)
    expected = generate(model, tokenizer, "The cats are happy", **SETTINGS)
    assert result.lattice.prompt_tokens == expected.lattice.prompt_tokens
    assert_close(result.lattice.steps_to_dict(), expected.lattice.steps_to_dict())
