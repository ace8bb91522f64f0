"""Sequences in one cache: which slot of which row holds what, and what each token may see."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from ..drafts import Draft
from ..lattice.lattice import NONE, Lattice, Slots
from ..models import Capture, PositionedModel, SlotStore
from ..rules.pruning import COMPACT_ABOVE
from ..rules.visibility import Visibility, may_attend, visibility_of, weighted_rows

#: Largest share of unused slots after sequences are repacked into rows.
REPACKED_WASTE = 0.1


@dataclass(frozen=True, eq=False)
class Drafted:
    """A draft that a pass has read.

    Args:
        draft: its tokens.
        at: their places in the row, [D].
        logits: of the pass, [D, V].
    """

    draft: Draft
    at: np.ndarray
    logits: mx.array


@dataclass(eq=False)
class SequenceState:
    """One lattice's slots in the cache.

    Args:
        lattice: its slots are what the cache holds.
        visibility: a rule, or its name in :data:`tempo_mlx.rules.visibility.VISIBILITY`.
        weighted: whether keys are weighted by ``lattice.weights`` in the mask.
        keep_logits: keep every pass's logits, [N, V] each, for
            :mod:`~tempo_mlx.decode.verification`.
        is_line: every set has one token and none is pruned, so that each sees all before it.
    """

    lattice: Lattice
    visibility: Visibility | str = "isolated"
    weighted: bool = False
    keep_logits: bool = False
    is_line: bool = False
    #: row of the cache
    row: int = 0
    #: place in the row of each slot of the lattice, NONE where the cache does not hold it; replaced
    #: whenever it changes
    place: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    #: slots that are held no more and stay in the row until it is compacted
    n_dropped: int = 0
    #: slots that are appended next
    pending: Slots | None = None
    #: (lattice slots [N], logits [N, V]) of each pass, if they are kept
    logits: list[tuple[np.ndarray, mx.array]] = field(default_factory=list)
    last: tuple[np.ndarray, mx.array] | None = None
    #: what follows the last set in the row and was neither accepted nor dropped yet
    drafted: "Drafted | None" = None
    #: what :meth:`seen_by` found last, and what it was asked of
    _seen: tuple[Slots, np.ndarray, np.ndarray] | None = None

    @property
    def held(self) -> np.ndarray:
        """The slots that are held, [S]: numbers in the lattice, ascending."""
        return np.flatnonzero(self.place != NONE)

    @property
    def at(self) -> np.ndarray:
        """Their places in the row, [S]."""
        return self.place[self.place != NONE]

    @property
    def n_held(self) -> int:
        """S."""
        return int(np.count_nonzero(self.place != NONE))

    @property
    def n_drafted(self) -> int:
        """Slots of the draft, of which some have been accepted at most."""
        return 0 if self.drafted is None else len(self.drafted.at)

    def seen_by(self, queries: Slots) -> np.ndarray:
        """Which held slots and, behind them, new ones each of the new slots may see, [N, S + N].

        Found once for a set, whose visibility is asked for before its pass and in it.
        """
        if self._seen is not None and self._seen[0] is queries and self._seen[1] is self.place:
            return self._seen[2]
        if self.is_line and len(queries) == 1:
            seen = np.ones((1, self.n_held + 1), bool)
        else:
            keys = self.lattice.of(np.concatenate([self.held, queries.index]))
            seen = may_attend(self.visibility, queries, keys)
        self._seen = queries, self.place, seen
        return seen

    def seen_with(self, queries: Slots, draft: Draft) -> np.ndarray:
        """As :meth:`seen_by`, with a draft behind the new slots: [N + D, S + N + D].

        A drafted token sees what it would see as the one token of its step, and of the draft only
        the tokens that lead to it.
        """
        seen = self.seen_by(queries)
        N, S = seen.shape
        rule = visibility_of(self.visibility)
        if self.is_line or rule.has_parents:
            # All of the text that the one new token ends.
            before = np.repeat(seen[-1:], len(draft), axis=0)
        else:
            keys = self.lattice.of(np.concatenate([self.held, queries.index]))
            ahead = self.lattice.ahead(int(queries.step[-1]) + draft.depths)
            before = may_attend(rule, ahead, keys)
        none = np.zeros((N, len(draft)), bool)
        return np.block([[seen, none], [before, draft.sees()]])

    def accept(self, place: int, index: int) -> None:
        """Hold a drafted token as the lattice's slot ``index``, which it has become."""
        drafted = self.drafted
        assert drafted is not None
        self.hold(np.array([index]), int(drafted.at[place]))
        self.take(self.lattice.slots[index : index + 1], drafted.logits[place : place + 1])

    def seen_by_next(self) -> np.ndarray:
        """The held slots that the pending set, or any later one, may see, ascending."""
        held = self.held
        if self.pending is None or self.is_line or not visibility_of(self.visibility).monotone:
            return held
        return held[np.any(self.seen_by(self.pending)[:, : len(held)], axis=0)]

    def hold(self, slots: np.ndarray, first: int) -> None:
        """Hold these slots too, side by side from a place on."""
        place = np.full(max(len(self.place), slots.max(initial=NONE) + 1), NONE)
        place[: len(self.place)] = self.place
        place[slots] = np.arange(first, first + len(slots))
        self.place = place

    def gather(self, slots: np.ndarray, first: int) -> np.ndarray:
        """Hold only these slots, and the draft behind them, side by side from a place on.

        Returns:
            their places before.
        """
        before = [self.place[slots]]
        if self.drafted is not None:
            before.append(self.drafted.at)
            at = first + len(slots) + np.arange(len(self.drafted.at))
            self.drafted = replace(self.drafted, at=at)
        self.place, self.n_dropped = np.zeros(0, np.int64), 0
        self.hold(slots, first)
        return np.concatenate(before)

    def drop(self, slots: np.ndarray | list[int]) -> None:
        """Hold these slots no more; they stay in the cache until it is compacted."""
        before = self.n_held
        self.place = self.place.copy()
        self.place[slots] = NONE
        self.n_dropped += before - self.n_held

    def take(self, queries: Slots, logits: mx.array) -> None:
        """Note the logits [N, V] of a pass over these slots."""
        self.last = queries.index, logits
        if self.keep_logits:
            self.logits.append(self.last)

    def passed(self) -> mx.array:
        """Logits of the last set's tokens that live, [N, V]."""
        assert self.last is not None
        index, logits = self.last
        step = self.lattice.column("step")[index]
        live = (step == step[-1]) & (self.place[index] != NONE)
        return logits[mx.array(np.flatnonzero(live))]

    def forget(self, first_step: int) -> None:
        """Let go of what was read at ``first_step`` and later."""
        step = self.lattice.column("step")
        self.drop(np.flatnonzero(step[: len(self.place)] >= first_step))
        self.logits = [
            (index[early], rows[mx.array(early)])
            for index, rows in self.logits
            if (early := np.flatnonzero(step[index] < first_step)).size
        ]


class Batch:
    """Sequences that share one cache and one forward pass.

    A row of the cache holds one sequence, or several short ones beside each other: who sees whom
    is a matter of the mask.

    Args:
        model: reads the tokens.
        sequences: the first ones, a row each.
        cache: what they hold already; all rows alike in number of slots.
    """

    def __init__(
        self,
        model: PositionedModel,
        sequences: Sequence[SequenceState],
        cache: SlotStore | None = None,
    ):
        self.model = model
        self.sequences = list(sequences)
        self.cache = model.make_cache(max(1, len(self.sequences))) if cache is None else cache
        self.cache.continue_as(model.quantization)
        for row, sequence in enumerate(self.sequences):
            sequence.row = row
            sequence.place = np.arange(self.cache.counts[row])

    def prefill(
        self, step_size: int, progress: Callable[[int, int], None] | None = None
    ) -> mx.array:
        """Read the prompts, ``step_size`` tokens in a pass; logits of the last tokens, [B, V]."""
        for done, total in self.read(step_size):
            if progress is not None:
                progress(done, total)
        logits = self.read_last()
        if progress is not None:
            mx.eval(logits, self.cache.state)
            total = sum(len(s.lattice.prompt_tokens) for s in self.sequences)
            progress(total, total)
        return logits

    def read(self, step_size: int) -> Iterator[tuple[int, int]]:
        """Read the prompts but their last tokens, in chunks; yields (tokens read, tokens)."""
        prompts = [sequence.lattice.prompt_tokens for sequence in self.sequences]
        total = sum(map(len, prompts))
        chunk = max(1, step_size // len(prompts))
        while True:
            parts, ids = [], []
            for sequence, prompt in zip(self.sequences, prompts, strict=True):
                start = sequence.n_held
                end = min(start + chunk, len(prompt) - 1)
                if end > start:
                    parts.append((sequence, sequence.lattice.slots[start:end]))
                    ids.append(prompt[start:end])
            if not parts:
                return
            # The chunk's logits are never read, so they are never computed.
            self.append(mx.array(np.concatenate(ids)), parts, note=False)
            mx.eval(self.cache.state)
            mx.clear_cache()
            yield sum(sequence.n_held for sequence in self.sequences), total

    def read_last(self) -> mx.array:
        """Read the prompts' last tokens; their logits, [B, V]."""
        last = [sequence.lattice.prompt_tokens[-1] for sequence in self.sequences]
        parts = [
            (s, s.lattice.slots[s.n_held : len(s.lattice.prompt_tokens)]) for s in self.sequences
        ]
        return self.append(mx.array(last), parts)[0]

    def append(
        self,
        tokens: mx.array,
        parts: Sequence[tuple[SequenceState, Slots]],
        capture: Capture | None = None,
        note: bool = True,
        drafts: Sequence[Draft | None] | None = None,
    ) -> tuple[mx.array, dict[int, Any]]:
        """Append tokens in one forward pass, each at the position of its step.

        Args:
            tokens: ids of all parts, one after another, each with its draft behind it, [N].
            parts: sequences and their new slots, reserved in the lattice; no sequence twice.
            capture: attention to report; row weights for the N tokens.
            note: let the sequences know their logits.
            drafts: of each part what is read with it, and becomes its sequence's ``drafted``.

        Returns:
            logits [N, V]; by layer what the capture reports of the attention over the slots of
            the rows, empty without a capture.
        """
        drafts = [None] * len(parts) if drafts is None else drafts
        sizes = [
            len(queries) + (0 if draft is None else len(draft))
            for (_, queries), draft in zip(parts, drafts, strict=True)
        ]
        rows = np.array([s.row for (s, _), n in zip(parts, sizes, strict=True) for _ in range(n)])
        positions = np.concatenate(
            [
                len(s.lattice.prompt_tokens) + _steps(queries, draft)
                for (s, queries), draft in zip(parts, drafts, strict=True)
            ]
        )
        causal = self._is_causal(parts, drafts)
        seen = (
            []
            if causal
            else [
                sequence.seen_by(queries) if draft is None else sequence.seen_with(queries, draft)
                for (sequence, queries), draft in zip(parts, drafts, strict=True)
            ]
        )
        used = self.cache.counts.copy()
        ahead = []
        for (sequence, queries), n in zip(parts, sizes, strict=True):
            first = int(used[sequence.row]) + len(queries)
            sequence.hold(queries.index, first - len(queries))
            ahead.append(np.arange(first, first + n - len(queries)))
            used[sequence.row] += n
        mask = "causal" if causal else self._mask(parts, seen, ahead, int(used.max()))
        parents = self._parents(parts) if self.model.is_recurrent else None
        attention: dict[int, Any] = {}
        arguments = tokens[None], positions[None], mask, self.cache
        if capture is None:
            logits = self.model(*arguments, rows=rows, parents=parents)
        else:
            logits, attention = self.model(*arguments, capture, rows, parents=parents)
        logits = logits.squeeze(0)
        if note:
            ends = accumulate(sizes)
            for (sequence, queries), draft, at, n, end in zip(
                parts, drafts, ahead, sizes, ends, strict=True
            ):
                own = logits[end - n : end] if len(parts) > 1 else logits
                if draft is not None:
                    sequence.drafted = Drafted(draft, at, own[len(queries) :])
                    own = own[: len(queries)]
                sequence.take(queries, own)
        return logits, attention

    def drop_draft(self, sequence: SequenceState) -> None:
        """Let go of what is left of a sequence's draft.

        Where nothing came after it in its row, its slots are free again, and what was accepted
        follows the slots before it without a gap.
        """
        drafted, sequence.drafted = sequence.drafted, None
        if drafted is None or self.cache.counts[sequence.row] != drafted.at[-1] + 1:
            return
        start = int(drafted.at[0])
        accepted = np.flatnonzero(sequence.place >= start)
        places, end = sequence.place[accepted], start + len(accepted)
        if (places != np.arange(start, end)).any():
            self.cache.move(sequence.row, places, start)
            sequence.hold(accepted, start)
        self.cache.truncate(end, sequence.row)

    def _parents(self, parts: Sequence[tuple[SequenceState, Slots]]) -> np.ndarray | None:
        """The place in its row of the slot that each new token continues, [N]; None for prompts."""
        if all((queries.step < 0).all() for _, queries in parts):
            return None
        return np.concatenate([sequence.place[queries.parent] for sequence, queries in parts])

    def _is_causal(
        self, parts: Sequence[tuple[SequenceState, Slots]], drafts: Sequence[Draft | None]
    ) -> bool:
        """Whether all rows grow alike and hold nothing that a new token may not see."""
        n, held = len(parts[0][1]), self.cache.n_slots
        if any(draft is not None for draft in drafts):
            # One line, and a chain behind it.
            alone = len(parts) == len(self.sequences) == self.cache.batch_size == 1
            (sequence, _), draft = parts[0], drafts[0]
            chain = alone and n == 1 and sequence.n_held == held and sequence.is_line
            return chain and draft is not None and draft.is_chain
        alike = len(parts) == len(self.sequences) == self.cache.batch_size and all(
            len(queries) == n and sequence.n_held == held and not sequence.weighted
            for sequence, queries in parts
        )
        if not alike:
            return False
        if n == 1 and all(s.is_line or bool(s.seen_by(queries).all()) for s, queries in parts):
            return True
        return all(bool((queries.step < 0).all()) for _, queries in parts)

    def _mask(
        self,
        parts: Sequence[tuple[SequenceState, Slots]],
        seen: list[np.ndarray],
        ahead: list[np.ndarray],
        width: int,
    ) -> mx.array:
        """What each new token sees of the slots of its row, [1, 1, N, S].

        Args:
            parts: sequences, which hold their new slots.
            seen: what these see of what their sequence holds, and of its draft.
            ahead: places of the drafts' tokens.
            width: S.
        """
        weighted = any(sequence.weighted for sequence, _ in parts)
        mask = np.full((sum(map(len, seen)), width), -np.inf if weighted else False)
        done = 0
        for (sequence, queries), rows, drafted in zip(parts, seen, ahead, strict=True):
            if weighted:
                keys = sequence.lattice.of(sequence.held)
                weights = np.ones(len(keys))
                if sequence.weighted:
                    weights = sequence.lattice.weights_seen_by(queries)[keys.index]
                rows = weighted_rows(rows, queries, keys, weights)
            mask[done : done + len(rows), np.concatenate([sequence.at, drafted])] = rows
            done += len(rows)
        return mx.array((mask.astype(np.float32) if weighted else mask)[None, None])

    def take_back(self, sequence: SequenceState, n: int) -> None:
        """Forget all slots of a lattice but the first n; its sequence is the only one."""
        later = sequence.place[n:]
        self.cache.truncate(int(later[later != NONE].min(initial=self.cache.n_slots)))
        sequence.lattice.truncate(n)
        sequence.place = sequence.place[:n]

    def recompute(self, fallen: Sequence[tuple[SequenceState, int]]) -> None:
        """Run each sequence's live slots of a step and later again, as visibility stands now.

        Args:
            fallen: sequences and the first step to run again. Their logits: ``passed()``.
        """
        parts, ids = [], []
        for sequence, first_step in fallen:
            again = [t for step in sequence.lattice.steps[first_step:] for t in step.live]
            if again:
                sequence.forget(first_step)
                ids += [token.id for token in again]
                slots = np.array([token.slot for token in again])
                parts.append((sequence, sequence.lattice.of(slots)))
        if parts:
            if len(self.sequences) == 1:
                # Nothing else is in the cache: what was dropped leaves it at once.
                self.keep([self.sequences[0].held])
            self.append(mx.array(ids), parts)

    def prompt_slots(self, sequence: SequenceState) -> SlotStore | None:
        """A cache of its own with the slots of a sequence's prompt, its last token left out.

        None where layers are recurrent, whose states have gone on from the prompt's.
        """
        if self.model.is_recurrent:
            return None
        prompt = sequence.place[: len(sequence.lattice.prompt_tokens) - 1]
        alone = self.cache.extract(sequence.row)
        alone.compact(prompt[prompt != NONE])
        return alone

    def slots_of(self, sequence: SequenceState) -> SlotStore:
        """A cache of its own with the slots that a sequence holds, in that order."""
        alone = self.cache.extract(sequence.row)
        alone.compact(sequence.at)
        return alone

    def release(self, sequence: SequenceState) -> None:
        """Take a sequence out; an empty row is free at once."""
        self.sequences.remove(sequence)
        if all(other.row != sequence.row for other in self.sequences):
            self.cache.clear(sequence.row)

    def adopt(self, other: "Batch", copies: Sequence[tuple[SequenceState, SequenceState]]) -> None:
        """Take over sequences of another batch.

        Args:
            other: of no use afterwards.
            copies: its sequences and those that start from copies of their slots here; a sequence
                may be copied more than once.
        """
        # A sequence may be its own copy: where it was is noted before it moves.
        sources = [(source.row, source.place) for source, _ in copies]
        moved = [new for _, new in copies]
        if not self.sequences:
            self.cache = other.cache
            rows = [row for row, _ in sources]
            if rows != list(range(self.cache.batch_size)):
                self.cache.select(rows)
            for row, (new, (_, place)) in enumerate(zip(moved, sources, strict=True)):
                new.row, new.place = row, place
            self.sequences = moved
            return
        for new, (source, place) in zip(moved, sources, strict=True):
            free = self._row_for(int(other.cache.counts[source]))
            if free is None:
                new.row = self.cache.batch_size
                self.cache = SlotStore.merge([self.cache, other.cache.extract(source)])
            else:
                slots = self.cache.adopt(other.cache, source, free)
                new.row, place = free, np.append(slots, NONE)[place]
            new.place = place
            self.sequences.append(new)
        self.sequences.sort(key=lambda sequence: sequence.row)

    def _row_for(self, n: int) -> int | None:
        """A row that takes n slots without making the batch wider, or an empty one."""
        counts = self.cache.counts
        row = int(counts.argmin())
        return row if counts[row] == 0 or counts[row] + n <= self.cache.n_slots else None

    def width_after(self, growth: Mapping[SequenceState, int]) -> int:
        """Slots of the longest row once sequences have appended so many."""
        counts = self.cache.counts.copy()
        for sequence in self.sequences:
            counts[sequence.row] += growth.get(sequence, 0)
        return int(counts.max())

    def bytes_after(self, growth: Mapping[SequenceState, int]) -> int:
        """Bytes that the cache needs for sequences to append so many slots."""
        slots, states = self._room_after(growth)
        row_bytes = self.cache.batch_size * self.model.slot_bytes
        return slots * row_bytes + states * self.model.state_bytes

    def limit_room(self, growth: Mapping[SequenceState, int], budget: int) -> None:
        """Keep the room for more that comes with this growth within a budget of bytes.

        Args:
            growth: as for :meth:`bytes_after`.
            budget: at least what that says.
        """
        slots, states = self._room_after(growth)
        row_bytes = self.cache.batch_size * self.model.slot_bytes
        spare = budget - self.bytes_after(growth)
        if self.model.state_bytes:
            # One half for states, one for slots.
            spare //= 2
            self.cache.states.limit = states + spare // self.model.state_bytes
        if row_bytes:
            self.cache.capacity_limit = slots + spare // row_bytes

    def _room_after(self, growth: Mapping[SequenceState, int]) -> tuple[int, int]:
        """Slots of a row and states that there must be room for after this growth."""
        states = self.cache.states_after(sum(growth.values())) if self.model.is_recurrent else 0
        return max(self.width_after(growth), self.cache.capacity), states

    def waste(self) -> float:
        """Share of the slots in the cache that hold nothing of a running sequence."""
        slots = self.cache.batch_size * self.cache.n_slots
        used = sum(s.n_held + s.n_drafted for s in self.sequences)
        return 1 - used / max(slots, 1)

    def compact(
        self, above: float = COMPACT_ABOVE, growth: Mapping[SequenceState, int] | None = None
    ) -> bool:
        """Drop what no later step can see, if unused slots are more than a share ``above``.

        Args:
            above: share of all slots, [0, 1].
            growth: slots that sequences will append next; they count.
        """
        if self._is_full_line():
            return False
        live = [sequence.seen_by_next() for sequence in self.sequences]
        growth = growth or {}
        slots = self.cache.batch_size * self.width_after(growth)
        drafted = sum(s.n_drafted for s in self.sequences)
        used = sum(map(len, live)) + sum(growth.values()) + drafted
        if slots - used <= above * slots:
            return False
        self.keep(live)
        return True

    def shrink(self) -> None:
        """Drop what no later step can see, what is drafted, and the room for more."""
        for sequence in self.sequences:
            self.drop_draft(sequence)
        self.keep([sequence.seen_by_next() for sequence in self.sequences])

    def _is_full_line(self) -> bool:
        """Whether the cache holds one line and nothing else, which is all seen."""
        if len(self.sequences) > 1 or self.cache.batch_size > 1:
            return False
        sequence = self.sequences[0]
        return sequence.is_line and sequence.n_held == self.cache.n_slots

    def keep(self, live: list[np.ndarray]) -> None:
        """Keep only these slots of each sequence, in as many rows as waste little."""
        if len(self.sequences) == 1:
            sequence = self.sequences[0]
            self.cache.rearrange_row(sequence.row, sequence.gather(live[0], 0))
            sequence.row = 0
            return
        loads = [len(slots) + s.n_drafted for s, slots in zip(self.sequences, live, strict=True)]
        row_of, counts = spread_evenly(np.array(loads), REPACKED_WASTE)
        rows = np.zeros((len(counts), counts.max()), np.int64)
        places = np.zeros_like(rows)
        filled = np.zeros(len(counts), np.int64)
        for sequence, slots, n, row in zip(self.sequences, live, loads, row_of, strict=True):
            at = slice(filled[row], filled[row] + n)
            rows[row, at] = sequence.row
            places[row, at] = sequence.gather(slots, filled[row])
            sequence.row = int(row)
            filled[row] += n
        self.cache.rearrange(rows, places, counts)
        self.sequences.sort(key=lambda sequence: sequence.row)


def _steps(queries: Slots, draft: Draft | None) -> np.ndarray:
    """Steps of a part's tokens with those of its draft."""
    if draft is None:
        return queries.step
    return np.concatenate([queries.step, queries.step[-1] + draft.depths])


def spread_evenly(loads: np.ndarray, waste: float) -> tuple[np.ndarray, np.ndarray]:
    """Put sequences into as many rows as leave at most a share of the slots unused.

    Each sequence, longest first, goes to the row that is shortest (the rule of longest processing
    time first; Graham, "Bounds on Multiprocessing Timing Anomalies", 1969). One row wastes nothing.

    Args:
        loads: slots of each sequence, [n], n at least 1.
        waste: share of unused slots, [0, 1).

    Returns:
        the row of each sequence [n], and the slots of each row.
    """
    for n_rows in range(len(loads), 0, -1):
        counts = np.zeros(n_rows, np.int64)
        row_of = np.zeros(len(loads), np.int64)
        for sequence in np.argsort(-loads, kind="stable"):
            row_of[sequence] = counts.argmin()
            counts[row_of[sequence]] += loads[sequence]
        if counts.sum() >= (1 - waste) * n_rows * counts.max():
            break
    return row_of, counts
