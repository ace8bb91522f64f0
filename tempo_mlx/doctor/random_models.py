"""Tiny random models with various kinds of attention, for checks without a download."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes

#: Standard deviation of a matrix product whose input has standard deviation 1.
GAIN = 1.2
#: Standard deviation of gains and biases around their neutral values.
VARIATION = 0.1

VOCABULARY = 128
CONTEXT = 512

# Heads of 64 values, as in real models: mlx has no fused kernel for much smaller ones.
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}

#: Name -> the configuration that mlx-lm reads.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama"},
    # Every other layer sees 8 tokens, fewer than a check reads.
    "gemma3_text": {
        **_BASE,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 64,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "qwen3_moe": {
        **_BASE,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    # Multi-head latent attention, without experts.
    "deepseek_v3": {
        **_BASE,
        "model_type": "deepseek_v3",
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 4,
    },
    # Alternating gated delta rules and attention, without experts.
    "qwen3_next": {
        **_BASE,
        "model_type": "qwen3_next",
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 0,
        "shared_expert_intermediate_size": 0,
    },
}


def random_model(name: str, seed: int = 0, **changed: Any) -> nn.Module:
    """A stock mlx-lm model with random fp32 weights.

    Attention, logits and every norm deviate from their neutral values enough for an error in any
    of them to show.

    Args:
        name: a key of :data:`CONFIGS`.
        seed: of the weights.
        changed: fields that override the configuration in :data:`CONFIGS`.
    """
    config = CONFIGS[name] | changed
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    key = mx.random.key(seed)

    def draw(path: str, initial: mx.array) -> mx.array:
        nonlocal key
        key, mine = mx.random.split(key)
        noise = mx.random.normal(initial.shape, key=mine)
        if path.endswith("A_log"):
            # Chosen so that a state lasts for several tokens; mlx-lm's own draws may decay faster.
            return noise / 2 - 1
        if initial.ndim == 1:
            return initial + VARIATION * noise
        return GAIN / math.sqrt(initial.shape[-1]) * noise

    model.update(tree_map_with_path(draw, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


class Letters:
    """A tokenizer for the random models: one character for each token, and no end token.

    Args:
        size: of the vocabulary.
    """

    bos_token = None
    name_or_path = "random"
    has_chat_template = False
    eos_token_ids: frozenset[int] = frozenset()

    def __init__(self, size: int = VOCABULARY):
        self._size = size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % self._size for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def __len__(self) -> int:
        return self._size
