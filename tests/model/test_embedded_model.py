"""The embedded model is what its recipe says; its tokenizer is byte pair encoding and no more."""

import json

from tempo_mlx.weights import gguf
from tempo_mlx.weights.loading import load, locate
from tempo_mlx.weights.recipes import recipes

import mlx.core as mx
import mlx_lm
import pytest
import regex
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

RECIPE = recipes()["smollm2-135m"]

ODD_TEXTS = [
    "Hello, world!",
    "In 2024, 3.14159 and 1,000,000 are numbers; ½ and ٣ too.",
    "  leading, trailing, and   runs of   spaces   ",
    "tabs\tand\nnew\r\nlines\n\n\n\n   \n\t\n end",
    "don't we'll they're I'm you've he'd it's DON'T",
    "naïve café Ünïcödé – “quotes” … €100",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff \u00a0nbsp",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # comment\n\tif x:\n\t\tpass\n",
    "https://example.org/a?b=c&d=%20e#f <html><b>x</b></html> {\"a\": [1, 2.5e-3]}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01\x7f control",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|><|im_end|> <repo_name>x<file_sep>",
    " ",
    "\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def quantised(embedded):
    """The q4 variant; computing in fp32, because the CPU is slow and inexact in fp16."""
    model, _ = load("smollm2-135m/q4")
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def full(embedded):
    return load("smollm2-135m/fp32")[0]


@pytest.fixture(scope="module")
def rules():
    """(vocabulary, rank of each merge, special tokens), as the model's file lists them."""
    content = json.loads((locate("smollm2-135m/q4") / "tokenizer.json").read_text(encoding="utf-8"))
    merges = {tuple(pair): rank for rank, pair in enumerate(content["model"]["merges"])}
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    return content["model"]["vocab"], merges, special


def greedy(model, tokenizer, prompt: str, count: int) -> str:
    steps = generate_step(mx.array(tokenizer.encode(prompt)), model, max_tokens=count)
    return tokenizer.decode([token for token, _ in steps])


def test_greedy_text_is_the_known_one(full, embedded):
    text = greedy(full, embedded[1], "Once upon a time, there was a", 11)
    assert text == " small town nestled in the heart of a bustling city."


def test_chat_answers_and_ends(full, embedded):
    _, tokenizer = embedded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    text = mlx_lm.generate(full, tokenizer, prompt, max_tokens=20)
    assert text == "The capital of France is Paris."


def test_variants_compute_the_same(quantised, full, embedded):
    tokens = mx.array([embedded[1].encode("The old bridge was built in 1887 and it still stands.")])
    difference = mx.abs(quantised(tokens) - full(tokens)).max().item()
    assert difference < 1e-3


def test_full_weights_are_the_dequantised_ones():
    packed = mx.load(str(locate("smollm2-135m/q4") / "model.safetensors"))
    full = mx.load(str(locate("smollm2-135m/fp32") / "model.safetensors"))
    config = json.loads((locate("smollm2-135m/q4") / "config.json").read_text())
    settings = config["quantization"]
    checked = 0
    for name, weight in full.items():
        assert weight.dtype == mx.float32
        module = name.removesuffix(".weight")
        if f"{module}.scales" in packed:
            own = settings.get(module, settings)
            expected = mx.dequantize(
                packed[name],
                packed[f"{module}.scales"].astype(mx.float32),
                packed[f"{module}.biases"].astype(mx.float32),
                group_size=own["group_size"],
                bits=own["bits"],
            )
        else:
            expected = packed[name].astype(mx.float32)
        assert mx.array_equal(weight, expected), name
        checked += weight.size
    assert checked == RECIPE.parameters


def test_numbers_of_recipe_configuration_and_model_agree(full, quantised):
    for variant, model in (("q4", quantised), ("fp32", full)):
        config = json.loads((locate(f"smollm2-135m/{variant}") / gguf.CONFIG).read_text())
        assert {name: config[name] for name in RECIPE.architecture} == RECIPE.architecture
        for name, value in RECIPE.architecture.items():
            if name not in ("bos_token_id", "pad_token_id"):
                assert getattr(model.args, name) == value, name
    shapes = {name: array.shape for name, array in tree_flatten(full.parameters())}
    architecture = RECIPE.architecture
    width = architecture["hidden_size"]
    assert shapes["model.embed_tokens.weight"] == (architecture["vocab_size"], width)
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == (3 * 64, width)
    assert shapes["model.layers.29.mlp.up_proj.weight"] == (
        architecture["intermediate_size"],
        width,
    )
    assert "model.layers.30.mlp.up_proj.weight" not in shapes
    assert sum(array.size for _, array in tree_flatten(full.parameters())) == RECIPE.parameters


def test_quantised_variant_stays_quantised(quantised):
    layer = quantised.layers[0]
    assert layer.self_attn.q_proj.bits == layer.mlp.down_proj.bits == 4
    assert quantised.model.embed_tokens.bits == 8


def test_special_tokens(embedded):
    _, tokenizer = embedded
    assert tokenizer.eos_token_ids == set(RECIPE.eos) == {0, 2}
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert len(tokenizer.get_vocab()) == RECIPE.architecture["vocab_size"]
    # A prompt is what it says: nothing is put before or after it.
    assert tokenizer.decode(tokenizer.encode("x")) == "x"


def test_chat_template_gives_the_published_tokens(embedded):
    _, tokenizer = embedded
    message = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3 and ids.count(2) == 2


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_text_survives_the_tokenizer(embedded, text):
    _, tokenizer = embedded
    assert tokenizer.decode(tokenizer.encode(text)) == text


# mlx-lm's detokenizer shows byte 0 as a letter.
@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if "\x00" not in text])
def test_text_survives_the_streaming_detokenizer(embedded, text):
    _, tokenizer = embedded
    detokenizer = tokenizer.detokenizer
    detokenizer.reset()
    for token in tokenizer.encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    # mlx-lm drops one space at the beginning of a stream.
    assert detokenizer.text in (text, text.removeprefix(" "))


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokens_are_those_of_byte_pair_encoding(embedded, rules, text):
    assert embedded[1].encode(text) == encode(text, *rules)


def encode(text: str, vocabulary: dict, ranks: dict, special: dict) -> list[int]:
    """Byte-level BPE as llama.cpp describes it for "smollm", written out plainly."""
    ids = []
    names = "|".join(map(regex.escape, sorted(special, key=len, reverse=True)))
    for part in regex.split(f"({names})", text):
        if part in special:
            ids.append(special[part])
            continue
        for piece in regex.findall(r"\p{N}|[^\p{N}]+", part):
            for word in regex.findall(
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", piece
            ):
                ids += [vocabulary[symbol] for symbol in merge(word, ranks)]
    return ids


def merge(word: str, ranks: dict) -> list[str]:
    letters = byte_letters()
    symbols = [letters[byte] for byte in word.encode("utf-8")]
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        i = pairs.index(best)
        symbols[i : i + 2] = ["".join(best)]
    return symbols


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
