"""Quantised keys and values, against stock mlx-lm with its own quantised caches."""

from tempo_mlx import Settings, batch_generate, generate, load, search
from tempo_mlx.bench.decode import bench_decode
from tempo_mlx.bench.result import finder
from tempo_mlx.bench.setting import Subject, prompt_of
from tempo_mlx.conversation import Conversation
from tempo_mlx.decode.prompt_cache import PromptCache
from tempo_mlx.errors import TempoError
from tempo_mlx.models import KVQuantization, PositionedModel, UnsupportedModelError
from tests.tiny_folder import save_tiny_model
from tests.tiny_models import architectures, each_architecture, tiny_model
from tests.tiny_tokenizer import TinyTokenizer

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32], [4, 8, 15, 16, 23, 42], [7, 2]]
PROMPT = PROMPTS[0]
KV = {"kv_bits": 4, "kv_group_size": 32}


@pytest.fixture(scope="module")
def model():
    kinds = ["full_attention"] * 2
    return tiny_model("llama", seed=1, num_hidden_layers=2, head_dim=32, layer_types=kinds)


@pytest.fixture(scope="module")
def tokenizer(model):
    return TinyTokenizer(model.args.vocab_size, end_tokens=())


def stock_logprobs(model, prompt, tokens, start=0, chunk=2048):
    """log p of each token, by mlx-lm's functions: one cache, a token at a time behind the prompt.

    Args:
        chunk: prompt tokens of one pass.
    """
    caches = make_prompt_cache(model)
    chunks = [prompt[i : min(i + chunk, len(prompt) - 1)] for i in range(0, len(prompt) - 1, chunk)]
    found = []
    for ids in [*chunks, prompt[-1:], *([token] for token in tokens[:-1])]:
        row = np.array(model(mx.array([ids]), cache=caches)[0, -1], np.float64)
        maybe_quantize_kv_cache(caches, start, KV["kv_group_size"], KV["kv_bits"])
        found.append(row - np.logaddexp.reduce(row))
    return [row[token] for row, token in zip(found[-len(tokens) :], tokens, strict=True)]


@pytest.mark.parametrize("start", [0, 8, 17])
def test_threshold_one_is_mlx_lms_decoding_with_kv_bits(model, tokenizer, start):
    settings = {**KV, "quantized_kv_start": start, "prefill_step_size": 5}
    result = generate(model, tokenizer, PROMPT, threshold=1.0, max_tokens=9, **settings)
    stock = list(generate_step(mx.array(PROMPT), model, max_tokens=9, **settings))
    assert result.paths(1)[0].tokens == [int(token) for token, _ in stock]
    own = [np.log(step.tokens[0].probability) for step in result.lattice.steps]
    expected = [float(logprobs[int(token)]) for token, logprobs in stock]
    assert own == pytest.approx(expected, abs=1e-4)
    unquantised = generate(model, tokenizer, PROMPT, threshold=1.0, max_tokens=9)
    plain = [np.log(step.tokens[0].probability) for step in unquantised.lattice.steps]
    assert own != pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("visibility", ["tree", "recombined"])
@pytest.mark.parametrize("start", [0, 16])
def test_texts_of_a_tree_are_separate_decodes(model, tokenizer, visibility, start):
    result = generate(
        model,
        tokenizer,
        PROMPT,
        visibility=visibility,
        threshold=0.01,
        max_parallel=3,
        max_tokens=6,
        quantized_kv_start=start,
        **KV,
    )
    paths = result.paths(5)
    assert len(paths) > 2
    for path in paths:
        expected = stock_logprobs(model, PROMPT, path.tokens, start)
        assert path.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_rows_of_a_batch_are_separate_decodes(model, tokenizer):
    batch = batch_generate(
        model,
        tokenizer,
        PROMPTS,
        threshold=0.02,
        max_parallel=3,
        max_tokens=6,
        batch_size=2,
        quantized_kv_start=0,
        **KV,
    )
    for prompt, result in zip(PROMPTS, batch.results, strict=True):
        path = result.paths(1)[0]
        expected = stock_logprobs(model, prompt, path.tokens)
        assert path.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_the_tokens_that_a_search_chooses_have_their_probabilities(model, tokenizer):
    found = search(model, tokenizer, PROMPT, max_tokens=4, simulations=6, **KV)
    expected = stock_logprobs(model, PROMPT, found.tokens)
    assert found.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_merged_sets_are_rescored_with_quantised_slots(model, tokenizer):
    result = generate(
        model,
        tokenizer,
        PROMPT,
        visibility="isolated",
        threshold=0.05,
        max_parallel=3,
        max_tokens=5,
        quantized_kv_start=0,
        **KV,
    )
    path = result.paths(1)[0]
    expected = stock_logprobs(model, PROMPT, path.tokens)
    assert path.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_a_prompt_cache_in_full_precision_goes_on_quantised(model, tokenizer):
    known = PromptCache.read(model, tokenizer, PROMPT[:9])
    settings = Settings(threshold=1.0, max_tokens=6, quantized_kv_start=0, **KV)
    result = generate(model, tokenizer, PROMPT, prompt_cache=known, settings=settings)
    path = result.paths(1)[0]
    caches = make_prompt_cache(model)
    model(mx.array([PROMPT[:9]]), cache=caches)
    stock = generate_step(
        mx.array(PROMPT[9:]), model, prompt_cache=caches, max_tokens=6, quantized_kv_start=0, **KV
    )
    expected = [(int(token), float(logprobs[int(token)])) for token, logprobs in stock]
    assert path.tokens == [token for token, _ in expected]
    assert path.logprob == pytest.approx(sum(logprob for _, logprob in expected), abs=1e-4)


def test_a_conversation_goes_on_quantised_and_cannot_change_that(model, tokenizer):
    settings = Settings(threshold=1.0, max_tokens=4, quantized_kv_start=0, **KV)
    talk = Conversation(model, tokenizer, settings, template=False)
    for text in ("ab", "cd"):
        for _ in talk.ask(text):
            pass
    assert talk.reading.kept >= 4
    talk.settings = Settings(threshold=1.0, max_tokens=4)
    with pytest.raises(TempoError, match="kv_bits and kv_group_size must stay"):
        list(talk.ask("ef"))


def test_bytes_of_a_slot_are_counted_as_they_are_kept(model):
    full = PositionedModel(model)
    how = KVQuantization(4, 32)
    quantising = full.quantizing(how)
    # 2 layers, 2 heads, keys and values of 32 numbers: 4 bits each, and a scale and a bias of fp32.
    assert full.slot_bytes == 2 * 2 * 2 * 32 * 4
    assert quantising.slot_bytes == 2 * 2 * 2 * (16 + 2 * 4)
    assert quantising.quantizing(None).slot_bytes == full.slot_bytes
    cache = quantising.make_cache()
    quantising(mx.array([PROMPT]), np.arange(13)[None], "causal", cache)
    assert cache.nbytes == cache.capacity * quantising.slot_bytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_bits": 7}, "kv_bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ({**KV, "kv_group_size": 48}, "kv_group_size must be 32, 64 or 128, got 48"),
        ({**KV, "kv_group_size": 64}, "kv_group_size must divide the size of the model's heads"),
        ({**KV, "verify": True}, "verify replays a run with keys and values in full precision"),
        ({**KV, "draft": "lookup"}, "draft must be auto or none with kv_bits"),
        (
            {**KV, "visibility": "tree", "branching": "replicate"},
            "kv_bits needs branching shared",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(model, tokenizer, settings, words):
    with pytest.raises(TempoError, match=words):
        generate(model, tokenizer, PROMPT, max_tokens=2, **settings)


def test_a_batch_is_quantised_from_the_beginning_and_alike(model, tokenizer):
    with pytest.raises(TempoError, match="quantized_kv_start must be 0 in a batch"):
        batch_generate(model, tokenizer, PROMPTS, **KV)
    each = [Settings(**KV, quantized_kv_start=0), Settings()]
    with pytest.raises(TempoError, match="must be the same for all prompts of a batch"):
        batch_generate(model, tokenizer, PROMPTS[:2], each)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("deepseek_v3", {"kv_lora_rank": 32, "qk_rope_head_dim": 32}, "computes with itself"),
        ("afm7", {"num_heads": 2}, "shares between layers"),
        ("gpt_oss", {"head_dim": 32}, "sliding windows"),
        ("gemma2", {"head_dim": 32}, "grouped scores"),
        ("jamba", {}, "recurrent states"),
        ("mamba", {}, "no keys to quantise"),
    ],
)
def test_layers_that_cannot_read_quantised_keys_are_refused(name, sizes, words):
    model = PositionedModel(tiny_model(name, **sizes))
    with pytest.raises(UnsupportedModelError, match=f"kv_bits.*{words}"):
        model.quantizing(KVQuantization(8, 32))


#: Ways to tell a tiny model to have heads of 32 numbers, or of 64.
LARGER_HEADS = ({"head_dim": 32}, {"hidden_size": 128}, {"n_embd": 128}, {"num_heads": 2}, {})


@pytest.mark.slow
@each_architecture(architectures())
def test_every_architecture_is_exact_or_refused(name):
    for sizes in LARGER_HEADS:
        try:
            model = tiny_model(name, most=3_000_000, **sizes)
            positioned = PositionedModel(model)
            positioned.quantizing(KVQuantization(4, 32))
        except UnsupportedModelError:
            return
        except ValueError:
            # It has no such field, or its heads are still too small.
            continue
        tokenizer = TinyTokenizer(positioned.vocabulary_size, end_tokens=())
        result = generate(
            positioned,
            tokenizer,
            PROMPT,
            visibility="tree",
            threshold=0.01,
            max_parallel=3,
            max_tokens=5,
            quantized_kv_start=0,
            **KV,
        )
        for path in result.paths(3):
            expected = stock_logprobs(model, PROMPT, path.tokens)
            assert path.logprob == pytest.approx(sum(expected), abs=1e-4)
        return
    pytest.skip("its tiny model has heads of no multiple of 32 numbers")


@pytest.mark.slow
def test_the_bench_measures_what_quantisation_saves_and_changes(tmp_path):
    model, tokenizer = load(save_tiny_model(tmp_path, hidden_size=128))
    subject = Subject.of(model, tokenizer, "tiny", 1)
    found = finder(bench_decode(subject, 13, 6, (1,), 0, KV["kv_bits"], KV["kv_group_size"]).rows)
    prompt = prompt_of(tokenizer, 13)
    text = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=6)]
    full = np.array(stock_logprobs(model, prompt, text, start=1000))
    differences = np.abs(full - stock_logprobs(model, prompt, text))
    name = "4-bit keys"
    assert found(name, "mean difference").median == pytest.approx(differences.mean(), abs=1e-4)
    assert found(name, "largest difference").median == pytest.approx(differences.max(), abs=1e-4)
    assert found("full", "bytes of a slot").median == PositionedModel(model).slot_bytes
    assert found(f"threshold 1, {name}", "slots").median == 13 + 6
