"""Convert a llama model in a GGUF file to a folder that mlx-lm loads.

mlx reads GGUF's block formats into its own quantised layout (groups of 32 values), so nothing is
rounded. The conversion renames tensors and reorders the rows of two matrices.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..errors import TempoError

#: Values per quantisation group in GGUF's Q4_0, Q4_1 and Q8_0, which mlx keeps.
GROUP_SIZE = 32

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Values of tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class GgufError(TempoError):
    """A GGUF file that cannot be converted exactly."""


def convert(path: Path, folder: Path, eos: Iterable[int] = ()) -> None:
    """Write the model in a GGUF file into an existing folder, in mlx-lm's layout.

    Args:
        path: a GGUF file with architecture "llama" and a byte-level BPE tokenizer.
        folder: for config.json, model.safetensors and the tokenizer's files.
        eos: the tokens that end a text; if empty, the one in the file.

    Raises:
        GgufError: if the file is damaged or has unsupported content.
        OSError: if the folder cannot be written.
    """
    try:
        loaded = mx.load(str(path), format="gguf", return_metadata=True)
    except RuntimeError as error:
        raise GgufError(f"{path} cannot be read as GGUF: {error}") from error
    weights, metadata = cast(tuple[dict[str, mx.array], dict[str, Any]], loaded)
    config = read_config(metadata, weights)
    weights = rename(weights, config["num_attention_heads"], config["num_key_value_heads"])
    if quantization := _quantization(weights):
        config["quantization"] = quantization
    # Half precision keeps the arithmetic in half precision. Only exact values are converted.
    weights = {name: _halve(array) for name, array in weights.items()}

    write_json(folder / CONFIG, config)
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": list(eos) or config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
        },
    )
    write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, config))
    read_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    _save(folder / WEIGHTS, weights)


def dequantize(source: Path, folder: Path) -> None:
    """Write a copy of a quantised mlx-lm folder with fp32 weights into an existing folder.

    Products with the fp16 scales are computed in fp32, so they are rounded only once.
    """
    config = json.loads((source / CONFIG).read_text())
    config.pop("quantization", None)
    config["dtype"] = "float32"
    packed = cast(dict[str, mx.array], mx.load(str(source / WEIGHTS)))
    weights = {}
    for name, array in packed.items():
        module, _, kind = name.rpartition(".")
        if f"{module}.scales" not in packed:
            weights[name] = array.astype(mx.float32)
        elif kind == "weight":
            scales = packed[f"{module}.scales"].astype(mx.float32)
            biases = packed[f"{module}.biases"].astype(mx.float32)
            weights[name] = mx.dequantize(array, scales, biases, GROUP_SIZE, _bits(array, scales))
    for file in source.iterdir():
        if file.name not in (CONFIG, WEIGHTS):
            (folder / file.name).write_bytes(file.read_bytes())
    write_json(folder / CONFIG, config)
    _save(folder / WEIGHTS, weights)


def read_config(metadata: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any]:
    """The content of config.json, from a GGUF's metadata and tensor names.

    Raises:
        GgufError: for an architecture other than llama, scaled rotary positions, or a missing
            entry.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise GgufError(f"GGUF architecture {architecture!r} is not supported, only 'llama'")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise GgufError("GGUF with scaled rotary positions is not supported")
    try:
        heads = _number(metadata["llama.attention.head_count"])
        kv_heads = _number(metadata.get("llama.attention.head_count_kv", heads))
        hidden = _number(metadata["llama.embedding_length"])
        head_dim = _number(metadata.get("llama.attention.key_length", hidden // heads))
        if _number(metadata.get("llama.rope.dimension_count", head_dim)) != head_dim:
            raise GgufError("GGUF that rotates a part of each head is not supported")
        eos = _number(metadata["tokenizer.ggml.eos_token_id"])
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": _number(metadata["llama.block_count"]),
            "hidden_size": hidden,
            "intermediate_size": _number(metadata["llama.feed_forward_length"]),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
            "max_position_embeddings": _number(metadata["llama.context_length"]),
            "rms_norm_eps": _number(metadata["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _number(metadata.get("llama.rope.freq_base", 10000.0)),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in weights,
            "bos_token_id": _number(metadata["tokenizer.ggml.bos_token_id"]),
            "eos_token_id": eos,
            "pad_token_id": _number(metadata.get("tokenizer.ggml.padding_token_id", eos)),
            "dtype": "float16",
        }
    except KeyError as error:
        raise GgufError(f"GGUF metadata has no {error.args[0]}") from error


def rename(weights: Mapping[str, mx.array], heads: int, kv_heads: int) -> dict[str, mx.array]:
    """GGUF's tensors under mlx-lm's names, with the rows of q and k in mlx-lm's order.

    Raises:
        GgufError: for a tensor that is not part of a llama model.
    """
    renamed = {}
    for name, array in weights.items():
        module, _, kind = name.rpartition(".")
        if module in NAMES:
            renamed[f"{NAMES[module]}.{kind}"] = array
            continue
        prefix, _, rest = module.partition(".")
        index, _, part = rest.partition(".")
        if prefix != "blk" or part not in LAYER_NAMES:
            raise GgufError(f"GGUF tensor {name} is not part of a llama model")
        if part in ("attn_q", "attn_k"):
            array = _separate_pairs(array, heads if part == "attn_q" else kv_heads)
        renamed[f"model.layers.{index}.{LAYER_NAMES[part]}.{kind}"] = array
    return renamed


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF's metadata.

    Raises:
        GgufError: for another kind of tokenizer or pre-tokenizer.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"GGUF tokenizer {kind} is not supported, only ('gpt2', 'smollm')")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=type_ == CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(path: Path, weights: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as error:
        raise OSError(str(error)) from error  # usually a full disk


def _tokenizer_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    content = {
        # This class uses tokenizer.json as it is; model-specific classes build their own tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if "tokenizer.ggml.unknown_token_id" in metadata:
        content["unk_token"] = tokens[_number(metadata["tokenizer.ggml.unknown_token_id"])]
    if "tokenizer.chat_template" in metadata:
        content["chat_template"] = metadata["tokenizer.chat_template"]
    return content


def _separate_pairs(array: mx.array, heads: int) -> mx.array:
    """Rows [head, pair, 2] -> [head, 2, pair], for weights, scales and biases.

    In GGUF, two values that are rotated together are adjacent. In mlx-lm, the first values of all
    pairs of a head come before the second values.
    """
    rows, columns = array.shape
    pairs = array.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """The "quantization" entry of config.json, with separate entries for unusual bits."""
    bits = {
        name.removesuffix(".scales"): _bits(weights[name.replace(".scales", ".weight")], scales)
        for name, scales in weights.items()
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    counts = list(bits.values())
    usual = max(set(counts), key=counts.count)
    entry: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": usual, "mode": "affine"}
    for module, count in bits.items():
        if count != usual:
            entry[module] = {"group_size": GROUP_SIZE, "bits": count, "mode": "affine"}
    return entry


def _bits(packed: mx.array, scales: mx.array) -> int:
    """Bits per value of a packed matrix [rows, columns x bits / 32]."""
    return packed.shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)


def _halve(array: mx.array) -> mx.array:
    if array.dtype != mx.float32:
        return array
    half = array.astype(mx.float16)
    return half if mx.array_equal(half.astype(mx.float32), array).item() else array


def _number(value: Any) -> Any:
    """A scalar of the metadata as a Python number."""
    if not isinstance(value, mx.array):
        return value
    if value.dtype == mx.float32:
        # The shortest decimal form gives the intended value: 1e-5, not 9.999999747378752e-06.
        return float(str(np.float32(cast(float, value.item()))))
    return value.item()
