"""What is known of mlx-lm's architectures beyond what a model shows by itself.

Names are those of mlx-lm's model files. tests/unit/test_architectures.py compares every file with
the stock model and holds these tables against what it finds; docs/architectures.md has the result.
"""

from typing import Any, cast

import mlx.nn as nn

#: Files whose tiny random models gave the stock model's numbers.
EXACT = frozenset(
    [
        "Klear",
        "afm7",
        "afmoe",
        "apertus",
        "baichuan_m1",
        "bailing_hybrid",
        "bailing_moe",
        "bailing_moe_linear",
        "bailing_moe_v3",
        "cohere",
        "cohere2",
        "dbrx",
        "deepseek",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone",
        "exaone4",
        "exaone_moe",
        "falcon_h1",
        "gear",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma4",
        "gemma4_text",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "helium",
        "hunyuan",
        "hunyuan_v1_dense",
        "internlm2",
        "internlm3",
        "iquestloopcoder",
        "jamba",
        "kimi_k25",
        "kimi_k3",
        "kimi_linear",
        "kimi_vl",
        "laguna",
        "lfm2",
        "lfm2-vl",
        "lfm2_moe",
        "lille-130m",
        "llama",
        "llama4_text",
        "longcat_flash",
        "longcat_flash_ngram",
        "mamba",
        "mamba2",
        "mellum",
        "mimo",
        "mimo_v2_flash",
        "minicpm",
        "minicpm3",
        "minimax",
        "ministral3",
        "mistral3",
        "mistral4",
        "mixtral",
        "muse_glimmer",
        "nanbeige",
        "nanochat",
        "nemotron",
        "nemotron-nas",
        "nemotron_h",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "openelm",
        "phi",
        "phi3",
        "phimoe",
        "phixtral",
        "pixtral",
        "plamo",
        "plamo2",
        "prism_hadamard_qwen35",
        "qwen",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl",
        "qwen3_vl_moe",
        "recurrent_gemma",
        "rwkv7",
        "seed_oss",
        "smollm3",
        "solar_open",
        "spark2_5",
        "stablelm",
        "starcoder2",
        "step3p5",
        "talkie",
        "telechat3",
        "youtu_llm",
    ]
)

#: Files whose results would be wrong or were never seen, although nothing need fail: reasons.
REFUSED = {
    "deepseek_v32": "an indexer chooses keys by an order and a cache of its own",
    "glm_moe_dsa": "an indexer chooses keys by an order and a cache of its own",
    "minimax_m3_vl": "an indexer chooses keys by an order and a cache of its own",
    "bitnet": "its kernels exist for Metal only and were never compared with the stock model",
    "muse_spark": "its kernels exist for Metal only and were never compared with the stock model",
    "olmo": "adds masks to its scores as numbers, so a boolean mask would hide nothing",
    "phi3small": "block-sparse attention counts slots, not positions, so shared positions shift it",
    "plamo3": "mlx-lm prefills it with a window of one token more than it decodes with, so there "
    "is no single result to be equal to",
}

#: Files that compute scores themselves, [B, H_kv, H / H_kv, T, S], to which masks must broadcast.
GROUPED_SCORES = frozenset({"gemma2"})


def names(model: nn.Module) -> list[str]:
    """Names of the model's file and, for a wrapper of a language model, of that one's file."""
    holders = [model, getattr(model, "language_model", None)]
    return [
        type(holder).__module__.removeprefix("mlx_lm.models.")
        for holder in holders
        if holder is not None and type(holder).__module__.startswith("mlx_lm.models.")
    ]


def ids_kept(model: nn.Module) -> int:
    """Token ids that the model's first layer keeps for its n-grams; 0 for all but one type."""
    for module in model.modules():
        if type(module).__name__ == "NgramEmbedding":
            return cast(Any, module).n - 1
    return 0


def refusal(model: nn.Module) -> str | None:
    """Why this model cannot hold parallel tokens exactly, as far as its kind tells, or None."""
    for name in names(model):
        if name in REFUSED:
            return REFUSED[name]
    for path, module in model.named_modules():
        if type(module).__name__ == "DynamicNTKScalingRoPE":
            return (
                f"{path} rescales its frequencies with the length of the sequence "
                "(dynamic NTK), so a position has no fixed rotation"
            )
    return None
