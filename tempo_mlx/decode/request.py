"""One prompt's generation: what it selects, what it knows afterwards, and when it ends."""

import time

import mlx.core as mx
import numpy as np

from ..drafts import TEXT, Drafter, FollowerTable
from ..errors import TempoError
from ..lattice.lattice import Slots, Step, Token
from ..models import PositionedModel, SlotStore
from ..rules.branching import branch, recombine
from ..rules.processors import processors_of
from ..rules.schedules import interpolate
from ..rules.selection import SAMPLING, Candidates, Selected, keep, noise_key
from ..rules.visibility import may_attend
from ..settings import Settings
from .observation import Attending, Observation, Observer
from .result import GenerationResult
from .retroactive import RetroactivePruner
from .sequences import SequenceState
from .step_candidates import StepCandidates
from .stopping import StopWatch
from .verification import require_known

#: The key of rules that do not draw.
NO_NOISE = np.zeros(2, np.uint32)


class Request:
    """One prompt on its way through a batch.

    Args:
        result: its prompt, settings and model; the lattice in it is extended step by step.
        keep_logits: keep every step's logits for :mod:`tempo_mlx.decode.verification`.
        paths: paths that will be asked of the result; 0 lets its prompt's keys and values go.
        observer: sees every step.
        logprobs: keep the model's own log-probabilities of the last step's rows in ``logprobs``.
        keeps_slots: keep what the cache holds of the run when it leaves the batch, in ``slots``.

    Raises:
        TempoError: for logits that cannot be verified, see :func:`.verification.require_known`; or
            for an observer of a run whose steps have several distributions, or are run again.
        UnsupportedModelError: if the model cannot do what the settings or an observer need.
    """

    def __init__(
        self,
        result: GenerationResult,
        keep_logits: bool = False,
        paths: int = 0,
        observer: Observer | None = None,
        logprobs: bool = False,
        keeps_slots: bool = False,
    ):
        self.result = result
        self.observer = observer
        self.wants_logprobs = logprobs
        self.keeps_slots = keeps_slots
        #: one row, what the run held when it left, in the order of ``sequence.held``
        self.slots: SlotStore | None = None
        #: the model's log-probabilities that the last recorded set was selected from, [N, V]
        self.logprobs: np.ndarray | None = None
        #: the prompt's slots but the last one, after a run that will be rescored
        self.prompt_slots: SlotStore | None = None
        self.settings = settings = result.settings
        self.lattice = result.lattice
        #: guesses what follows, if the run may draft; the decoder gives it its sources
        self.drafter: Drafter | None = None
        #: takes what follows each token, if the run drafts by it
        self.follower_table: FollowerTable | None = None
        #: the token of the draft that the last set is, :data:`TEXT` for the set before the draft
        self._reached = TEXT
        #: candidates of what follows each drafted token, and the place of the first of them
        self._ahead: tuple[StepCandidates, int] | None = None
        # Looked up once: every step asks.
        self.visibility = rule = settings.visibility_rule
        self.combining, self.sampling = settings.combining_rule, settings.sampling_rule
        #: whether the lattice's paths will have to be found by another search
        self.rescores = paths > 0 and not rule.has_parents
        model = result.model
        if keep_logits:
            require_known(rule, model)
        if observer is not None and isinstance(model, PositionedModel):
            require_observable(settings)
            model.require_capture()
        self.sequence = SequenceState(
            self.lattice,
            rule,
            settings.weighting != "none",
            keep_logits,
            is_line=settings.always_single and rule.full_context,
        )
        self.pruner: RetroactivePruner | None = None
        if settings.looks_back:
            self.pruner = RetroactivePruner(self.lattice, settings, model.n_layers)
        #: ends the run at a stop text
        self.stop_watch = StopWatch(result) if settings.stop else None
        self.length = length = len(self.lattice.prompt_tokens)
        room = (model.context_length or length + settings.max_tokens) - length
        #: steps at most
        self.limit = min(settings.max_tokens, room)
        #: candidates that a step needs
        self.k = settings.max_parallel
        if settings.greedy:
            self.k = 1
        elif settings.branches:
            self.k = min(settings.max_parallel, settings.beam_width)
        elif not settings.is_sampled:
            # End tokens are never kept, so room for them lets a set still fill up.
            self.k += len(result.vocabulary.end_tokens)
        #: what a distribution goes through before the threshold
        self.processors = processors_of(
            settings,
            result.vocabulary.tokenizer,
            len(self.lattice.prompt_tokens),
            model.vocabulary_size,
        )
        #: what may come next: computed with other runs', and the place among them
        self.step_candidates: tuple[StepCandidates, int] | None = None
        #: what may come after that, once its pass has started
        self.upcoming: tuple[StepCandidates, int] | None = None
        self._queries: Slots | None = None
        self._kept: Selected | None = None
        #: earliest step of which a token was pruned in this step
        self.pruned: int | None = None
        self.error: Exception | None = None
        #: log-probabilities of the texts that end with the last set's tokens, and their slots
        self._scores = np.zeros(1)
        self._last = [length - 1]
        self._threshold = 0.0
        self._draws = 0
        self._started = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps recorded, the number of the next one."""
        return len(self.lattice.steps)

    @property
    def more(self) -> bool:
        """Whether another step may follow the one to be recorded next."""
        return self.step + 1 < self.limit

    @property
    def steps_left(self) -> int:
        """Steps that may follow the last one recorded, but one."""
        return self.limit - self.step - 1

    @property
    def finished(self) -> bool:
        return self.result.finish_reason is not None or self.error is not None

    def begin_draws(self) -> None:
        """Let the draws of a step be others than those before."""
        self._draws += 1

    def noise(self, ahead: int = 0) -> np.ndarray:
        """The key for the draws of a step, uint32 [2]; the same one where nothing is drawn.

        Args:
            ahead: drafted tokens on the way to what is drawn.
        """
        if not self.sampling.draws:
            return NO_NOISE
        return noise_key(self.settings.seed or 0, self._draws + ahead)

    def uniform(self, n: int, ahead: int = 0) -> np.ndarray | None:
        """Uniform draws in [0, 1) for the processors of n rows; None where they draw nothing."""
        if not self.processors.needs_draws:
            return None
        return np.random.default_rng([self.settings.seed or 0, self._draws + ahead]).random(n)

    @property
    def can_draft(self) -> bool:
        """Whether tokens may be read before they are known to be right.

        Not where a pass depends on what is selected only after it (pruning, weights, captured
        attention), where somebody else's function or a grammar would be asked about tokens that
        never come, where the user's own rule may see more than the text so far, or where keys begin
        to be quantised in the middle of a draft.
        """
        settings, rule = self.settings, self.visibility
        asked = settings.sampler is not None or settings.logits_processors or settings.has_grammar
        return (
            isinstance(self.result.model, PositionedModel)
            and not self.result.model.is_recurrent
            and self.pruner is None
            and self.observer is None
            and settings.weighting == "none"
            and settings.kv_bits is None
            and not asked
            and rule.full_context
            and rule.monotone
        )

    @property
    def drafts_now(self) -> bool:
        """Whether a draft may follow the set that was recorded last."""
        one_end = not self.visibility.has_parents or len(self._last) == 1
        return self.drafter is not None and one_end and self.steps_left > 0

    def offer_ahead(self, candidates: StepCandidates, first: int) -> None:
        """Take what may follow each drafted token: computed with other runs', from a place on."""
        self._ahead, self._reached = (candidates, first), TEXT
        if self.sequence.drafted is not None:
            self.result.stats.drafted_tokens += len(self.sequence.drafted.draft)

    def note_followers(self) -> None:
        """Let the table know what the distributions say that were read last."""
        if self.follower_table is None or self.step_candidates is None:
            return
        candidates, place = self.step_candidates
        if candidates.followers is None:
            # Made before the first run that drafts by them came.
            return
        last = self.lattice.steps[-1].tokens[0].id if self.step else self.lattice.prompt_tokens[-1]
        self.follower_table.note(last, candidates.followers_of(place))
        if self.sequence.drafted is not None and self._ahead is not None and self._reached == TEXT:
            candidates, first = self._ahead
            for i, token in enumerate(self.sequence.drafted.draft.tokens.tolist()):
                self.follower_table.note(token, candidates.followers_of(first + i))

    def follow_draft(self) -> bool:
        """Go on from a drafted token, if the set that was recorded last is it."""
        drafted = self.sequence.drafted
        if drafted is None or self._ahead is None or self.finished:
            return False
        tokens = self.lattice.steps[-1].tokens
        child = drafted.draft.child(self._reached, tokens[0].id) if len(tokens) == 1 else None
        if child is None:
            return False
        self.sequence.accept(child, tokens[0].slot)
        self._reached = child
        self.result.stats.accepted_tokens += 1
        candidates, first = self._ahead
        self.upcoming = candidates, first + child
        self.begin_draws()
        return True

    def texts(self) -> list[list[int]]:
        """Ids of prompt and text up to each live token of the last set, or of the prompt.

        Where tokens have no parents, the text before is the most probable token of each set.
        """
        prompt, lattice = self.lattice.prompt_tokens, self.lattice
        steps = [step.live for step in lattice.steps if step.live]
        if not steps:
            return [prompt]
        if self.settings.has_parents:
            chains = [lattice.tokens_to(token.slot) for token in steps[-1]]
            return [[*prompt, *(token.id for token in chain)] for chain in chains]
        before = [*prompt, *(tokens[0].id for tokens in steps[:-1])]
        return [[*before, token.id] for token in steps[-1]]

    def pause(self, seconds: float) -> None:
        """Leave seconds that something else took out of the run's time."""
        self._started += seconds

    def prompt_is_read(self) -> None:
        now = time.perf_counter()
        self.result.stats.prompt_seconds = now - self._started
        self._started = now

    def reserve(self, n: int, ahead: bool = False) -> Slots:
        """Slots for the next set's n tokens; ``ahead`` of the selection where it is one token."""
        parents = None
        if self.visibility.has_parents:
            # A set of one is reserved before it is known; what it continues is known.
            rows = self._kept.parents if self._kept is not None and not ahead else None
            parents = [self._last[row] for row in ([0] * n if rows is None else rows)]
        self._queries = self.lattice.reserve(n, self.step, parents)
        self.sequence.pending = self._queries
        return self._queries

    def sizes(self, n: int) -> list[int]:
        """Rows of each distribution that n rows are combined into: one of all, or each its own."""
        return [1] * n if self.visibility.branches else [n]

    @property
    def wants_best_only(self) -> bool:
        """Whether the most probable token is all that the run wants of a distribution."""
        drawn = self.sampling is not SAMPLING["deterministic"] or self.settings.sampler is not None
        return self.k == 1 and not drawn and self.observer is None

    @property
    def reads_ahead(self) -> bool:
        """Whether the next pass can start before the host has seen what was selected."""
        return self.sequence.is_line and not self.processors

    @property
    def pending(self) -> Slots:
        """Slots of the set that is appended next."""
        assert self._queries is not None
        return self._queries

    @property
    def chosen(self) -> Selected:
        """The set that was selected last."""
        assert self._kept is not None
        return self._kept

    def select(self) -> None:
        """Keep what qualifies, and judge earlier sets by it.

        Raises:
            NonFiniteLogitsError: if the model returned NaN.
        """
        settings = self.settings
        self._threshold = interpolate(
            settings.threshold,
            settings.final_threshold or settings.threshold,
            settings.schedule,
            self.step,
            settings.max_tokens,
        )
        self._kept = self._keep()
        self.pruned = None
        if self.pruner and len(self._kept.ids):
            assert self.step_candidates is not None
            step_candidates, place = self.step_candidates
            if step_candidates.attention is not None:
                attending = step_candidates.attending[place]
                received = step_candidates.attention.received(attending)
                if received is not None:
                    self.pruner.attend(received, attending.held)
            self.pruner.select(self._kept.probabilities, self._kept.transitions)
            pruned = self.pruner.prune()
            self.sequence.drop(pruned)
            if settings.repairs and pruned:
                self.pruned = int(self.lattice.column("step")[pruned[0]])
                # What runs again sees the tokens that stay, with weights that sum to 1.
                self.pruner.weigh()

    def select_again(self) -> None:
        """Keep what qualifies now that what saw the pruned tokens has been run again."""
        kept = self._keep()
        self._kept = kept.with_rows([t.pruned_at is None for t in self.lattice.steps[-1].tokens])
        if self.pruner and len(kept.ids):
            self.pruner.select(self._kept.probabilities, self._kept.transitions, again=True)

    def _keep(self) -> Selected:
        settings, ends = self.settings, self.result.vocabulary.end_tokens
        candidates = self.candidates()
        if self.visibility.branches:
            return branch(
                candidates,
                self._scores,
                self._last,
                self._threshold,
                settings.max_parallel,
                settings.beam_width,
                settings.beam_margin,
                ends,
            )
        kept = keep(candidates, self._threshold, settings.max_parallel, ends)
        return recombine(kept, self._scores, self._last) if self.visibility.has_parents else kept

    def candidates(self) -> Candidates:
        """What may come next, on the host."""
        assert self.step_candidates is not None
        step_candidates, place = self.step_candidates
        return step_candidates.of(place, self.k, leaves=self.visibility.branches)

    def attending(self, first: int) -> Attending:
        """Where the run is in the pass that appended its pending set.

        Args:
            first: place of the set's first token among the new tokens of its row.
        """
        state, seen = self.sequence, None
        if self.observer is not None:
            keys = self.lattice.slots[state.held]
            seen = np.any(may_attend(state.visibility, self.pending, keys), axis=0)
        return Attending(state.row, first, self.pending, state.held, state.at, seen)

    def observation(self) -> Observation:
        """What the observer sees of the step that was recorded last."""
        assert self.step_candidates is not None
        step_candidates, place = self.step_candidates
        ids, probabilities, *p = step_candidates.observed(place)
        attention = None
        if step_candidates.attention is not None:
            attention = step_candidates.attention.of(step_candidates.attending[place])
        distribution = p[0] if p else None
        return Observation(self.step - 1, ids, probabilities, distribution, attention)

    def first_to_repair(self) -> int:
        """The first step that has to be run again; siblings too where they saw each other."""
        assert self.pruned is not None
        slots = np.array([token.slot for token in self.lattice.steps[self.pruned].tokens])
        siblings = self.lattice.slots[slots]
        seen = may_attend(self.sequence.visibility, siblings, siblings)
        return self.pruned if seen.sum() > len(slots) else self.pruned + 1

    def record(self) -> Step:
        """Write the set into the lattice; the run may be finished by it."""
        kept, lattice, step = self._kept, self.lattice, self.step
        assert kept is not None
        ahead = self._queries is not None and self._queries.step[0] == step
        queries = self.pending if ahead else self.reserve(len(kept.ids))
        vocabulary, stats = self.result.vocabulary, self.result.stats
        tokens = [
            Token(
                int(id),
                vocabulary.text(int(id)),
                float(p),
                int(slot),
                raw=vocabulary.bytes_of(int(id)),
            )
            for id, p, slot in zip(kept.ids, kept.probabilities, queries.index, strict=False)
        ]
        if kept.parents is not None and kept.logprobs is not None:
            for token, row, logprob in zip(tokens, kept.parents, kept.logprobs, strict=True):
                token.parent, token.logprob = self._last[row], float(logprob)
            self._scores, self._last = kept.logprobs, [token.slot for token in tokens]
        last = not self.more
        record = Step(step, self.length + step, self._threshold, tokens, kept.endings)
        lattice.steps.append(record)
        if self.drafter is not None and tokens:
            self.drafter.append(tokens[0].id, len(tokens) == 1)
        lattice.transitions.append(kept.transitions)
        if self.pruner:
            self.pruner.weigh()
        stats.generation_seconds = time.perf_counter() - self._started
        stats.peak_memory_gb = mx.get_peak_memory() / 1e9
        if not tokens or self._is_complete() or self._stops():
            self.result.finish_reason = "stop"
        elif last:
            full = self.limit < self.settings.max_tokens
            self.result.finish_reason = "context" if full else "length"
        if self.observer is not None:
            self.observer.observe(self.observation())
        if self.wants_logprobs:
            assert self.step_candidates is not None
            step_candidates, place = self.step_candidates
            self.logprobs = step_candidates.logprobs_of(place)
        return record

    def _stops(self) -> bool:
        return self.stop_watch is not None and self.stop_watch.reached()

    def _is_complete(self) -> bool:
        """Whether no branch can become as good a path as the ``beam_width`` that have ended.

        Paths are ranked by log-probability per token. The most that a branch can reach is that all
        tokens that follow are certain.
        """
        if not self.visibility.branches:
            return False
        steps = self.lattice.steps
        ended = [(e.logprob or 0.0) / (s.step + 1) for s in steps for e in s.endings]
        n = self.settings.beam_width
        return len(ended) >= n and sorted(ended)[-n] >= self._scores.max() / (self.limit + 1)


def require_observable(settings: Settings) -> None:
    """Raise ValueError unless each step has one distribution and one forward pass."""
    if settings.branches:
        raise TempoError(
            "visibility tree has a distribution for each branch, and what is captured is one for "
            "each step; choose another visibility or capture nothing"
        )
    if settings.repairs:
        raise TempoError(
            "prune repair recompute runs steps again, and what is captured is one pass for each "
            "step; choose repair none or capture nothing"
        )
