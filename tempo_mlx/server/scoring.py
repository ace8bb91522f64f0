"""Log-probabilities of the tokens of whole texts, by the model as it stands."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..numerics import log_softmax
from .generation import TokenScore, token_score

#: Tokens in one forward pass.
CHUNK = 256


def text_scores(model: nn.Module, ids: Sequence[int], top: int, first: int = 0) -> list[TokenScore]:
    """The score of each token of a text from ``first`` on.

    Args:
        model: as ``mlx_lm.load`` returns it.
        ids: of the whole text, at least one.
        top: alternatives of each token.
        first: place of the first token whose score is wanted; the token at place 0 has none.
    """
    cache: list[Any] = make_prompt_cache(model)
    found = [TokenScore(ids[0], None)] if first == 0 else []
    for start in range(0, len(ids) - 1, CHUNK):
        end = min(start + CHUNK, len(ids) - 1)
        logits = model(mx.array(list(ids[start:end]))[None], cache=cache)[0]
        wanted = range(max(start, first - 1), end)
        if wanted:
            logprobs = np.array(log_softmax(logits[wanted[0] - start :].astype(mx.float32)))
            found += [
                token_score(ids[place + 1], row, top)
                for place, row in zip(wanted, logprobs, strict=True)
            ]
        else:
            mx.eval([each.state for each in cache])
    return found
