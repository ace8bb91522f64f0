"""One prompt's generation: what it selects, what it knows afterwards, and when it ends."""

import time
from typing import Any

import numpy as np

from .decoding import SequenceState
from .hindsight import Hindsight
from .lattice import Slots, Step, Token
from .result import GenerationResult
from .schedules import interpolate
from .selection import Candidates, Offers, Selected, keep


class Run:
    """One prompt on its way through a batch.

    Args:
        result: its prompt, settings and model; the lattice in it is extended step by step.
        keep_logits: keep every step's logits for :mod:`tempo_mlx.verification`.
    """

    def __init__(self, result: GenerationResult, keep_logits: bool = False):
        self.result = result
        self.settings = settings = result.settings
        self.lattice = result.lattice
        model = result.model
        if settings.pruning is not None and settings.pruning.needs_attention:
            model.require_capture()
        if settings.weighting != "none":
            model.require_additive_masks()
        self.sequence = SequenceState(
            self.lattice, settings.visibility, settings.weighting != "none", keep_logits
        )
        self.hindsight: Hindsight | None = None
        if settings.looks_back:
            self.hindsight = Hindsight(self.lattice, settings, model.n_layers)
        self.length = length = len(self.lattice.prompt_tokens)
        room = (model.context_length or length + settings.max_tokens) - length
        #: steps at most
        self.limit = min(settings.max_tokens, room)
        #: candidates that a step needs
        self.k = settings.max_parallel
        if settings.greedy:
            self.k = 1
        elif not settings.samples:
            # End tokens are never kept, so room for them lets a set still fill up.
            self.k += len(result.vocabulary.end_tokens)
        #: what may come next: computed with other runs', and the place among them
        self.offers: tuple[Offers, int] | None = None
        #: what may come after that, once its pass has started
        self.upcoming: tuple[Offers, int] | None = None
        #: row, places and lattice slots that the attention in ``upcoming`` is over
        self.attending = 0, self.sequence.at, self.sequence.held
        self._queries: Slots | None = None
        self._kept: Selected | None = None
        #: earliest step of which a token fell in this step
        self.fallen: int | None = None
        self.error: Exception | None = None
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
    def finished(self) -> bool:
        return self.result.finish_reason is not None or self.error is not None

    def noise(self) -> np.ndarray | None:
        """A new key for the draws of a step, uint32 [2]; None where nothing is drawn."""
        if not self.settings.samples:
            return None
        self._draws += 1
        return np.random.SeedSequence([self.settings.seed or 0, self._draws]).generate_state(2)

    def prompt_is_read(self) -> None:
        now = time.perf_counter()
        self.result.stats.prompt_seconds = now - self._started
        self._started = now

    def reserve(self, n: int) -> Slots:
        """Slots for the next set's n tokens."""
        self._queries = self.lattice.reserve(n, self.step)
        return self._queries

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
        self.fallen = None
        if self.hindsight and len(self._kept.ids):
            offers, _ = self.offers or (None, 0)
            if offers is not None and offers.received is not None:
                row, at, held = self.attending
                self.hindsight.attend(offers.read_received()[row, at], held)
            self.hindsight.select(self._kept.probabilities, self._kept.transitions)
            fallen = self.hindsight.prune()
            if settings.repairs and fallen is not None:
                self.fallen = fallen
                # What runs again sees the tokens that stay, with weights that sum to 1.
                self.hindsight.weigh()

    def select_again(self) -> None:
        """Keep what qualifies now that what saw the fallen tokens has been run again."""
        kept = self._keep()
        self._kept = kept.with_rows([t.pruned_at is None for t in self.lattice.steps[-1].tokens])
        if self.hindsight and len(kept.ids):
            self.hindsight.select(self._kept.probabilities, self._kept.transitions, again=True)

    def _keep(self) -> Selected:
        ends = self.result.vocabulary.end_tokens
        return keep(self.candidates(), self._threshold, self.settings.max_parallel, ends)

    def candidates(self) -> Candidates:
        """What may come next, on the host."""
        assert self.offers is not None
        offers, place = self.offers
        return offers.of(place, self.k)

    def first_to_repair(self) -> int:
        """The first step that has to be run again; siblings too where they saw each other."""
        assert self.fallen is not None
        return self.fallen if self.settings.visibility == "visible" else self.fallen + 1

    def record(self) -> Step:
        """Write the set into the lattice; the run may be finished by it."""
        kept, lattice, step = self._kept, self.lattice, self.step
        assert kept is not None
        ahead = self._queries is not None and self._queries.step[0] == step
        queries = self.pending if ahead else self.reserve(len(kept.ids))
        vocabulary, stats = self.result.vocabulary, self.result.stats
        tokens = [
            Token(int(id), vocabulary.text(int(id)), float(p), int(slot))
            for id, p, slot in zip(kept.ids, kept.probabilities, queries.index, strict=False)
        ]
        last = not self.more
        record = Step(step, self.length + step, self._threshold, tokens, kept.endings)
        lattice.steps.append(record)
        lattice.transitions.append(kept.transitions)
        if self.hindsight:
            self.hindsight.weigh()
        stats.generation_seconds = time.perf_counter() - self._started
        if not tokens or any(text in text_so_far(lattice) for text in self.settings.stop):
            self.result.finish_reason = "stop"
        elif last:
            full = self.limit < self.settings.max_tokens
            self.result.finish_reason = "context" if full else "length"
        return record


def text_so_far(lattice: Any) -> str:
    """Texts of the most probable token of each set."""
    return "".join(step.tokens[0].text for step in lattice.steps if step.tokens)
