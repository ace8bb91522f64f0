"""What the scripts share: texts scored by plain passes of mlx-lm's model."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache


def logprob(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """log p(tokens | prompt) in nats per token, by one plain pass of the model."""
    logits = model(mx.array([*prompt, *tokens])[None], cache=make_prompt_cache(model))[0]
    rows = np.array(logits[len(prompt) - 1 : -1].astype(mx.float32), np.float64)
    logp = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    return float(np.take_along_axis(logp, np.array(tokens)[:, None], axis=1).mean())
