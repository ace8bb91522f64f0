"""Run groups of configurations in this process.

The runs of a group differ in visibility only. A group has one outcome, because the divergences
between its runs need their distributions side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
import numpy as np

from ..decode.result import GenerationResult
from ..generation import Failure, stream_batch_generate
from ..models import PositionedModel
from .capture import Divergence, Pair, Recorder
from .suite import RunConfig

Group = Sequence[RunConfig]

#: Columns of a run's table of tokens.
COLUMNS = ("step", "position", "slot", "id", "text", "probability", "set_size", "pruned_at")


@dataclass(frozen=True, eq=False)
class Record:
    """The record of a run.

    Args:
        tokens: the :data:`COLUMNS`, with one row for each generated token.
        prompt_tokens: ids.
        text: the best chain through the transitions that the run saw, not rescored.
        finish_reason: "stop", "length" or "context".
        n_steps: steps with tokens.
        seconds: from the run's start to its last step, including the other runs of its batch.
        arrays: reductions, named as in :data:`.capture.AXES`; empty without captures.
        texts: of the token ids in ``next_ids``.
        full: attention matrices by step; empty unless they are captured.
    """

    tokens: dict[str, list[Any]]
    prompt_tokens: list[int]
    text: str
    finish_reason: str
    n_steps: int
    seconds: float
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    full: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a group.

    Args:
        runs: the record of each run, or one line that says why it failed.
        pairs: divergences between the runs.
    """

    runs: list[Record | str]
    pairs: list[Pair]


class _Gathering:
    """Collects the outcome of a group as its runs finish."""

    def __init__(self, group: Group):
        self.group = group
        self.captures = group[0].captures
        self.divergence: Divergence | None = None
        if self.captures != "none" and len(group) > 1:
            self.divergence = Divergence(len(group))
        self.recorders: dict[int, Recorder] = {}
        self.runs: dict[int, Record | str] = {}

    def observe(self, member: int) -> Recorder | None:
        """A recorder for a run that begins, if anything is captured."""
        if self.captures == "none":
            return None
        recorder = Recorder(self.captures == "full", self.divergence, member)
        self.recorders[member] = recorder
        return recorder

    def take(self, member: int, found: GenerationResult | Failure) -> bool:
        """Add the result of a run; returns whether the group is complete."""
        recorder = self.recorders.pop(member, None)
        self.runs[member] = (
            found.error if isinstance(found, Failure) else record_of(found, recorder)
        )
        return len(self.runs) == len(self.group)

    @property
    def outcome(self) -> Outcome:
        runs = [self.runs[member] for member in range(len(self.group))]
        pairs = self.divergence.pairs() if self.divergence is not None else []
        return Outcome(runs, [pair for pair in pairs if pair.steps])


def record_of(result: GenerationResult, recorder: Recorder | None) -> Record:
    """The record of a result."""
    lattice, stats = result.lattice, result.stats
    rows = [
        (s.step, s.position, t.slot, t.id, t.text, t.probability, len(s.tokens), t.pruned_at)
        for s in lattice.steps
        for t in s.tokens
    ]
    arrays = recorder.arrays() if recorder is not None else {}
    ids = np.unique(arrays["next_ids"]).tolist() if arrays else []
    return Record(
        tokens={name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)},
        prompt_tokens=lattice.prompt_tokens,
        text=result.chain().text,
        finish_reason=str(result.finish_reason),
        n_steps=len(lattice),
        seconds=stats.prompt_seconds + stats.generation_seconds,
        arrays=arrays,
        texts={id: result.vocabulary.text(id) for id in ids},
        full=recorder.full() if recorder is not None else {},
    )


def run_batched(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    groups: Sequence[Group],
    batch_size: int,
    max_kv_bytes: int | None = None,
    begin: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, Outcome]]:
    """Run groups as rows of one batch; yields (number of the group, outcome) as they finish.

    Args:
        model, tokenizer: as :func:`tempo_mlx.load` returns them.
        groups: the runs of a group are neighbours in the batch, so they step together.
        batch_size, max_kv_bytes: as for :func:`tempo_mlx.stream_batch_generate`.
        begin: called with the number of a group when its first run begins.
    """
    places = [(i, member) for i, group in enumerate(groups) for member in range(len(group))]
    configs = [groups[i][member] for i, member in places]
    gathering: dict[int, _Gathering] = {}

    def gathered(number: int) -> tuple[_Gathering, int, int]:
        i, member = places[number]
        if i not in gathering:
            begin(i)
            gathering[i] = _Gathering(groups[i])
        return gathering[i], i, member

    def observe(number: int) -> Recorder | None:
        group, _, member = gathered(number)
        return group.observe(member)

    outcomes = stream_batch_generate(
        model,
        tokenizer,
        [config.prompt for config in configs],
        [config.settings for config in configs],
        batch_size=batch_size,
        max_kv_bytes=max_kv_bytes,
        paths=0,
        observe=observe,
    )
    for number, found in outcomes:
        group, i, member = gathered(number)
        if group.take(member, found):
            del gathering[i]
            yield i, group.outcome


def run_group(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    group: Group,
    max_kv_bytes: int | None = None,
) -> Outcome:
    """Run a group one run after another, each in its own batch and cache."""
    gathering = _Gathering(group)
    for member, config in enumerate(group):
        [(_, found)] = stream_batch_generate(
            model,
            tokenizer,
            [config.prompt],
            config.settings,
            batch_size=1,
            max_kv_bytes=max_kv_bytes,
            paths=0,
            observe=lambda _, member=member: gathering.observe(member),  # type: ignore[misc]
        )
        gathering.take(member, found)
    return gathering.outcome


def run_one_by_one(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    groups: Sequence[Group],
    max_kv_bytes: int | None = None,
    begin: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, Outcome]]:
    """As :func:`run_batched`, but each run alone."""
    for number, group in enumerate(groups):
        begin(number)
        yield number, run_group(model, tokenizer, group, max_kv_bytes)
