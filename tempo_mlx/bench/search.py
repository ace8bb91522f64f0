"""Search in one sequence state, compared with searches that reread texts or copy the cache."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from ..search import SearchSettings, TreeSearch
from ..search.environment import TextEnvironment
from ..search.tree import ROOT
from ..text.vocabulary import Vocabulary, without_end
from .result import Result, Target, compared, finder
from .setting import Subject, prompt_of

READING, COPYING = "rereading each text", "copying the cache for each branch"
#: A threshold that every token reaches.
ANY = 1e-30

MIN_OVER_READING, MIN_OVER_COPYING = 10.0, 2.0

TIME = "time"


class Rereading(TextEnvironment):
    """Reads a leaf's whole text, including the prompt, whenever the leaf is expanded."""

    def _pass(self, nodes: list[int]) -> list[mx.array]:
        logits = []
        for node in nodes:
            ids = mx.array([*self.prompt, *self.tree.path(node)])[None]
            last = self.model.model(ids, cache=make_prompt_cache(self.model.model))[0, -1]
            mx.eval(last)
            logits.append(last)
        return logits


class Copying(TextEnvironment):
    """Keeps a separate cache for each node, copied from its parent's."""

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


def ours_name(leaves: int) -> str:
    return f"ours, {leaves} {'leaf' if leaves == 1 else 'leaves'} in a pass"


def bench_search(
    subject: Subject, prompt_tokens: int, simulations: int, leaves: Sequence[int]
) -> Result:
    """Measure the simulations of a search's first token, in alternation, without the prompt.

    Args:
        subject: the model.
        prompt_tokens: at least 1.
        simulations: at least 1.
        leaves: numbers of leaves in one pass, each at least 1.

    Raises:
        TempoError: if the prompt does not fit into the model's context.
    """
    subject.require_room(prompt_tokens, 1)
    vocabulary = Vocabulary(without_end(subject.tokenizer))
    prompt = prompt_of(subject.tokenizer, prompt_tokens)

    def run(kind: type[TextEnvironment], in_pass: int) -> float:
        # A wide tree searched with uct, so every simulation has its own leaf.
        settings = SearchSettings(
            simulations=simulations, leaves_per_batch=in_pass, threshold=ANY, selection="uct"
        )
        environment = kind(subject.model, vocabulary, prompt, settings)
        environment.read_prompt()
        search = TreeSearch(
            environment.tree, environment.expand, environment.evaluate, settings.policy()
        )
        start = time.perf_counter()
        search.run(simulations)
        return time.perf_counter() - start

    widest = max(leaves)
    variants = {ours_name(n): partial(run, TextEnvironment, n) for n in leaves}
    variants[READING] = partial(run, Rereading, widest)
    variants[COPYING] = partial(run, Copying, widest)
    subject.expect(len(variants))
    seconds = subject.alternate(variants)
    speeds = {name: [simulations / each for each in taken] for name, taken in seconds.items()}
    group = f"{simulations} simulations of the first token"
    rows = [
        *compared(group, "simulations/s", "", speeds),
        *compared(group, TIME, "s", seconds, ours_name(widest)),
    ]
    found = finder(rows)
    targets = [
        Target(
            f"time of {name} / of ours",
            ">=",
            least,
            found(name, TIME).ratios[ours_name(widest)].median,
        )
        for name, least in {READING: MIN_OVER_READING, COPYING: MIN_OVER_COPYING}.items()
    ]
    setting = subject.describe(prompt_tokens=prompt_tokens, simulations=simulations)
    return Result("search", subject.name, setting, rows, targets)
