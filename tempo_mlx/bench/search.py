"""Simulations in one sequence state, beside searches that reread texts or copy the cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from ..arguments import check_count, shown
from ..errors import TempoError
from ..models import PositionedModel
from ..search import SearchSettings, TreeSearch
from ..search.environment import TextEnvironment
from ..search.tree import ROOT
from ..text.vocabulary import Vocabulary, without_end
from .setting import MOST_TOKENS, MOST_WIDTH, describe, prompt_of, require_room
from .target import Target
from .timing import Spread, alternate, ratio

SCHEMA = 1

READING, COPYING = "rereading each text", "copying the cache for each branch"
#: No token is less probable.
ANY = 1e-30

MIN_OVER_READING, MIN_OVER_COPYING = 10.0, 2.0


class Rereading(TextEnvironment):
    """Reads a leaf's whole text, prompt included, whenever it expands it."""

    def _pass(self, nodes: list[int]) -> list[mx.array]:
        logits = []
        for node in nodes:
            ids = mx.array([*self.prompt, *self.tree.path(node)])[None]
            last = self.model.model(ids, cache=make_prompt_cache(self.model.model))[0, -1]
            mx.eval(last)
            logits.append(last)
        return logits


class Copying(TextEnvironment):
    """Keeps a cache of its own for each node, copied from its parent's."""

    def read_prompt(self, progress: Callable[[int, int], None] | None = None) -> None:
        super().read_prompt(progress)
        cache = make_prompt_cache(self.model.model)
        self.model.model(mx.array(self.prompt)[None], cache=cache)
        mx.eval([each.state for each in cache])
        self._caches = {ROOT: cache}

    def _pass(self, nodes: list[int]) -> list[mx.array]:
        logits = []
        for node in nodes:
            cache = make_prompt_cache(self.model.model)
            for new, old in zip(cache, self._caches[int(self.tree.parent[node])], strict=True):
                new.state = tree_map(_copied, old.state)
            token = mx.array([[int(self.tree.action[node])]])
            last = self.model.model(token, cache=cache)[0, -1]
            mx.eval(last, [each.state for each in cache])
            self._caches[node] = cache
            logits.append(last)
        return logits


def _copied(part: Any) -> Any:
    return mx.array(part) if isinstance(part, mx.array) else part


@dataclass(frozen=True)
class Measured:
    """One variant: simulations per second, and the time of others' over the best one of ours."""

    name: str
    simulations_per_second: Spread
    over_ours: Spread


@dataclass(frozen=True)
class Report:
    """Everything that :func:`bench_search` found."""

    model: str
    simulations: int
    setting: dict[str, Any]
    measured: list[Measured]

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be."""
        found = {each.name: each for each in self.measured}
        wanted = {READING: MIN_OVER_READING, COPYING: MIN_OVER_COPYING}
        return [
            Target(f"time of {name} / of ours", ">=", least, found[name].over_ours.median)
            for name, least in wanted.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1."""
        return {
            "schema": SCHEMA,
            "bench": "search",
            "model": self.model,
            "simulations": self.simulations,
            **self.setting,
            "runs": [asdict(each) for each in self.measured],
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def ours_name(leaves: int) -> str:
    return f"ours, {leaves} {'leaf' if leaves == 1 else 'leaves'} in a pass"


def bench_search(
    model: nn.Module,
    tokenizer: Any,
    *,
    prompt_tokens: int = 256,
    simulations: int = 32,
    leaves: Sequence[int] = (1, 4, 8, 16),
    rounds: int = 2,
    model_name: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure the simulations of a search's first token, by turns; reading the prompt is left out.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns them.
        prompt_tokens: at least 1.
        simulations: at least 1.
        leaves: leaves in one pass, each at least 1.
        rounds: runs of each variant, at least 1; one more warms up.
        model_name: what the report calls the model.
        progress: called with the name of each variant before it runs.

    Raises:
        ValueError: for an argument out of range.
    """
    check_count("simulations", simulations, most=MOST_TOKENS)
    if not leaves or min(leaves) < 1:
        raise TempoError(f"leaves must be at least 1, got {shown(list(leaves))}")
    check_count("leaves", max(leaves), most=MOST_WIDTH)
    positioned = PositionedModel.of(model)
    require_room(positioned, prompt_tokens, 1)
    vocabulary = Vocabulary(without_end(tokenizer))
    prompt = prompt_of(tokenizer, prompt_tokens)

    def run(kind: type[TextEnvironment], in_pass: int) -> float:
        # Wide and by turns, so that every simulation has a leaf of its own.
        settings = SearchSettings(
            simulations=simulations, leaves_per_batch=in_pass, threshold=ANY, selection="uct"
        )
        environment = kind(positioned, vocabulary, prompt, settings)
        environment.read_prompt()
        search = TreeSearch(
            environment.tree, environment.expand, environment.evaluate, settings.policy()
        )
        start = time.perf_counter()
        search.run(simulations)
        return time.perf_counter() - start

    variants = {ours_name(n): partial(run, TextEnvironment, n) for n in leaves}
    variants[READING] = partial(run, Rereading, max(leaves))
    variants[COPYING] = partial(run, Copying, max(leaves))
    seconds = alternate(variants, rounds, progress)
    ours = seconds[ours_name(max(leaves))]
    return Report(
        model=model_name or positioned.name or "",
        simulations=simulations,
        setting=describe(positioned, prompt_tokens, 1, rounds),
        measured=[
            Measured(name, Spread.of([simulations / each for each in taken]), ratio(taken, ours))
            for name, taken in seconds.items()
        ],
    )
