"""Trees whose branches are rows of a batch: for models that cannot branch in one sequence.

Every branch has a copy of the whole state, in mlx-lm's own caches. It costs the prompt's memory for
every branch, and works for any model, recurrent ones included. It is the oracle of the tree in one
sequence, too: nothing is shared with that but the selection.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ..numerics import softmax
from ..rules.processors import remaining
from ..rules.selection import most_probable
from .request import Request
from .step_candidates import StepCandidates


class RowTree:
    """One run in visibility "tree", a row of mlx-lm's caches for each leaf."""

    def __init__(self, model: nn.Module, request: Request):
        self.model = model
        self.request = request
        self.cache: list[Any] = make_prompt_cache(model)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' state."""
        return sum(cache.nbytes for cache in self.cache)

    @property
    def slots(self) -> int:
        """Tokens that the rows hold, each its whole text."""
        lattice = self.request.lattice
        leaves = len(lattice.steps[-1].tokens) if lattice.steps else 1
        return max(1, leaves) * (len(lattice.prompt_tokens) + len(lattice))

    def read(self, step_size: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the prompt."""
        prompt = mx.array(self.request.lattice.prompt_tokens)[None]
        n = prompt.shape[1]
        with mx.stream(generation_stream):
            for start in range(0, n - 1, step_size):
                end = min(start + step_size, n - 1)
                self.model(prompt[:, start:end], cache=self.cache)
                mx.eval([cache.state for cache in self.cache])
                if progress is not None:
                    progress(end, n)
            self._offer(prompt[:, -1:])
            mx.eval([cache.state for cache in self.cache])
        if progress is not None:
            progress(n, n)
        self.request.prompt_is_read()

    def step(self) -> None:
        """Continue every leaf."""
        request = self.request
        request.select()
        request.record()
        if request.finished:
            return
        rows = request.chosen.parents
        assert rows is not None
        with mx.stream(generation_stream):
            self._select(rows)
            self._offer(mx.array(request.chosen.ids)[:, None])

    def _offer(self, tokens: mx.array) -> None:
        """Read the leaves' last tokens, [M, 1], and start computing what may follow."""
        logits = self.model(tokens, cache=self.cache)[:, -1]
        p = rows = softmax(logits.astype(mx.float32))
        if self.request.processors:
            self.request.begin_draws()
            texts, draws = self.request.texts(), self.request.uniform(len(logits))
            p = softmax(self.request.processors(logits, texts, draws).astype(mx.float32))
            rows = remaining(p, rows)
        step_candidates = StepCandidates.of_rows(
            most_probable(p, self.request.k), p, rows, [[1] * len(logits)]
        )
        self.request.step_candidates = step_candidates, 0
        mx.async_eval(*step_candidates.state, [cache.state for cache in self.cache])

    def _select(self, rows: np.ndarray) -> None:
        """Make the leaves' rows copies of their parents'."""
        if np.array_equal(rows, np.arange(len(self.request.chosen.transitions))):
            return  # every leaf has one continuation
        chosen = mx.array(rows.astype(np.int32))
        for cache in self.cache:
            cache.state = tree_map(
                lambda array: array[chosen] if isinstance(array, mx.array) else array, cache.state
            )
