"""What a tree search sees of a language model: texts as nodes, tokens as actions.

All nodes live in one sequence state, each in one slot that sees the prompt, its ancestors and
itself, so a node's probabilities are those of a sequential decode of its text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..decode.decoder import CacheBudgetError
from ..decode.sequences import Batch, SequenceState
from ..lattice.lattice import Lattice
from ..models import PositionedModel
from ..numerics import softmax, tempered
from ..rules.grammar import Grammar, compiled
from ..rules.selection import most_probable, noise_key, require_finite
from ..text.vocabulary import Vocabulary
from .settings import SearchSettings, evaluation_rule
from .tree import NONE, ROOT, Tree

#: (ids of a text's tokens after the prompt, the text) -> its value in [0, 1].
Value = Callable[[list[int], str], float]


@dataclass(frozen=True)
class Batched:
    """A value function that takes all texts of a batch at once.

    Args:
        function: (list of (ids, text)) -> their values in [0, 1].
    """

    function: Callable[[list[tuple[list[int], str]]], Sequence[float]]


class TextEnvironment:
    """Expands and evaluates the nodes of a tree of texts.

    Args:
        model: reads the tokens.
        vocabulary: its tokens.
        prompt: ids, at least one.
        settings: threshold, evaluation, budgets.
        value: a function for the leaves' texts, in place of ``settings.evaluation``.
    """

    def __init__(
        self,
        model: PositionedModel,
        vocabulary: Vocabulary,
        prompt: list[int],
        settings: SearchSettings,
        value: Value | Batched | None = None,
    ):
        self.tree = Tree(prompt[-1])
        self.settings = settings
        self.vocabulary = vocabulary
        self.forward_tokens = self.passes = 0
        #: probabilities of the committed tokens
        self.committed: list[float] = []
        self.model = model
        self.prompt = prompt
        self._value = value
        self._lattice = Lattice(prompt)
        self._sequence = SequenceState(self._lattice, "tree")
        self._batch = Batch(model, [self._sequence])
        grammar = compiled(settings.json_schema, settings.regex, settings.grammar)
        #: leaves the tokens that a text may go on with, if a grammar says which
        self._grammar = grammar and Grammar(grammar, vocabulary.tokenizer, 0, model.vocabulary_size)
        # Any node may be continued.
        self._batch.cache.keeps_states = True
        room = (model.context_length or len(prompt) + settings.max_tokens) - len(prompt)
        self._longest = min(settings.max_tokens, room)
        #: why the longest text ends
        self.limit_reason = "context" if room < settings.max_tokens else "length"
        #: of the nodes that passed through the model
        self._slots: dict[int, int] = {ROOT: len(prompt) - 1}
        self._logits: dict[int, mx.array] = {}  # of the nodes expanded last
        self._draws = 0

    def read_prompt(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the prompt, the root of the tree."""
        with mx.stream(generation_stream):
            logits = self._batch.prefill(self.settings.prefill_step_size, progress)
            mx.eval(logits, self._batch.cache.state)
        self.forward_tokens += len(self._lattice.prompt_tokens)
        self.passes += 1
        self._logits = {ROOT: logits[0]}

    def is_end(self, node: int) -> bool:
        """Whether nothing follows a node: an end token, a stop text, or the longest text."""
        tree = self.tree
        if tree.depth[node] >= self._longest or self.is_stopped(self.tokens(node)):
            return True
        return node != ROOT and int(tree.action[node]) in self.vocabulary.end_tokens

    def is_stopped(self, ids: list[int]) -> bool:
        """Whether a text's tokens spell a stop text."""
        stops = self.settings.stop
        text = self.vocabulary.decode(ids) if stops else ""
        return any(stop in text for stop in stops)

    def probabilities(self, node: int) -> list[float]:
        """Of the tokens of a node's text, the committed ones first."""
        found = []
        while node != ROOT:
            found.append(float(self.tree.prior[node]))
            node = int(self.tree.parent[node])
        return self.committed + found[::-1]

    def tokens(self, node: int) -> list[int]:
        """Ids of a node's text after the prompt, an end token left out."""
        path = self.tree.path(node)
        return path[:-1] if path and path[-1] in self.vocabulary.end_tokens else path

    def expand(self, nodes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens that may follow each node, and their probabilities; one forward pass for all."""
        going = [node for node in nodes if not self.is_end(node)]
        new = [node for node in going if node not in self._logits]
        if new:
            self._logits = dict(zip(new, self._pass(new), strict=True))
        families = {}
        if going:
            with mx.stream(generation_stream):
                logits = mx.stack([self._logits[n] for n in going]).astype(mx.float32)
                left = softmax(self._allowed(logits, [self.tokens(n) for n in going]))
                ids = most_probable(left, self.settings.max_parallel)
                compared = mx.take_along_axis(left, ids, axis=1)
                p = mx.take_along_axis(softmax(logits), ids, axis=1) if self._grammar else compared
                mx.eval(ids, compared, p, self._batch.cache.state)
            rows = zip(going, np.array(ids), np.array(compared), np.array(p), strict=True)
            for node, own, chance, prior in rows:
                require_finite(chance.sum())
                n = max(1, int((chance >= self.settings.threshold).sum()))
                families[node] = own[:n].astype(np.int64), prior[:n].astype(float)
        none = np.zeros(0, np.int64), np.zeros(0)
        return [families.get(node, none) for node in nodes]

    def _allowed(self, logits: mx.array, texts: Sequence[Sequence[int]]) -> mx.array:
        """Logits [n, V] with -inf for tokens that the grammar does not allow after the texts."""
        if not self._grammar:
            return logits
        rows = [
            self._grammar(mx.array(list(text), mx.int32), logits[i : i + 1])
            for i, text in enumerate(texts)
        ]
        return mx.concatenate(rows)

    def evaluate(self, nodes: list[int]) -> Iterable[float]:
        """The value of each node's text, in [0, 1]."""
        if isinstance(self._value, Batched):
            texts = [self.tokens(node) for node in nodes]
            return self._value.function([(ids, self.vocabulary.decode(ids)) for ids in texts])
        if self._value is not None:
            return self._by_function(self._value, nodes)
        rule = evaluation_rule(self.settings.evaluation)
        if rule.rolls_out:
            return [rule(probabilities) for probabilities in self._rollouts(nodes)]
        return [rule(self.probabilities(node)) for node in nodes]

    def _by_function(self, value: Value, nodes: list[int]) -> Iterable[float]:
        for node in nodes:
            ids = self.tokens(node)
            yield value(ids, self.vocabulary.decode(ids))

    def commit(self, child: int) -> np.ndarray:
        """Make a child of the root the root; slots of the other branches are dropped.

        Returns:
            the new number of each old node; see :meth:`.tree.Tree.commit`.
        """
        self.committed.append(float(self.tree.prior[child]))
        numbers = self.tree.commit(child)
        for name in ("_slots", "_logits"):
            kept = {int(numbers[node]): known for node, known in getattr(self, name).items()}
            kept.pop(NONE, None)
            setattr(self, name, kept)
        slots = np.array(list(self._slots.values()), np.int64)
        live = np.zeros(self._lattice.n_slots + 1, bool)
        live[: len(self.prompt)] = live[self._lattice.chains(slots)] = True
        held = self._sequence.held
        self._sequence.drop(held[~live[held]])
        self._batch.compact()
        return numbers

    def _pass(self, nodes: list[int]) -> list[mx.array]:
        """Read the last tokens of nodes whose parents were read; the logits [V] of each."""
        tree = self.tree
        parents = [self._slots[int(tree.parent[node])] for node in nodes]
        tokens = mx.array(tree.action[nodes].astype(np.int32))
        logits, slots = self._append(tokens, tree.depth[nodes] - 1, parents)
        self._slots |= zip(nodes, slots, strict=True)
        return [logits[i] for i in range(len(nodes))]

    def _append(
        self, tokens: mx.array, steps: np.ndarray, parents: list[int]
    ) -> tuple[mx.array, list[int]]:
        """Append tokens that continue these slots, in one forward pass.

        Returns:
            logits [n, V], lazy, and the new slots.
        """
        n = len(parents)
        self._require_room(n)
        queries = self._lattice.reserve(n, steps, parents)
        with mx.stream(generation_stream):
            logits, _ = self._batch.append(tokens, [(self._sequence, queries)], note=False)
        self.forward_tokens += n
        self.passes += 1
        return logits, queries.index.tolist()

    def _require_room(self, n: int) -> None:
        budget = self.settings.max_kv_bytes
        if budget is None:
            return
        growth = {self._sequence: n}
        if self._batch.bytes_after(growth) > budget:
            # Without the room for more that is there.
            self._batch.shrink()
        needed = self._batch.bytes_after(growth)
        if needed > budget:
            raise CacheBudgetError(
                f"{n} more leaves need a cache of {needed:,} bytes, max_kv_bytes is "
                f"{budget:,}; raise it, or search with fewer leaves_per_batch, simulations or depth"
            )
        self._batch.limit_room(growth, budget)

    def _rollouts(self, nodes: list[int]) -> list[list[float]]:
        """Continue the nodes' texts side by side; the probabilities of all their tokens."""
        found = {node: self.probabilities(node) for node in nodes}
        going = [node for node in nodes if not self.is_end(node)]
        missing = [node for node in going if node not in self._logits]
        if missing:
            self._logits |= dict(zip(missing, self._pass(missing), strict=True))
        before = self._lattice.n_slots
        ends = [self._slots[node] for node in going]
        texts = [self.tokens(node) for node in going]
        logits = mx.stack([self._logits[node] for node in going]) if going else None
        for step in range(self.settings.depth):
            if logits is None:
                break
            ids, chances = self._draw(self._allowed(logits, texts), logits)
            mx.eval(ids, chances, self._batch.cache.state)
            picked, p = np.array(ids), np.array(chances)
            require_finite(p.sum())
            for node, chance in zip(going, p.tolist(), strict=True):
                found[node].append(chance)
            on = [
                i
                for i, node in enumerate(going)
                if picked[i] not in self.vocabulary.end_tokens
                and len(found[node]) < self._longest
                and not self.is_stopped([*texts[i], int(picked[i])])
            ]
            if not on or step + 1 == self.settings.depth:
                break
            going = [going[i] for i in on]
            texts = [[*texts[i], int(picked[i])] for i in on]
            depths = np.array([len(found[node]) - 1 for node in going])
            logits, ends = self._append(ids[mx.array(on)], depths, [ends[i] for i in on])
        self._batch.take_back(self._sequence, before)
        return [found[node] for node in nodes]

    def _draw(self, allowed: mx.array, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The next token of each row of allowed logits [n, V], and the model's probability."""
        with mx.stream(generation_stream):
            p = softmax(logits.astype(mx.float32))
            allowed = allowed.astype(mx.float32)
            if self.settings.rollout_temp == 0:
                ids = mx.argmax(allowed, axis=-1)
            else:
                self._draws += 1
                key = mx.array(noise_key(self.settings.seed, self._draws))
                ids = mx.random.categorical(tempered(allowed, self.settings.rollout_temp), key=key)
            return ids, mx.take_along_axis(p, ids[:, None], axis=1)[:, 0]
