"""Slots, steps and parallel sets: what a run computed and what it offers to read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..view import snippet

#: In place of a slot where there is none.
NONE = -1

#: What a lattice knows of a slot: its step; the tokens of its set; the slot that it continues,
#: :data:`NONE` for the first one and for merged sets of several; and its weight as a key.
_SLOT = np.dtype(
    [("step", np.int64), ("set_size", np.int64), ("parent", np.int64), ("weight", np.float64)]
)


@dataclass(frozen=True)
class Slot:
    """One slot, as the definition of a visibility sees it.

    Args:
        index: number of the slot, in order of appending.
        step: step of its set; prompt tokens count down to -1 before step 0.
        set_size: tokens in its set.
        chain: the slots after the prompt that lead to it by their parents, itself included; empty
            for the prompt's.
    """

    index: int
    step: int
    set_size: int
    chain: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of a lattice, as a rule of visibility sees them; every array is [S], integers.

    Args:
        index: number of each slot, in order of appending.
        step: of its set; prompt tokens count down to -1 before step 0.
        set_size: tokens in its set.
        lattice: theirs.
    """

    index: np.ndarray
    step: np.ndarray
    set_size: np.ndarray
    lattice: "Lattice" = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Slots":
        return Slots(self.index[chosen], self.step[chosen], self.set_size[chosen], self.lattice)

    @property
    def parent(self) -> np.ndarray:
        """The slot that each continues; :data:`NONE` where it continues a whole set."""
        return self.lattice.column("parent", self.index)

    @property
    def chains(self) -> tuple[np.ndarray, ...]:
        """Of each slot, those after the prompt that lead to it by their parents, itself last."""
        return tuple(chain[chain != NONE][::-1] for chain in self.lattice.chains(self.index))


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
        #: every verdict on a set, in order
        self.pruning_decisions: list[PruningDecision] = []
        self.n_slots = length = len(prompt_tokens)
        # Grows by doubling: a step appends in amortised constant time.
        self._table = np.zeros(length, _SLOT)
        self._table["step"] = np.arange(-length, 0)
        self._table["parent"] = np.arange(-1, length - 1)
        self._table["set_size"] = self._table["weight"] = 1
        #: (slots, weights) of each :meth:`weigh`, and how many of them the rows of a step saw
        self._weighings: list[tuple[list[int], np.ndarray]] = []
        self._weighings_seen: dict[int, int] = {}

    def reserve(
        self, n: int, step: int | np.ndarray, parents: Sequence[int] | np.ndarray | None = None
    ) -> Slots:
        """Append n slots, the set of ``step``; returns them.

        Args:
            n: at least 0.
            step: of the set, or of each slot, [n].
            parents: the slot that each continues; None where it continues the set before.
        """
        start, end = self.n_slots, self.n_slots + n
        if end > len(self._table):
            more = np.zeros(max(end, 2 * len(self._table)) - len(self._table), _SLOT)
            self._table = np.concatenate([self._table, more])
        new = self._table[start:end]
        new["step"], new["set_size"], new["weight"] = step, n, 1
        if parents is not None:
            new["parent"] = parents
        else:
            # Where sets have one token, that is the slot before.
            new["parent"] = start - 1 if n == 1 else NONE
        self.n_slots = end
        return self.of(np.arange(start, end))

    def ahead(self, steps: np.ndarray) -> Slots:
        """Slots that single tokens of these later steps would have, [n]; nothing is reserved."""
        n = len(steps)
        return Slots(self.n_slots + np.arange(n), steps, np.ones(n, np.int64), self)

    def truncate(self, n: int) -> None:
        """Forget all slots but the first n."""
        self.n_slots = n

    def column(self, name: str, slots: np.ndarray | None = None) -> np.ndarray:
        """Step, set_size, parent or weight of slots; of all, in order of appending."""
        column: np.ndarray = self._table[name][: self.n_slots]
        return column if slots is None else column[slots]

    def chains(self, slots: np.ndarray) -> np.ndarray:
        """Each slot and those after the prompt that lead to it by their parents, nearest first.

        Found by doubling: who leads to a slot from twice as far leads to who leads to it.

        Args:
            slots: numbers, [n].

        Returns:
            slots [n, L], L at least the longest chain; :data:`NONE` where there is no more.
        """
        first = len(self.prompt_tokens)
        # Counted from the first slot after the prompt; NONE is the last entry and leads to itself.
        before = np.append(np.maximum(self.column("parent")[first:] - first, NONE), NONE)
        found = np.maximum(slots - first, NONE)[:, None]
        while (further := before.take(found))[:, :1].max(initial=NONE) != NONE:
            found, before = np.concatenate([found, further], axis=1), before.take(before)
        return np.where(found == NONE, NONE, found + first)

    def tokens_to(self, slot: int | None) -> list[Token]:
        """The tokens of the chain that ends with a slot, where tokens have parents."""
        if slot is None:
            return []
        steps = self.column("step")
        chain = self.chains(np.array([slot]))[0]
        found = []
        for each in chain[chain != NONE][::-1].tolist():
            tokens = self.steps[steps[each]].tokens
            found.append(tokens[each - tokens[0].slot])
        return found

    @property
    def slots(self) -> Slots:
        """All slots, in order of appending."""
        return self.of(np.arange(self.n_slots))

    def of(self, index: np.ndarray) -> Slots:
        """The slots of these numbers."""
        return Slots(index, self.column("step", index), self.column("set_size", index), self)

    @property
    def weights(self) -> np.ndarray:
        """Weight of each slot as a key, [S]; 1 unless a weighting has set it."""
        return self.column("weight")

    def weights_seen_by(self, queries: Slots) -> np.ndarray:
        """:attr:`weights` as they stand; noted as what the queries' steps saw."""
        self._weighings_seen |= dict.fromkeys(queries.step.tolist(), len(self._weighings))
        return self.weights

    def key_weights(self, step: int) -> np.ndarray | None:
        """Weights of keys [S] that the rows of a step saw; None without weighting."""
        if step not in self._weighings_seen:
            return None
        seen = np.ones(self.n_slots)
        for slots, weights in self._weighings[: self._weighings_seen[step]]:
            seen[slots] = weights
        return seen

    def weigh(self, slots: list[int], weights: np.ndarray) -> None:
        """Set the weights of a set's live tokens as keys; they are made to sum to 1."""
        self.weights[slots] = shares = weights / weights.sum()
        self._weighings.append((slots, shares))

    def apply(self, decision: PruningDecision, rule: str) -> None:
        """Record a verdict.

        Args:
            decision: on the live tokens of one set.
            rule: name of the pruning rule.
        """
        self.pruning_decisions.append(decision)
        tokens = {token.slot: token for token in self.steps[decision.set_step].tokens}
        verdicts = zip(decision.slots, decision.scores, decision.pruned, strict=True)
        for slot, score, pruned in verdicts:
            token = tokens[slot]
            token.score = score
            if pruned:
                token.pruned_at, token.pruned_by = decision.step, rule

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
