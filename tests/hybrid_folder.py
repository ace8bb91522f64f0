"""A small random hybrid model on disk, written by mlx-lm's own functions, with a real tokenizer.

Gated delta rules and full attention by turns, experts in every other layer; three million weights,
nearly all of them embeddings of the tokenizer's tokens.
"""

import json
import shutil
from pathlib import Path

from tests.tiny_models import tiny_config, tiny_model

from mlx_lm.utils import quantize_model, save_config, save_model

NAME = "qwen3_next"
MOST_PARAMETERS = 5_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: Widths that mlx quantises in groups of 64.
WIDTHS = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "tie_word_embeddings": True,
}
#: Scale of the logits: some steps have clear favourites, others several candidates.
SHARPNESS = 4.0


def save_hybrid_model(
    folder: Path, tokenizer: Path, bits: int | None = None, seed: int = 0
) -> Path:
    """Write a hybrid model that load() reads; returns the folder.

    Args:
        folder: is made.
        tokenizer: a folder with the tokenizer's files and a config.json that knows its end token.
        bits: of quantised weights; None for fp32.
        seed: of the weights.
    """
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    theirs = json.loads((tokenizer / "config.json").read_text())
    chosen = {"vocab_size": theirs["vocab_size"], **WIDTHS}
    config = {**tiny_config(NAME, **chosen), "eos_token_id": theirs["eos_token_id"]}
    model = tiny_model(NAME, seed, most=MOST_PARAMETERS, **chosen)
    model.model.norm.weight = SHARPNESS * model.model.norm.weight
    if bits is not None:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder
