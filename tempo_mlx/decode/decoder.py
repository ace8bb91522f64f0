"""The loop: select, append, forward, combine; for all runs of a batch at once.

Each step reads one distribution for each run, keeps its tokens above the threshold as a parallel
set, appends the sets of all runs, each at one position of its sequence, in one forward pass, and
combines the rows of that pass into the next distributions.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..drafts import (
    Draft,
    Drafter,
    FollowerTable,
    PassCosts,
    Source,
    SuffixLookup,
    TokenRecycling,
    pass_costs,
    plan,
)
from ..drafts.recycling import FOLLOWERS
from ..errors import TempoError
from ..models import Capture, PositionedModel, SlotStore
from ..numerics import log_softmax, softmax
from ..rules.combining import combine, most_probable_of
from ..rules.processors import remaining
from ..rules.selection import candidate_scores, most_probable
from .observation import Attending, PassAttention, head_capture
from .prefix_cache import PrefixCache
from .request import Request
from .sequences import Batch, SequenceState
from .step_candidates import StepCandidates
from .verification import verify

#: Steps after which mlx's buffer cache is emptied, as mlx-lm does.
CLEAR_CACHE_EVERY = 256


class CacheBudgetError(TempoError):
    """A run does not fit into the memory that its cache may take."""


@dataclass(frozen=True, eq=False)
class Offer:
    """Rows of a pass that make one or several of a run's next distributions.

    Args:
        request: the run.
        weights: of the rows: selection probabilities of the tokens that were read, [n].
        ahead: drafted tokens that lead from the last set to the one token that was read.
    """

    request: Request
    weights: np.ndarray
    ahead: tuple[int, ...] = ()


class BatchDecoder:
    """Runs that share one cache and take their steps together.

    Args:
        model: reads the tokens.
        max_kv_bytes: bytes that the cache may take; None sets no bound.
        prefixes: takes each prompt, all but its last token, once that has been read.
    """

    def __init__(
        self,
        model: PositionedModel,
        max_kv_bytes: int | None = None,
        prefixes: PrefixCache | None = None,
    ):
        self.model = model
        self._prefixes = prefixes
        self.batch = Batch(model, [])
        #: runs that generate, in the order of the batch's sequences
        self.requests: list[Request] = []
        #: requests that gave up their memory to others, to be restarted
        self.preempted: list[Request] = []
        #: runs that do not fit even alone
        self.failed: list[Request] = []
        self.steps = 0
        #: forward passes over sets
        self.passes = 0
        self._max_kv_bytes = max_kv_bytes
        #: what last followed each token, where a run drafts by it
        self._table: FollowerTable | None = None
        self._reading: tuple[list[Request], Batch, Iterator[tuple[int, int]]] | None = None

    @property
    def reading(self) -> list[Request]:
        """Runs whose prompts are being read."""
        return self._reading[0] if self._reading else []

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and states, room for more included."""
        reading = self._reading[1].cache.nbytes if self._reading else 0
        return reading + (self.batch.cache.nbytes if self.requests else 0)

    def start(self, requests: Sequence[Request], cache: SlotStore | None = None) -> None:
        """Begin to read the prompts of runs; the same prompt is read once.

        Args:
            runs: at least one; call only while ``reading`` is empty.
            cache: of one row that has read the beginning of all these prompts, not the last token.
        """
        assert self._reading is None
        prompts: dict[tuple[int, ...], SequenceState] = {}
        for request in requests:
            prompts.setdefault(tuple(request.lattice.prompt_tokens), request.sequence)
        if cache is not None:
            cache = cache.extract(0)
            cache.replicate(len(prompts))
        batch = Batch(self.model, list(prompts.values()), cache)
        batch.cache.capacity_limit = max(map(len, prompts))
        step_size = min(request.settings.prefill_step_size for request in requests)
        self._reading = list(requests), batch, batch.read(step_size)

    def read(self) -> tuple[int, int]:
        """Read one chunk of the prompts; returns (tokens read, tokens)."""
        assert self._reading is not None
        requests, batch, chunks = self._reading
        with mx.stream(generation_stream):
            done = next(chunks, None)
            if done is not None:
                return done
            self._reading = None
            if self._prefixes is not None:
                for each in batch.sequences:
                    prompt = each.lattice.prompt_tokens[:-1]
                    self._prefixes.insert(prompt, batch.cache, each.row, each.at)
            self._admit(requests, batch, batch.read_last())
        for request in requests:
            request.prompt_is_read()
        total = sum(len(sequence.lattice.prompt_tokens) for sequence in batch.sequences)
        return total, total

    def _admit(self, requests: list[Request], batch: Batch, logits: mx.array) -> None:
        """Take runs whose prompts were read by a batch, logits [prompts, V], into this one."""
        # Room for the prompts alone was enough while they were read.
        batch.cache.capacity_limit = None
        places = {
            tuple(sequence.lattice.prompt_tokens): (place, sequence)
            for place, sequence in enumerate(batch.sequences)
        }
        found = [places[tuple(request.lattice.prompt_tokens)] for request in requests]
        for request, (_, source) in zip(requests, found, strict=True):
            if request.sequence is not source and source.last is not None:
                request.sequence.take(request.lattice.slots[source.last[0]], source.last[1])
        self.batch.adopt(
            batch, [(s, r.sequence) for r, (_, s) in zip(requests, found, strict=True)]
        )
        self.requests += requests
        for request in requests:
            request.drafter = self._drafter(request)
            if request.stop_watch is not None:
                request.stop_watch.prompt_slots = partial(self.batch.prompt_slots, request.sequence)
        if len(found) > len(places):
            logits = logits[mx.array([place for place, _ in found])]
        self._offer([Offer(request, np.ones(1)) for request in requests], logits)
        mx.eval(self.batch.cache.state)
        if all(request.sequence.is_line for request in self.requests):
            self.batch.cache.align()

    def step(self) -> list[Request]:
        """One step of every run: keep, append, forward, combine.

        Returns:
            the runs that made it. Those that are finished have left the batch.
        """
        # A set of one is one token wide whatever its value: the next pass starts before the host
        # has seen it.
        ahead = all(request.reads_ahead for request in self.requests) and not self._expects_draft()
        if ahead:
            going = [request for request in self.requests if request.more]
            for request in going:
                request.reserve(1, ahead)
            self._advance(going, ahead)
        made = list(self.requests)
        for request in made:
            try:
                request.select()
                request.note_followers()
            except TempoError as error:
                request.error = error
        self._repair([request for request in made if request.pruned is not None])
        for request in made:
            if request.error is None:
                request.record()
            if request.finished:
                self.leave(request)
        if not ahead:
            self._advance([each for each in self.requests if not each.follow_draft()], ahead)
        for request in self.requests:
            request.step_candidates = request.upcoming
        self.steps += 1
        if self.steps % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        return made

    def _advance(self, requests: list[Request], ahead: bool) -> None:
        """Append the runs' next sets in one forward pass and start computing what may follow."""
        for request in requests:
            self.batch.drop_draft(request.sequence)
        drafts = {} if ahead or not self._reads_drafts() else self._drafts(requests)
        self._make_room(requests, drafts)
        requests = sorted(
            (request for request in requests if request in self.requests),
            key=lambda request: request.sequence.row,
        )
        if not requests:
            return
        with mx.stream(generation_stream):
            growth = {each.sequence: _growth(each, drafts.get(each)) for each in requests}
            self.batch.compact(
                min(request.settings.compact_above for request in self.requests), growth
            )
            requests.sort(key=lambda request: request.sequence.row)
            read = [drafts.get(request) for request in requests]
            if ahead:
                tokens = first_choices(requests)
                sets = [np.ones(1)] * len(requests)
            else:
                ids = [
                    ids
                    for request, draft in zip(requests, read, strict=True)
                    for ids in (request.chosen.ids, *([] if draft is None else [draft.tokens]))
                ]
                tokens = mx.array(np.concatenate(ids))
                sets = [request.chosen.probabilities for request in requests]
            capture = _capture(requests, sets)
            parts = [(request.sequence, request.pending) for request in requests]
            logits, attention = self.batch.append(tokens, parts, capture, drafts=read)
            self.passes += 1
            captured = PassAttention(attention) if attention else None
            offers = [
                offer
                for request, own, draft in zip(requests, sets, read, strict=True)
                for offer in (Offer(request, own), *_drafted(request, draft))
            ]
            self._offer(offers, logits, captured)

    def _drafter(self, request: Request) -> Drafter | None:
        """What guesses how a run goes on; None if it does not draft."""
        kind, text = request.settings.draft, request.lattice.prompt_tokens
        if kind == "none" or not request.can_draft:
            return None
        sources: list[Source] = []
        if kind in ("auto", "lookup"):
            sources.append(SuffixLookup(text))
        if kind == "recycle":
            self._table = self._table or FollowerTable(self.model.vocabulary_size)
            request.follower_table = self._table
            sources.append(TokenRecycling(self._table, text))
        return Drafter(sources, request.settings.num_draft_tokens)

    @property
    def _costs(self) -> PassCosts:
        """What passes cost; where that has to be measured first, no run's time counts it."""
        began = time.perf_counter()
        costs = pass_costs(self.model)
        for request in self.requests:
            request.pause(time.perf_counter() - began)
        return costs

    def _expects_draft(self) -> bool:
        """Whether a run has drafted, or probably will once its next token is known."""
        return any(
            request.drafter is not None
            and (request.sequence.drafted is not None or request.drafter.expects(self._costs))
            for request in self.requests
        )

    def _reads_drafts(self) -> bool:
        """Whether a pass may hold more than sets: not where a run weighs or captures attention."""
        return not any(r.pruner or r.observer or r.sequence.weighted for r in self.requests)

    def _drafts(self, requests: list[Request]) -> dict[Request, Draft]:
        """What is worth drafting of the runs that take the next pass."""
        drafters = [request.drafter if request.drafts_now else None for request in requests]
        if not any(drafters):
            return {}
        rows = sum(len(request.pending) for request in requests)
        found = plan(drafters, rows, self._costs, [request.steps_left for request in requests])
        return {r: draft for r, draft in zip(requests, found, strict=True) if draft is not None}

    def _offer(
        self,
        offers: list["Offer"],
        logits: mx.array,
        attention: PassAttention | None = None,
    ) -> None:
        """Start computing what may come next in each run, and all that the host will read.

        Args:
            offers: for each run its last set, then the tokens of its draft.
            logits: of all their rows, [N, V].
            attention: that the rows paid, if it was captured.
        """
        for offer in offers:
            if not offer.ahead:
                offer.request.begin_draws()
        sizes = [offer.request.sizes(len(offer.weights)) for offer in offers]
        requests = [offer.request for offer in offers if not offer.ahead]
        attending = _attending(requests) if attention is not None else ()
        groups = [offer for offer, each in zip(offers, sizes, strict=True) for _ in each]
        temps = [offer.request.settings.temp for offer in groups]
        processed = _processed(offers, logits)
        if (
            processed is logits
            and all(request.wants_best_only for request in requests)
            and len(groups) == len(logits)
        ):
            ranked = logits
            ids, p = most_probable_of(logits, temps)
            step_candidates = StepCandidates(ids, p, p, sizes, attention, attending)
        else:
            weights = [
                np.ones(1) if offer.request.visibility.branches else offer.weights
                for offer, own in zip(offers, sizes, strict=True)
                for _ in own
            ]
            rules = [offer.request.combining for offer in groups]
            p, rows = combine(processed, rules, weights, temps)
            if processed is not logits:
                rows = remaining(rows, softmax(logits.astype(mx.float32)))
            scores = candidate_scores(
                p,
                [offer.request.sampling for offer in groups],
                [offer.request.noise(len(offer.ahead)) for offer in groups],
            )
            scores = _sampled(scores, processed, [offer.request for offer in groups])
            ranked = p
            ids = most_probable(scores, max(request.k for request in requests))
            step_candidates = StepCandidates.of_rows(
                ids,
                p,
                rows,
                sizes,
                attention=attention,
                attending=attending,
                observed=_observed(requests, p),
            )
        if self._table is not None:
            step_candidates.followers = most_probable(ranked, FOLLOWERS)
        if any(request.wants_logprobs for request in requests):
            step_candidates.logprobs = log_softmax(logits.astype(mx.float32))
        for place, offer in enumerate(offers):
            if offer.ahead:
                continue
            request = offer.request
            request.upcoming = step_candidates, place
            request.offer_ahead(step_candidates, place + 1)
            if request.step_candidates is None:
                request.step_candidates = request.upcoming
        mx.async_eval(*step_candidates.state, *self.batch.cache.state)

    def _repair(self, requests: list[Request]) -> None:
        """Run what saw pruned tokens again, and select once more."""
        if not requests:
            return
        with mx.stream(generation_stream):
            self.batch.recompute(
                [(request.sequence, request.first_to_repair()) for request in requests]
            )
            logits = mx.concatenate([request.sequence.passed() for request in requests])
            live = [
                np.array([token.probability for token in request.lattice.steps[-1].live])
                for request in requests
            ]
            self._offer([Offer(*each) for each in zip(requests, live, strict=True)], logits)
        for request in requests:
            request.step_candidates = request.upcoming
            try:
                request.select_again()
            except TempoError as error:
                request.error = error

    def leave(self, request: Request) -> None:
        """Take a request out of the batch; what it holds is let go."""
        self.requests.remove(request)
        if request.keeps_slots:
            request.slots = self.batch.slots_of(request.sequence)
        if request.rescores and request.finished and request.error is None:
            request.prompt_slots = self.batch.prompt_slots(request.sequence)
        self.batch.release(request.sequence)
        if request.sequence.keep_logits and request.finished and request.error is None:
            request.result.verification = verify(
                self.model, request.lattice, request.settings, request.sequence.logits
            )

    def _make_room(self, requests: list[Request], drafts: dict[Request, Draft]) -> None:
        """Let drafts and then runs go, the youngest first, until the next sets fit the memory."""
        if self._max_kv_bytes is None:
            return
        budget = self._max_kv_bytes - (self._reading[1].cache.nbytes if self._reading else 0)
        compacted = False
        while self.requests:
            growth = {
                request.sequence: _growth(request, drafts.get(request))
                for request in requests
                if request in self.requests
            }
            needed = self.batch.bytes_after(growth)
            if needed <= budget:
                self.batch.limit_room(growth, budget)
                return
            if drafts:
                drafts.clear()
            elif not compacted:
                compacted = True
                self.batch.shrink()
            elif len(self.requests) > 1:
                youngest = self.requests[-1]
                self.preempted.append(youngest)
                self.leave(youngest)
                compacted = False
            else:
                alone = self.requests[0]
                alone.error = CacheBudgetError(
                    f"its cache needs {needed:,} bytes after {alone.step} steps, "
                    f"max_kv_bytes is {self._max_kv_bytes:,}; raise it, or make fewer or narrower "
                    "sets (max_tokens, max_parallel, threshold)"
                )
                self.failed.append(alone)
                self.leave(alone)


def first_choices(requests: list[Request]) -> mx.array:
    """Ids of each run's first candidate, [B], still on the device."""
    step_candidates = [
        request.step_candidates for request in requests if request.step_candidates is not None
    ]
    first, places = step_candidates[0][0], [place for _, place in step_candidates]
    if all(each is first for each, _ in step_candidates):
        ids = first.ids[:, 0]
        return ids if places == list(range(ids.size)) else ids[mx.array(places)]
    return mx.concatenate([each.ids[place, :1] for each, place in step_candidates])


def _processed(offers: list[Offer], logits: mx.array) -> mx.array:
    """Logits [N, V] as the requests' processors leave them, each offer's rows in turn."""
    if not any(offer.request.processors for offer in offers):
        return logits
    parts, first = [], 0
    for offer in offers:
        request, n = offer.request, len(offer.weights)
        part = logits[first : first + n]
        if request.processors:
            texts = [[*text, *offer.ahead] for text in request.texts()[:n]]
            part = request.processors(part, texts, request.uniform(n, len(offer.ahead)))
        parts.append(part)
        first += n
    return mx.concatenate(parts)


def _growth(request: Request, draft: Draft | None) -> int:
    """Slots that a run appends in the next pass."""
    return len(request.pending) + (0 if draft is None else len(draft))


def _drafted(request: Request, draft: Draft | None) -> list[Offer]:
    """What each drafted token offers."""
    if draft is None:
        return []
    return [Offer(request, np.ones(1), tuple(draft.path(i))) for i in range(len(draft))]


def _sampled(scores: mx.array, logits: mx.array, groups: list[Request]) -> mx.array:
    """Scores [G, V] with the tokens that the requests' samplers draw before all others.

    Args:
        logits: of the same distributions, whose requests have one row each, [G, V].
        groups: the request of each.
    """
    if all(request.settings.sampler is None for request in groups):
        return scores
    rows = []
    for i, request in enumerate(groups):
        own, row = scores[i : i + 1], logits[i : i + 1]
        if request.settings.sampler is not None:
            drawn = request.settings.sampler(row - mx.logsumexp(row, axis=-1, keepdims=True))
            own = mx.put_along_axis(own, drawn[:, None], mx.array(mx.inf), axis=-1)
        rows.append(own)
    return mx.concatenate(rows)


def _capture(requests: list[Request], probabilities: list[np.ndarray]) -> Capture | None:
    """The attention that runs want of the next pass, weighted by its layers and rows."""
    wanted = [
        request.pruner.capture(p) if request.pruner else None
        for request, p in zip(requests, probabilities, strict=True)
    ]
    if any(request.observer is not None for request in requests):
        n_layers = requests[0].result.model.n_layers
        sizes = [len(p) for p in probabilities]
        return head_capture(n_layers, wanted, sizes, [request.observer for request in requests])
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


def _observed(requests: list[Request], p: mx.array) -> list[mx.array]:
    """What observers want of distributions [G, V]: see :class:`.step_candidates.StepCandidates`."""
    observers = [request.observer for request in requests if request.observer is not None]
    if not observers:
        return []
    top = most_probable(p, max(observer.candidates for observer in observers))
    whole = any(observer.distributions for observer in observers)
    return [top, mx.take_along_axis(p, top, axis=1), *([p] if whole else [])]


def _attending(requests: list[Request]) -> list[Attending]:
    """Where each run is in the attention of the pass that appended their sets, in this order."""
    appended: dict[int, int] = {}
    found = []
    for request in requests:
        row = request.sequence.row
        found.append(request.attending(appended.get(row, 0)))
        appended[row] = appended.get(row, 0) + len(request.pending)
    return found
