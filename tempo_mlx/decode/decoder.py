"""The loop: select, append, forward, combine; for all runs of a batch at once.

Each step reads one distribution for each run, keeps its tokens above the threshold as a parallel
set, appends the sets of all runs, each at one position of its sequence, in one forward pass, and
combines the rows of that pass into the next distributions.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..errors import TempoError
from ..models import BatchedKVCache, Capture, PositionedModel
from ..rules.combining import combine, most_probable_of
from ..rules.selection import Offers, gumbel, most_probable
from .observation import Attending, PassAttention, head_capture
from .request import Run
from .sequences import Batch, SequenceState
from .verification import verify

#: Steps after which mlx's buffer cache is emptied, as mlx-lm does.
CLEAR_CACHE_EVERY = 256


class CacheBudgetError(TempoError):
    """A run does not fit into the memory that its cache may take."""


class Decoder:
    """Runs that share one cache and take their steps together.

    Args:
        model: reads the tokens.
        max_kv_bytes: bytes that the cache may take; None sets no bound.
    """

    def __init__(self, model: PositionedModel, max_kv_bytes: int | None = None):
        self.model = model
        self.batch = Batch(model, [])
        #: runs that generate, in the order of the batch's sequences
        self.runs: list[Run] = []
        #: runs that had to leave because the memory is needed by others; to be started anew
        self.displaced: list[Run] = []
        #: runs that do not fit even alone
        self.failed: list[Run] = []
        self.steps = 0
        self._max_kv_bytes = max_kv_bytes
        self._reading: tuple[list[Run], Batch, Iterator[tuple[int, int]]] | None = None

    @property
    def reading(self) -> list[Run]:
        """Runs whose prompts are being read."""
        return self._reading[0] if self._reading else []

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and states, room for more included."""
        reading = self._reading[1].cache.nbytes if self._reading else 0
        return reading + (self.batch.cache.nbytes if self.runs else 0)

    def start(self, runs: Sequence[Run], cache: BatchedKVCache | None = None) -> None:
        """Begin to read the prompts of runs; the same prompt is read once.

        Args:
            runs: at least one; call only while ``reading`` is empty.
            cache: of one row that has read the beginning of all these prompts, not the last token.
        """
        assert self._reading is None
        prompts: dict[tuple[int, ...], SequenceState] = {}
        for run in runs:
            prompts.setdefault(tuple(run.lattice.prompt_tokens), run.sequence)
        if cache is not None:
            cache = cache.extract(0)
            cache.replicate(len(prompts))
        batch = Batch(self.model, list(prompts.values()), cache)
        batch.cache.capacity_limit = max(map(len, prompts))
        step_size = min(run.settings.prefill_step_size for run in runs)
        self._reading = list(runs), batch, batch.read(step_size)

    def read(self) -> tuple[int, int]:
        """Read one chunk of the prompts; returns (tokens read, tokens)."""
        assert self._reading is not None
        runs, batch, chunks = self._reading
        with mx.stream(generation_stream):
            done = next(chunks, None)
            if done is not None:
                return done
            self._reading = None
            self._admit(runs, batch, batch.read_last())
        for run in runs:
            run.prompt_is_read()
        total = sum(len(sequence.lattice.prompt_tokens) for sequence in batch.sequences)
        return total, total

    def _admit(self, runs: list[Run], batch: Batch, logits: mx.array) -> None:
        """Take runs whose prompts were read by a batch, logits [prompts, V], into this one."""
        # Room for the prompts alone was enough while they were read.
        batch.cache.capacity_limit = None
        places = {
            tuple(sequence.lattice.prompt_tokens): (place, sequence)
            for place, sequence in enumerate(batch.sequences)
        }
        found = [places[tuple(run.lattice.prompt_tokens)] for run in runs]
        for run, (_, source) in zip(runs, found, strict=True):
            if run.sequence is not source and source.last is not None:
                run.sequence.take(run.lattice.slots[source.last[0]], source.last[1])
        self.batch.adopt(batch, [(s, r.sequence) for r, (_, s) in zip(runs, found, strict=True)])
        self.runs += runs
        for run in runs:
            if run.stop_watch is not None:
                run.stop_watch.prompt_slots = partial(self.batch.prompt_slots, run.sequence)
        if len(found) > len(places):
            logits = logits[mx.array([place for place, _ in found])]
        self._offer(runs, logits, [np.ones(1)] * len(runs))
        mx.eval(self.batch.cache.state)
        if all(run.sequence.is_line for run in self.runs):
            self.batch.cache.align()

    def step(self) -> list[Run]:
        """One step of every run: keep, append, forward, combine.

        Returns:
            the runs that made it. Those that are finished have left the batch.
        """
        # A set of one is one token wide whatever its value: the next pass starts before the host
        # has seen it.
        ahead = all(run.sequence.is_line for run in self.runs)
        if ahead:
            going = [run for run in self.runs if run.more]
            for run in going:
                run.reserve(1, ahead)
            self._advance(going, ahead)
        made = list(self.runs)
        for run in made:
            try:
                run.select()
            except TempoError as error:
                run.error = error
        self._repair([run for run in made if run.fallen is not None])
        for run in made:
            if run.error is None:
                run.record()
            if run.finished:
                self._leave(run)
        if not ahead:
            self._advance(list(self.runs), ahead)
        for run in self.runs:
            run.offers = run.upcoming
        self.steps += 1
        if self.steps % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return made

    def _advance(self, runs: list[Run], ahead: bool) -> None:
        """Append the runs' next sets in one forward pass and start computing what may follow."""
        self._make_room(runs)
        runs = sorted((run for run in runs if run in self.runs), key=lambda run: run.sequence.row)
        if not runs:
            return
        with mx.stream(generation_stream):
            growth = {id(run.sequence): len(run.pending) for run in runs}
            self.batch.compact(min(run.settings.compact_above for run in self.runs), growth)
            runs.sort(key=lambda run: run.sequence.row)
            if ahead:
                tokens = first_choices(runs)
                probabilities = [np.ones(1)] * len(runs)
            else:
                tokens = mx.array(np.concatenate([run.chosen.ids for run in runs]))
                probabilities = [run.chosen.probabilities for run in runs]
            capture = _capture(runs, probabilities)
            parts = [(run.sequence, run.pending) for run in runs]
            logits, attention = self.batch.append(tokens, parts, capture)
            captured = PassAttention(attention) if attention else None
            self._offer(runs, logits, probabilities, captured)

    def _offer(
        self,
        runs: list[Run],
        logits: mx.array,
        probabilities: list[np.ndarray],
        attention: PassAttention | None = None,
    ) -> None:
        """Start computing what may come next in each run, and all that the host will read."""
        sizes = [run.sizes(len(each)) for run, each in zip(runs, probabilities, strict=True)]
        attending = _attending(runs) if attention is not None else ()
        groups = [run for run, each in zip(runs, sizes, strict=True) for _ in each]
        temps = [run.settings.temp for run in groups]
        if all(run.wants_best_only for run in runs) and len(groups) == len(logits):
            ids, p = most_probable_of(logits, temps)
            offers = Offers(ids, p, p, sizes, attention, attending)
        else:
            weights = [
                np.ones(1) if run.settings.branches else each
                for run, each, own in zip(runs, probabilities, sizes, strict=True)
                for _ in own
            ]
            p, rows = combine(logits, [run.settings.combine for run in groups], weights, temps)
            keys = [run.noise() for run in groups]
            scores = p if all(key is None for key in keys) else gumbel(p, keys)
            ids = most_probable(scores, max(run.k for run in runs))
            offers = Offers.of_rows(
                ids,
                p,
                rows,
                sizes,
                attention=attention,
                attending=attending,
                observed=_observed(runs, p),
            )
        for place, run in enumerate(runs):
            run.upcoming = offers, place
            if run.offers is None:
                run.offers = run.upcoming
        mx.async_eval(*offers.state, *self.batch.cache.state)

    def _repair(self, runs: list[Run]) -> None:
        """Run what saw fallen tokens again, and select anew."""
        if not runs:
            return
        with mx.stream(generation_stream):
            self.batch.recompute([(run.sequence, run.first_to_repair()) for run in runs])
            logits = mx.concatenate([run.sequence.passed() for run in runs])
            live = [
                np.array([token.probability for token in run.lattice.steps[-1].live])
                for run in runs
            ]
            self._offer(runs, logits, live)
        for run in runs:
            run.offers = run.upcoming
            try:
                run.select_again()
            except TempoError as error:
                run.error = error

    def _leave(self, run: Run) -> None:
        self.runs.remove(run)
        if run.rescores and run.finished and run.error is None:
            run.prompt_slots = self.batch.prompt_slots(run.sequence)
        self.batch.release(run.sequence)
        if run.sequence.keep_logits and run.error is None:
            run.result.verification = verify(
                self.model, run.lattice, run.settings, run.sequence.logits
            )

    def _make_room(self, runs: list[Run]) -> None:
        """Let runs go, the youngest first, until the next sets fit into the memory."""
        if self._max_kv_bytes is None:
            return
        budget = self._max_kv_bytes - (self._reading[1].cache.nbytes if self._reading else 0)
        compacted = False
        while self.runs:
            growth = {id(run.sequence): len(run.pending) for run in runs if run in self.runs}
            needed = self.batch.bytes_after(growth)
            if needed <= budget:
                self.batch.limit_room(growth, budget)
                return
            if not compacted:
                compacted = True
                self.batch.shrink()
            elif len(self.runs) > 1:
                youngest = self.runs[-1]
                self.displaced.append(youngest)
                self._leave(youngest)
                compacted = False
            else:
                alone = self.runs[0]
                alone.error = CacheBudgetError(
                    f"its cache needs {needed:,} bytes after {alone.step} steps, "
                    f"max_kv_bytes is {self._max_kv_bytes:,}; raise it, or make fewer or narrower "
                    "sets (max_tokens, max_parallel, threshold)"
                )
                self.failed.append(alone)
                self._leave(alone)


def first_choices(runs: list[Run]) -> mx.array:
    """Ids of each run's first candidate, [B], still on the device."""
    offers = [run.offers for run in runs if run.offers is not None]
    first, places = offers[0][0], [place for _, place in offers]
    if all(each is first for each, _ in offers):
        ids = first.ids[:, 0]
        return ids if places == list(range(ids.size)) else ids[mx.array(places)]
    return mx.concatenate([each.ids[place, :1] for each, place in offers])


def _capture(runs: list[Run], probabilities: list[np.ndarray]) -> Capture | None:
    """The attention that runs want of the next pass, weighted by its layers and rows."""
    wanted = [
        run.hindsight.capture(p) if run.hindsight else None
        for run, p in zip(runs, probabilities, strict=True)
    ]
    if any(run.observer is not None for run in runs):
        n_layers = runs[0].result.model.n_layers
        sizes = [len(p) for p in probabilities]
        return head_capture(n_layers, wanted, sizes, [run.observer for run in runs])
    layers = {len(weights) for weights in wanted if weights is not None}
    if not layers:
        return None
    n_layers = layers.pop()
    weights = np.concatenate(
        [
            np.zeros((n_layers, len(p)), np.float32) if each is None else each
            for each, p in zip(wanted, probabilities, strict=True)
        ],
        axis=1,
    )
    used = np.flatnonzero(weights.any(axis=1))
    return Capture(layers=tuple(used.tolist()), row_weights=weights[used])


def _observed(runs: list[Run], p: mx.array) -> list[mx.array]:
    """What observers want of distributions [G, V]: see :class:`.selection.Offers`."""
    observers = [run.observer for run in runs if run.observer is not None]
    if not observers:
        return []
    top = most_probable(p, max(observer.candidates for observer in observers))
    whole = any(observer.distributions for observer in observers)
    return [top, mx.take_along_axis(p, top, axis=1), *([p] if whole else [])]


def _attending(runs: list[Run]) -> list[Attending]:
    """Where each run is in the attention of the pass that appended their sets, in this order."""
    appended: dict[int, int] = {}
    found = []
    for run in runs:
        row = run.sequence.row
        found.append(run.attending(appended.get(row, 0)))
        appended[row] = appended.get(row, 0) + len(run.pending)
    return found
