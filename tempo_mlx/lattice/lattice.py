"""Slots, steps and parallel sets: what a run computed and what it offers to read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..view import snippet

#: ``pruned_at`` of a slot that lives.
NEVER = np.iinfo(np.int64).max

#: ``pruned_at`` of a slot that no step may see.
ERASED = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Slot:
    """One slot, as the definition of a visibility sees it.

    Args:
        index: number of the slot, in order of appending.
        step: step of its set; prompt tokens count down to -1 before step 0.
        set_size: tokens in its set.
        chain: the slots behind the prompt that lead to it by their parents, itself included; empty
            for the prompt's.
    """

    index: int
    step: int
    set_size: int
    chain: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Slots:
    """What visibility needs to know of S slots; every array is [S], integers.

    Args:
        index: number of the slot, in order of appending.
        step: step of its set; prompt tokens count down to -1 before step 0.
        set_size: tokens in its set.
        pruned_at: step after whose forward pass it was pruned, or :data:`NEVER`.
        chains: where tokens have parents, for each slot the slots behind the prompt that lead to
            it, itself the last; None where that is not known.
    """

    index: np.ndarray
    step: np.ndarray
    set_size: np.ndarray
    pruned_at: np.ndarray
    chains: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Slots":
        chains = self.chains
        if chains is not None:
            chains = tuple(chains[i] for i in np.arange(len(self))[chosen])
        return Slots(
            self.index[chosen],
            self.step[chosen],
            self.set_size[chosen],
            self.pruned_at[chosen],
            chains,
        )


@dataclass
class Token:
    """One token of a parallel set.

    Args:
        id: token id.
        text: as it is shown, bytes of a part of a character as ``⟨e4 bb⟩``.
        probability: in the combined distribution that it was selected from, (0, 1].
        slot: number of its slot; counts appended slots, the prompt's first.
        parent: slot that it continues, where the visibility has parents.
        logprob: of the text from the prompt to this token, in nats, where it has parents.
        pruned_at: step after whose forward pass it was pruned; None while it lives.
        pruned_by: name of the rule that pruned it.
        score: the rule's score when it was last judged.
        raw: its UTF-8.
    """

    id: int
    text: str
    probability: float
    slot: int
    parent: int | None = None
    logprob: float | None = None
    pruned_at: int | None = None
    pruned_by: str | None = None
    score: float | None = None
    raw: bytes = b""

    def to_dict(self) -> dict[str, Any]:
        """The token as JSON-ready data; its bytes as integers."""
        data = asdict(self)
        head = {"id": data.pop("id"), "text": data.pop("text"), "bytes": list(data.pop("raw"))}
        return head | data


@dataclass(frozen=True)
class Ending:
    """An end-of-text token that qualified at a step, with its probability.

    Where tokens have parents: the slot that it ends, and the log-probability of the whole text.
    """

    id: int
    probability: float
    parent: int | None = None
    logprob: float | None = None


@dataclass
class Step:
    """One logical step: its parallel set and the endings that were possible there.

    ``tokens`` is empty only where the generation ended; ``threshold`` is the selection's.
    """

    step: int
    position: int
    threshold: float
    tokens: list[Token]
    endings: list[Ending] = field(default_factory=list)

    @property
    def live(self) -> list[Token]:
        """The tokens that have not been pruned."""
        return [token for token in self.tokens if token.pruned_at is None]


@dataclass(frozen=True)
class PruningDecision:
    """What was decided about one set after one step.

    Args:
        step: the step after whose forward pass the set was judged.
        set_step: the step of the set.
        threshold: the pruning threshold at that time.
        slots: of the set's live tokens, [n].
        scores: of the rule, [n].
        pruned: the verdict, [n].
    """

    step: int
    set_step: int
    threshold: float
    slots: list[int]
    scores: list[float]
    pruned: list[bool]


class Lattice:
    """Prompt and steps of one run, with the table of their slots.

    Args:
        prompt_tokens: ids, at least one.
    """

    def __init__(self, prompt_tokens: list[int]):
        self.prompt_tokens = list(prompt_tokens)
        self.steps: list[Step] = []
        #: p_i(x_j) of each set's tokens j in the rows i of the set before, [M, N]; by step
        self.transitions: list[np.ndarray] = []
        #: key weights [S] that the rows of a step saw, by step; empty without weighting
        self.key_weights: dict[int, np.ndarray] = {}
        #: every verdict on a set, in order
        self.pruning_decisions: list[PruningDecision] = []
        length = len(prompt_tokens)
        # Columns grow by doubling: a step appends in amortised constant time.
        self._step = np.arange(-length, 0)
        self._set_size = np.ones(length, np.int64)
        self._pruned_at = np.full(length, NEVER)
        self._weight = np.ones(length)
        self.n_slots = length
        self._chains: dict[int, np.ndarray] = {}

    def reserve(
        self, n: int, step: int | np.ndarray, parents: Sequence[int] | None = None
    ) -> Slots:
        """Append n slots, the set of ``step``; returns them.

        Args:
            n: at least 0.
            step: of the set, or of each slot, [n].
            parents: the slot that each continues, of the set before or the prompt's last.
        """
        end = self.n_slots + n
        if end > len(self._step):
            grow = max(end, 2 * len(self._step)) - len(self._step)
            self._step = np.concatenate([self._step, np.zeros(grow, np.int64)])
            self._set_size = np.concatenate([self._set_size, np.ones(grow, np.int64)])
            self._pruned_at = np.concatenate([self._pruned_at, np.full(grow, NEVER)])
            self._weight = np.concatenate([self._weight, np.ones(grow)])
        new = slice(self.n_slots, end)
        self._step[new] = step
        self._set_size[new] = n
        self.n_slots = end
        index = np.arange(new.start, end)
        chains = None
        if parents is not None:
            none = index[:0]
            chains = tuple(
                np.concatenate([self._chains.get(parent, none), index[i : i + 1]])
                for i, parent in enumerate(parents)
            )
            # Only the last set's chains go on.
            self._chains = dict(zip(index.tolist(), chains, strict=True))
        return Slots(index, self._step[new], self._set_size[new], self._pruned_at[new], chains)

    def ahead(self, steps: np.ndarray) -> Slots:
        """Slots that single tokens of these later steps would have, [n]; nothing is reserved."""
        n = len(steps)
        index = self.n_slots + np.arange(n)
        return Slots(index, steps, np.ones(n, np.int64), np.full(n, NEVER))

    def with_chains(self, slots: Slots) -> Slots:
        """The slots with the chains that lead to them; none for the prompt's."""
        parents = {token.slot: token.parent for step in self.steps for token in step.tokens}
        chains = []
        for slot in slots.index.tolist():
            chain: list[int] = []
            while slot in parents:
                chain.append(slot)
                slot = parents[slot]
            chains.append(np.array(chain[::-1], np.int64))
        return replace(slots, chains=tuple(chains))

    def tokens_to(self, slot: int | None) -> list[Token]:
        """The tokens of the chain that ends with a slot, where tokens have parents."""
        tokens = {token.slot: token for step in self.steps for token in step.tokens}
        chain = []
        while slot in tokens:
            chain.append(tokens[slot])
            slot = tokens[slot].parent
        return chain[::-1]

    @property
    def slots(self) -> Slots:
        """All slots, in order of appending."""
        n = self.n_slots
        return Slots(np.arange(n), self._step[:n], self._set_size[:n], self._pruned_at[:n])

    @property
    def weights(self) -> np.ndarray:
        """Weight of each slot as a key, [S]; 1 unless a weighting has set it."""
        return self._weight[: self.n_slots]

    def weights_seen_by(self, queries: Slots) -> np.ndarray:
        """:attr:`weights` as they stand; recorded as what the queries' steps saw."""
        for step in np.unique(queries.step):
            self.key_weights[int(step)] = self.weights.copy()
        return self.weights

    def weigh(self, slots: list[int], weights: np.ndarray) -> None:
        """Set the weights of a set's live tokens as keys; they are made to sum to 1."""
        self._weight[slots] = weights / weights.sum()

    def apply(self, decision: PruningDecision, rule: str, erase: bool = False) -> None:
        """Record a verdict: its pruned tokens are invisible after its step.

        Args:
            decision: on the live tokens of one set.
            rule: name of the pruning rule.
            erase: invisible to every step, as if they had never been there.
        """
        self.pruning_decisions.append(decision)
        tokens = {token.slot: token for token in self.steps[decision.set_step].tokens}
        verdicts = zip(decision.slots, decision.scores, decision.pruned, strict=True)
        for slot, score, pruned in verdicts:
            token = tokens[slot]
            token.score = score
            if pruned:
                token.pruned_at, token.pruned_by = decision.step, rule
                self._pruned_at[slot] = ERASED if erase else decision.step

    def _repr_html_(self) -> str:
        """What a notebook shows, drawn by a script; a lattice does not know its prompt's text."""
        data = {"prompt_tokens": self.prompt_tokens, "steps": self.steps_to_dict()}
        return snippet(data, self.as_text())

    def as_text(self) -> str:
        """The steps as a terminal shows them, pruned tokens between tildes."""
        from .rendering import StepWriter, plain

        writer = StepWriter()
        spans = [span for step in self.steps for span in writer.write(step)]
        return plain([*spans, *writer.finish()])

    def __len__(self) -> int:
        """Steps with tokens."""
        return sum(bool(step.tokens) for step in self.steps)

    @property
    def sets(self) -> list[list[Token]]:
        """The live tokens of each step that has any, most probable first."""
        return [step.live for step in self.steps if step.live]

    @property
    def n_tokens(self) -> int:
        """Tokens in all sets."""
        return sum(len(step.tokens) for step in self.steps)

    def steps_to_dict(self) -> list[dict[str, Any]]:
        """The ``steps`` of the result's schema, version 2."""
        return [
            asdict(step) | {"tokens": [token.to_dict() for token in step.tokens]}
            for step in self.steps
        ]
