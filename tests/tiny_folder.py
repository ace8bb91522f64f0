"""A tiny random model on disk, in mlx-lm's layout, with a tokenizer of single bytes."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.tuner.utils
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"


def save_tiny_model(folder: Path, seed: int = 0, **overrides) -> Path:
    """Write a llama with grouped queries that load() reads; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: id for id, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}answer:"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END,
                "chat_template": template,
            }
        )
    )
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(alphabet) + 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": len(alphabet),
    } | overrides
    (folder / "config.json").write_text(json.dumps(config))
    model = llama.Model(llama.ModelArgs.from_dict(config))
    key = mx.random.key(seed)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        key, draw = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=draw)
        weights[name] = 1 + 0.1 * noise if value.ndim == 1 else noise * value.shape[-1] ** -0.5
    # A wider spread of logits, so that some steps have clear favourites.
    weights["model.norm.weight"] = weights["model.norm.weight"] * 3
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def save_adapters(folder, path):
    """Random adapters for the model in the folder."""
    path.mkdir()
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    model, _ = mlx_lm.load(str(folder))
    model.freeze()
    mlx_lm.tuner.utils.linear_to_lora_layers(model, 2, parameters)
    weights = {
        name: mx.random.normal(array.shape, key=mx.random.key(i))
        for i, (name, array) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    return path
