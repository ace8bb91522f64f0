"""Text search: the loop over tokens, and the result."""

import copy
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from ..arguments import shown
from ..decode.result import cut_at_stop
from ..errors import TempoError
from ..models import PositionedModel
from ..plots.search import plot_search
from ..rules.rule import name_of
from ..settings import given
from ..text.printable import quoted
from ..text.vocabulary import Prompt, Vocabulary, encode_prompt
from ..view import page, snippet
from .environment import Batched, TextEnvironment, Value
from .keywords import SearchKeywords, SettingsKeywords
from .monte_carlo import SearchError, TreeSearch
from .settings import SearchSettings
from .tree import ROOT, Tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 2


@dataclass(frozen=True)
class Choice:
    """A committed token, and the root's children when it was chosen.

    Args:
        id: of the token.
        text: of the token, for display.
        bytes: of the token's UTF-8, as integers.
        probability: of the token after the text so far.
        simulations: run to choose it.
        children: of the root, most visited first: "action", "text", "bytes", "visits", "value",
            "prior".
    """

    id: int
    text: str
    bytes: list[int]
    probability: float
    simulations: int
    children: list[dict[str, Any]]


@dataclass
class SearchResult:
    """The result of :func:`search`.

    Args:
        model: name of the model.
        prompt: as text; its ids are ``prompt_tokens``.
        settings: of the search.
        value: name of the user's value function; None without one.
        choices: the committed tokens.
        tree: from which the last token was chosen; its root is the token before it.
        finish_reason: "stop" (end of text or a stop text), "length" (``max_tokens``), "context"
            (the model's context is full), "budget" (``max_forward_tokens`` or ``max_seconds`` is
            spent and no further token has been searched), or None during the search.
        forward_tokens, passes: tokens that passed through the model, and the number of passes.
        simulations: for all tokens.
        seconds: since the prompt was read.
    """

    model: str
    prompt: str
    prompt_tokens: list[int]
    settings: SearchSettings
    vocabulary: Vocabulary
    tree: Tree
    value: str | None = None
    choices: list[Choice] = field(default_factory=list)
    finish_reason: str | None = None
    forward_tokens: int = 0
    passes: int = 0
    simulations: int = 0
    seconds: float = 0.0
    peak_memory_gb: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """Ids of the text, without an end token."""
        ids = [choice.id for choice in self.choices]
        return ids[:-1] if ids and ids[-1] in self.vocabulary.end_tokens else ids

    @property
    def text(self) -> str:
        """The text after the prompt, before a stop text."""
        return cut_at_stop(self.vocabulary.decode(self.tokens), self.settings.stop)

    @property
    def logprob(self) -> float:
        """Log-probability of the chosen tokens in nats, including an end token."""
        return float(np.sum(np.log([choice.probability for choice in self.choices])))

    def label(self, node: int) -> str:
        """A node's token, visits and value."""
        tree = self.tree
        action = int(tree.action[node])
        text = self.vocabulary.text(action) if action >= 0 else ""
        return f"{quoted(text)} {int(tree.visits[node])} x {tree.value[node]:.3f}"

    def __repr__(self) -> str:
        """Prompt, text and statistics, one line each."""
        return (
            f"SearchResult of {shown(self.prompt)}\n"
            f"  text: {shown(self.text)}\n"
            f"  {len(self.choices)} tokens, {self.simulations} simulations, "
            f"ended by {self.finish_reason}"
        )

    def _repr_html_(self) -> str:
        """The picture in a notebook: each token with the alternatives that were tried."""
        return snippet(self.to_dict(), self.prompt + self.text)

    def to_html(self) -> str:
        """A self-contained HTML page with the picture that a notebook shows."""
        return page(self.to_dict(), self.prompt + self.text)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the choices, as ``tempo-mlx search --plot`` does.

        Args:
            path: file for the picture, ending in .svg, .png or .pdf; None saves nothing.

        Returns:
            Matplotlib's figure, which a notebook displays.

        Raises:
            ValueError: if the path cannot be written or has another ending, or if the search
                committed no token.
            ImportError: if Matplotlib is missing.
        """
        return plot_search(self, Path(path) if path is not None else None)

    def to_dict(self) -> dict[str, Any]:
        """The search as JSON-ready data, schema version 2."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "prompt": self.prompt,
            "prompt_tokens": self.prompt_tokens,
            "settings": self.settings.to_dict(),
            "value": self.value,
            "text": self.text,
            "tokens": self.tokens,
            "logprob": self.logprob,
            "choices": [vars(choice) for choice in self.choices],
            "finish_reason": self.finish_reason,
            "tree": self._tree_to_dict(),
            "stats": {
                "simulations": self.simulations,
                "forward_tokens": self.forward_tokens,
                "passes": self.passes,
                "seconds": self.seconds,
                "simulations_per_second": self.simulations / (self.seconds or float("inf")),
                "peak_memory_gb": self.peak_memory_gb,
            },
        }

    def _tree_to_dict(self) -> dict[str, Any]:
        """The tree with the text of each node; "" for a root without a token."""
        data = self.tree.to_dict()
        for node in data["nodes"]:
            node["text"] = "" if node["action"] is None else self.vocabulary.text(node["action"])
        return data


def search(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    value: Value | Batched | None = None,
    **kwargs: Unpack[SearchKeywords],
) -> SearchResult:
    """Generate a text by Monte Carlo tree search, one token at a time.

    Args:
        model, tokenizer, prompt: as in :func:`tempo_mlx.generate`.
        value: a function (ids of the tokens after the prompt, their text) -> [0, 1] that evaluates
            texts, or :class:`Batched` for one that takes many at once; None evaluates them by
            ``evaluation``.
        kwargs: arguments of :func:`stream_search`, including ``settings``, or fields of
            :class:`SearchSettings`.

    Raises:
        ValueError: for an argument out of range, or a prompt that is empty or too long.
        SearchError: if ``value`` raises or returns anything but a number in [0, 1]; it names the
            text's path and holds the tree so far.
        CacheBudgetError: if leaves do not fit into ``max_kv_bytes``.
    """
    *_, result = stream_search(model, tokenizer, prompt, value=value, **kwargs)
    return result


def stream_search(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    value: Value | Batched | None = None,
    model_name: str | None = None,
    progress: Callable[[int, SearchResult], None] | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    settings: SearchSettings | None = None,
    **kwargs: Unpack[SettingsKeywords],
) -> Generator[SearchResult, None, None]:
    """As :func:`search`; yields the result so far after each committed token.

    Args:
        model, tokenizer, prompt, value: as in :func:`search`.
        model_name: name of the model in the result.
        progress: called with (simulations done for this token, the result) after each batch.
        prompt_progress_callback: called with (prompt tokens read, prompt tokens).
        settings: of the search; None builds them from ``kwargs``.
        kwargs: fields of :class:`SearchSettings`, if ``settings`` is None.

    Raises:
        As :func:`search`.
    """
    chosen = given(settings, kwargs, SearchSettings)
    if value is not None and not isinstance(value, Batched) and not callable(value):
        raise TempoError(f"value must be a function or Batched, got {shown(value)}")
    positioned = PositionedModel.of(model).quantizing(chosen.kv_quantization)
    if value is not None and chosen.evaluation != SearchSettings.evaluation:
        raise TempoError(
            f"evaluation {chosen.evaluation} has no effect with value, which evaluates the texts; "
            "leave one out"
        )
    ids = encode_prompt(tokenizer, prompt, positioned)
    budget = chosen.max_forward_tokens
    if budget is not None and budget <= len(ids):
        raise TempoError(
            f"max_forward_tokens includes the prompt and must be above its {len(ids)} tokens, "
            f"got {budget}"
        )
    vocabulary = Vocabulary(tokenizer)
    environment = TextEnvironment(positioned, vocabulary, ids, chosen, value)
    mx.reset_peak_memory()
    result = SearchResult(
        model=model_name or positioned.name or str(getattr(tokenizer, "name_or_path", "")),
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(ids),
        prompt_tokens=ids,
        settings=chosen,
        vocabulary=vocabulary,
        tree=environment.tree,
        value=None if value is None else name_of(value),
    )
    tree = environment.tree
    searcher = TreeSearch(tree, environment.expand, environment.evaluate, chosen.policy())
    with wired_limit(positioned.model, cast(Any, [generation_stream])):
        environment.read_prompt(prompt_progress_callback)
        start = time.perf_counter()

        def spent() -> bool:
            result.seconds = time.perf_counter() - start
            result.forward_tokens, result.passes = environment.forward_tokens, environment.passes
            limit, seconds = chosen.max_forward_tokens, chosen.max_seconds
            return (limit is not None and environment.forward_tokens >= limit) or (
                seconds is not None and result.seconds >= seconds
            )

        while result.finish_reason is None:
            before = int(tree.visits[list(tree.children(ROOT))].sum())

            def stop(before: int = before) -> bool:
                over = spent()
                if progress is not None:
                    now = int(tree.visits[list(tree.children(ROOT))].sum())
                    progress(now - before, result)
                return over

            if not spent():
                try:
                    done = searcher.run(chosen.simulations, stop)
                except SearchError as error:
                    fault = error.__cause__
                    if value is not None or fault is None:
                        raise
                    # Without a value function, the failure is not the user's: raise its cause.
                    raise fault from fault.__cause__
                result.simulations += done
            elif not tree.visits[list(tree.children(ROOT))].any():
                # The budget is spent, and no next token has been searched.
                result.finish_reason = "budget"
                break
            else:
                done = 0
            _commit(environment, result, done)
            result.peak_memory_gb = mx.get_peak_memory() / 1e9
            last = int(tree.action[ROOT])
            if last in vocabulary.end_tokens or environment.is_stopped(result.tokens):
                result.finish_reason = "stop"
            elif environment.is_end(ROOT):
                result.finish_reason = environment.limit_reason
            yield result
    if result.finish_reason == "budget":
        yield result


def _commit(environment: TextEnvironment, result: SearchResult, simulations: int) -> None:
    tree, vocabulary = environment.tree, environment.vocabulary
    child = tree.best_child()
    children = [
        {
            **row,
            "text": vocabulary.text(row["action"]),
            "bytes": list(vocabulary.bytes_of(row["action"])),
        }
        for row in tree.root_table()
    ]
    id = int(tree.action[child])
    chance = float(tree.prior[child])
    raw = list(vocabulary.bytes_of(id))
    result.choices.append(Choice(id, vocabulary.text(id), raw, chance, simulations, children))
    result.tree = copy.deepcopy(tree)
    environment.commit(child)
