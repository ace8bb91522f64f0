"""What a run returns: its lattice, its text, its paths, and one schema for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..decode.paths import Path, best_paths, cut_at_stop
from ..decode.verification import Verification, received_attention
from ..errors import TempoError
from ..models import PlainModel, PositionedModel, SlotStore
from ..rules.posterior import viterbi
from ..settings import Settings
from ..text.vocabulary import Vocabulary
from .lattice import Lattice

#: Version of the dictionary that :meth:`GenerationResult.to_dict` returns.
SCHEMA = 2

#: Hypotheses that the search for the best paths keeps at each step, at least.
BEAM = 8


@dataclass
class Statistics:
    """Times of a run, in seconds, and its peak memory, in 10^9 bytes."""

    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    peak_memory_gb: float = 0.0


@dataclass(frozen=True)
class _End:
    """Where a text of the run ends.

    Args:
        slot: of its last token; None where it has none.
        logprob: of the text, an end token included, in nats.
        length: tokens, an end token left out.
        ended: whether an end token followed.
    """

    slot: int | None
    logprob: float
    length: int
    ended: bool


@dataclass(eq=False)
class GenerationResult:
    """One run of :func:`tempo_mlx.generate`.

    Args:
        model, vocabulary: what made it; used to rescore paths.
        model_name: recipe, folder or Hub id of the model.
        prompt: the prompt as text.
        lattice: every step with its set.
        settings: how it was made.
        finish_reason: "stop", "length" or "context"; None while it runs or if it was interrupted.
        verification: what the oracle found, if it was asked.
    """

    model: PositionedModel | PlainModel
    vocabulary: Vocabulary
    model_name: str
    prompt: str
    lattice: Lattice
    settings: Settings
    stats: Statistics = field(default_factory=Statistics)
    finish_reason: str | None = None
    verification: Verification | None = None
    _paths: tuple[tuple[int, int], list[Path]] | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The best path through the lattice, rescored exactly; see :meth:`paths`.

        It ends before the first stop text, and holds whole characters only: one that the last
        tokens have begun is left out.
        """
        ids = self.known_best()
        return self.paths(1)[0].text if ids is None else self._spelled(ids)

    def known_best(self) -> list[int] | None:
        """Ids of the best path where the run knows it without another search."""
        if self.settings.has_parents:
            return self._own_path(self._own_ends()[0]).tokens
        sets = self.lattice.sets
        return [t[0].id for t in sets] if all(len(tokens) == 1 for tokens in sets) else None

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether the text of these tokens contains a stop text."""
        text = self.vocabulary.decode(ids)
        return cut_at_stop(text, self.settings.stop) != text

    def _spelled(self, ids: Sequence[int]) -> str:
        return cut_at_stop(self.vocabulary.decode(ids), self.settings.stop)

    def paths(self, k: int = 1, beam: int = BEAM) -> list[Path]:
        """The k best paths through the lattice's sets, best first.

        A path takes one live token of each set. Its log-probability is the model's for exactly
        that text after the prompt, at temperature 1; no path contains a token that the model
        conditioned on anything else. The search is a beam over the sets: with a beam as wide as the
        number of paths it is exhaustive, with a narrower one a better path may be missed.

        Where tokens have parents (visibility "tree" and "recombined") the run has scored its texts
        already: the paths are those of the last set, and in a tree those that ended, too, with the
        end token's log-probability; under a grammar those that ended, if any did. They differ in
        length there; the best one has the highest log-probability per token, the end token counted.

        Args:
            k: paths wanted, at least 1.
            beam: hypotheses kept at each step; raised to k.

        Returns:
            at most k paths; computed when first asked for, and kept.
        """
        if k < 1:
            raise TempoError(f"k must be at least 1, got {k}")
        if beam < 1:
            raise TempoError(f"beam must be at least 1, got {beam}")
        if self.settings.has_parents:
            return [self._own_path(end) for end in self._own_ends()[:k]]
        find_paths([self], max(k, beam))
        assert self._paths is not None
        return self._paths[1][:k]

    def _own_ends(self) -> list["_End"]:
        """Where the texts that the run scored itself end, best first by log-probability per token;
        at least one."""
        steps = self.lattice.steps
        sets = [step for step in steps if step.tokens]
        ends = []
        if self.settings.branches or self.settings.has_grammar:
            # A branch that went on has its end in the last set; one that did not, ended before.
            ends = [
                _End(e.parent, e.logprob or 0.0, step.step, True)
                for step in steps
                for e in step.endings
            ]
        if sets and (sets[-1] is steps[-1] or not self.settings.branches):
            length = sets[-1].step + 1
            last = [_End(t.slot, t.logprob or 0.0, length, False) for t in sets[-1].tokens]
            ends = last + ends
        if self.settings.has_grammar:
            # A text that has not ended is no sentence of the grammar yet.
            ends = [end for end in ends if end.ended] or ends
        ends.sort(key=lambda end: -end.logprob / max(1, end.length + end.ended))
        return ends or [_End(None, 0.0, 0, False)]

    def _own_path(self, end: "_End") -> Path:
        ids = [token.id for token in self.lattice.tokens_to(end.slot)]
        return Path(self._spelled(ids), ids, end.logprob, end.ended)

    def received_attention(self) -> dict[int, np.ndarray]:
        """Attention that each step's rows paid to each slot, [S], by one more pass.

        Raises:
            UnsupportedModelError: if the model's attention cannot be captured, or layers are
                recurrent.
        """
        if not isinstance(self.model, PositionedModel):
            raise TempoError("attention is captured with branching shared")
        return received_attention(self.model, self.lattice, self.settings)

    def chain(self) -> Path:
        """The best chain through the transitions that the run saw, without another pass.

        Its ``logprob`` sums log p_i(x_j) along the chain: the text's log-probability where every
        set has one token, elsewhere the evidence of rows whose context held other tokens too.
        """
        if self.settings.has_parents:
            return self.paths(1)[0]
        live = [
            [i for i, token in enumerate(step.tokens) if token.pruned_at is None]
            for step in self.lattice.steps
            if step.live
        ]
        steps = [step for step in self.lattice.steps if step.live]
        if not steps:
            return Path("", [], 0.0)
        initial = np.array([steps[0].tokens[i].probability for i in live[0]])
        transitions = [
            self.lattice.transitions[after.step].astype(float)[np.ix_(here, there)]
            if after.step == before.step + 1
            # The set between was dropped: its rows are no evidence on what follows.
            else np.array([[after.tokens[j].probability for j in there]] * len(here))
            for before, after, here, there in zip(steps, steps[1:], live, live[1:], strict=False)
        ]
        indices, logprob = viterbi(initial, transitions)
        pairs = zip(steps, live, indices, strict=True)
        ids = [step.tokens[tokens[i]].id for step, tokens, i in pairs]
        return Path(self._spelled(ids), ids, logprob)

    def to_dict(self, n_paths: int = 5) -> dict[str, Any]:
        """The result as JSON-ready data, schema version 2; rescores ``n_paths`` paths."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model_name,
            "prompt": self.prompt,
            "prompt_tokens": self.lattice.prompt_tokens,
            "settings": self.settings.to_dict(),
            "steps": self.lattice.steps_to_dict(),
            "text": self.text,
            "paths": [asdict(path) for path in self.paths(n_paths)] if n_paths else [],
            "finish_reason": self.finish_reason,
            "stats": self.rates(),
        }
        if self.verification is not None:
            data["verification"] = asdict(self.verification)
        return data

    def rates(self) -> dict[str, float]:
        """The schema's ``stats``: tokens and steps per second, peak memory in GB."""
        stats, lattice = self.stats, self.lattice
        seconds = stats.generation_seconds or float("inf")
        return {
            "prompt_tps": len(lattice.prompt_tokens) / (stats.prompt_seconds or float("inf")),
            "steps_per_second": len(lattice) / seconds,
            "tokens_per_second": lattice.n_tokens / seconds,
            "peak_memory_gb": stats.peak_memory_gb,
        }


def find_paths(
    results: Sequence[GenerationResult],
    beam: int = BEAM,
    prompts: Sequence[SlotStore | None] | None = None,
) -> None:
    """Find the paths of several results of one model together; see :meth:`GenerationResult.paths`.

    Args:
        results: at least one; those whose paths are known are left as they are.
        beam: hypotheses kept at each step of each.
        prompts: of each result the slots of its prompt but the last, so that it need not be read.
    """

    def made(result: GenerationResult) -> tuple[int, int]:
        return beam, result.lattice.n_slots

    new = [
        result
        for result in results
        if not result.settings.has_parents
        and (result._paths is None or result._paths[0] != made(result))
    ]
    if not new:
        return
    problems = [
        (r.lattice.prompt_tokens, [[token.id for token in tokens] for tokens in r.lattice.sets])
        for r in new
    ]
    known = [c for r, c in zip(results, prompts or (), strict=False) if any(r is n for n in new)]
    rows = [cache for cache in known if cache is not None]
    cache = SlotStore.merge(rows) if len(rows) == len(new) else None
    model = new[0].model
    assert isinstance(model, PositionedModel)
    for result, found in zip(new, best_paths(model, problems, beam, cache), strict=True):
        paths = [Path(result._spelled(ids), ids, logprob) for ids, logprob in found]
        result._paths = made(result), paths
        if result.finish_reason is not None and result.stops(paths[0].tokens):
            result.finish_reason = "stop"
