"""Retroactive pruning: which tokens of earlier parallel sets the future did not need.

A rule scores the live tokens of one set by the evidence that has come since; a decision turns the
scores into a verdict. Both are small functions in a dict, so that adding one is one function.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..arguments import check_choice, check_count, check_range, shown
from ..errors import TempoError
from ..lattice.lattice import PruningDecision
from .schedules import Bezier, Schedule


@dataclass(frozen=True)
class Evidence:
    """What is known of the n live tokens of one set when it is judged; every array is [n].

    Args:
        probabilities: in the distribution that they were selected from.
        slots: their slot numbers.
        attention: received from the rows of the last forward pass, averaged over rows, heads and
            layers; zeros if nothing was captured.
        posterior: gamma, how well each explains the tokens that followed; sums to 1.
        seed: of the run, for rules that draw.
    """

    probabilities: np.ndarray
    slots: np.ndarray
    attention: np.ndarray
    posterior: np.ndarray
    seed: int


def attention(evidence: Evidence) -> np.ndarray:
    """Attention received, a_i = mean over query rows, heads and layers of softmax(q k^T)_i.

    The idea of TEMPO: what later steps do not look at was not needed. Attention pools in the
    first token and decays with distance, so scores compare siblings only.
    """
    return evidence.attention


def posterior(evidence: Evidence) -> np.ndarray:
    """gamma_i ~ alpha_i beta_i of the forward-backward algorithm; see :mod:`.posterior`."""
    return evidence.posterior


def probability(evidence: Evidence) -> np.ndarray:
    """The selection probability: a baseline that looks at nothing that came later."""
    return evidence.probabilities


def random(evidence: Evidence) -> np.ndarray:
    """Uniform draws, one for each token and the same whenever it is judged: a baseline."""
    return np.array(
        [np.random.default_rng([evidence.seed, slot]).random() for slot in evidence.slots]
    )


#: Name -> rule (evidence) -> scores [n]; a higher score is better.
RULES: dict[str, Callable[[Evidence], np.ndarray]] = {
    "attention": attention,
    "posterior": posterior,
    "probability": probability,
    "random": random,
}

#: How scores become verdicts. "quota" keeps a share of the tokens whatever their scores.
DECISIONS = ("relative", "absolute", "sigmoid", "quota")
WHEN_ALL_FALL = ("keep_best", "keep_all", "drop_set")
LAYER_WEIGHTS = ("uniform", "rising")
#: Share of slots in the cache that may hold nothing of use.
COMPACT_ABOVE = 0.25
QUERY_WEIGHTS = ("equal", "probability")
REPAIRS = ("none", "recompute")


@dataclass(frozen=True)
class Pruning:
    """How tokens are pruned after the fact.

    Args:
        rule: a key of :data:`RULES`.
        threshold: base of the pruning threshold, [0, 1]; at each step base x schedule.
        decision: "relative" (score / best score of the set < threshold), "absolute" (score <
            threshold), "sigmoid" (1 / (1 + exp(-steepness (threshold - score))) > 0.5, or drawn
            where the run samples), or "quota" (the lowest scores fall, so that ``keep_rate`` of
            the tokens stays).
        steepness: of the sigmoid, above 0.
        keep_rate: share of the tokens in sets of several that "quota" keeps, (0, 1].
        schedule: how the threshold grows over the run.
        lookback: a set is judged until it is this many steps old, at least 1.
        min_age: and not before it is this many steps old, in [1, lookback].
        when_all_fall: "keep_best", "keep_all" or "drop_set".
        layers: attention layers to average: None (all), the last n, or their numbers from 0.
        layer_weights: "uniform", or "rising" (linear from 0.5 to 1, normalised).
        query_weights: rows count "equal"ly or by their token's "probability".
        repair: "none" (later slots keep what they saw), or "recompute" (they are run again as if
            the pruned tokens had never been there).
        compact_above: share of dead slots in the cache above which it is compacted, [0, 1].

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    rule: str = "posterior"
    threshold: float = 0.5
    decision: str = "relative"
    steepness: float = 50.0
    keep_rate: float = 0.75
    schedule: Schedule = field(default_factory=Bezier)
    lookback: int = 3
    min_age: int = 1
    when_all_fall: str = "keep_best"
    layers: int | tuple[int, ...] | None = None
    layer_weights: str = "uniform"
    query_weights: str = "equal"
    repair: str = "none"
    compact_above: float = COMPACT_ABOVE

    def __post_init__(self) -> None:
        for name, choices in (
            ("rule", RULES),
            ("decision", DECISIONS),
            ("when_all_fall", WHEN_ALL_FALL),
            ("layer_weights", LAYER_WEIGHTS),
            ("query_weights", QUERY_WEIGHTS),
            ("repair", REPAIRS),
        ):
            check_choice(f"prune {name}", getattr(self, name), choices)
        check_range("prune threshold", self.threshold, 0.0, 1.0)
        check_range("prune keep_rate", self.keep_rate, 0.0, 1.0, low_open=True)
        check_range("prune compact_above", self.compact_above, 0.0, 1.0)
        check_range("prune steepness", self.steepness, 0.0, sys.float_info.max, low_open=True)
        if not callable(self.schedule):
            raise TempoError(
                f"prune schedule must be a schedule, as parse_schedule makes one of text, got "
                f"{shown(self.schedule)}"
            )
        check_count("prune lookback", self.lookback)
        check_count("prune min_age", self.min_age)
        if self.min_age > self.lookback:
            raise TempoError(
                f"prune min_age must be in [1, lookback] = [1, {self.lookback}], got {self.min_age}"
            )
        if self.repair == "recompute" and self.when_all_fall == "drop_set":
            raise TempoError(
                "prune repair recompute needs a token of each set to go on from, "
                "so when_all_fall must be keep_best or keep_all, got 'drop_set'"
            )
        if isinstance(self.layers, tuple) and self.layers:
            for layer in self.layers:
                check_count("prune layers", layer, 0)
        elif self.layers is not None:
            check_count("prune layers", self.layers)

    @property
    def needs_attention(self) -> bool:
        """Whether the rule reads captured attention."""
        return self.rule == "attention"

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """Numbers of the layers to average, of a model with ``n_layers``.

        Raises:
            ValueError: if a layer does not exist.
        """
        if self.layers is None:
            return tuple(range(n_layers))
        if isinstance(self.layers, int):
            if self.layers > n_layers:
                raise TempoError(
                    f"prune layers asks for the last {self.layers}, the model has {n_layers}"
                )
            return tuple(range(n_layers - self.layers, n_layers))
        if max(self.layers) >= n_layers:
            raise TempoError(
                f"prune layers has {max(self.layers)}, the model's layers are 0 to {n_layers - 1}"
            )
        return tuple(sorted(set(self.layers)))

    def weights_of_layers(self, n: int) -> np.ndarray:
        """Weights [n] of the chosen layers, summing to 1."""
        weights = np.ones(n) if self.layer_weights == "uniform" else np.linspace(0.5, 1.0, n)
        return weights / weights.sum()

    def to_dict(self) -> dict[str, Any]:
        """One key for each setting; the schedule as its text."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return {**asdict(self), "schedule": str(self.schedule), "layers": layers}


def parse_layers(text: str) -> int | tuple[int, ...] | None:
    """Layers written as ``all``, ``last:4`` or ``0,5,11``.

    Raises:
        ValueError: for anything else.
    """
    if text == "all":
        return None
    try:
        if text.startswith("last:"):
            return int(text.removeprefix("last:"))
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise TempoError(
            f"prune layers must be all, last:N or numbers like 3,7,11, got {shown(text)}"
        ) from error


def falls(
    scores: np.ndarray, threshold: float, pruning: Pruning, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Which of a set's tokens a threshold decision prunes, before ``when_all_fall``.

    Args:
        scores: [n].
        threshold: of this step.
        pruning: decision and steepness.
        rng: draws the sigmoid's verdicts; None compares with 0.5.
    """
    if pruning.decision == "absolute":
        return scores < threshold
    if pruning.decision == "relative":
        # Without products of subnormals: score / best < threshold.
        best = scores.max()
        return scores < threshold * best if best > 0 else np.zeros(len(scores), bool)
    if rng is None:
        # The sigmoid is above 0.5 exactly where its argument is above 0.
        return scores < threshold
    with np.errstate(over="ignore"):
        chance = 1.0 / (1.0 + np.exp(-pruning.steepness * (threshold - scores)))
    return chance > rng.random(len(scores))


def spare(fallen: np.ndarray, scores: np.ndarray, when_all_fall: str) -> np.ndarray:
    """The verdict after a set that would lose its last token had its exception."""
    if not fallen.all() or when_all_fall == "drop_set":
        return fallen
    if when_all_fall == "keep_all":
        return np.zeros(len(fallen), bool)
    spared = fallen.copy()
    spared[scores.argmax()] = False
    return spared


class Pruner:
    """Judges sets by one :class:`Pruning` over one run.

    Args:
        pruning: how.
        total_steps: steps of the run at most; the schedule's time is step / total_steps.
        seed: of the run's draws.
        draws: whether the sigmoid's verdicts are drawn.
    """

    def __init__(self, pruning: Pruning, total_steps: int, seed: int = 0, uses_rng: bool = False):
        self.pruning = pruning
        self.seed = seed
        self._total_steps = total_steps
        self._rng = np.random.default_rng(seed) if uses_rng else None
        self._seen = self._fallen = 0

    def judge(self, step: int, set_step: int, evidence: Evidence) -> PruningDecision:
        """The verdict on the live tokens of one set after the forward pass of ``step``."""
        pruning = self.pruning
        scores = np.asarray(RULES[pruning.rule](evidence), float)
        threshold = pruning.threshold * pruning.schedule(step / self._total_steps)
        if pruning.decision == "quota":
            pruned = self._over_quota(scores)
        else:
            fallen = falls(scores, threshold, pruning, self._rng)
            pruned = spare(fallen, scores, pruning.when_all_fall)
        return PruningDecision(
            step,
            set_step,
            threshold,
            evidence.slots.tolist(),
            scores.tolist(),
            pruned.tolist(),
        )

    def wants(self, age: int) -> bool:
        """Whether a set of this age, in steps, is to be judged; by quota only once."""
        if self.pruning.decision == "quota":
            return age == self.pruning.lookback
        return self.pruning.min_age <= age <= self.pruning.lookback

    def _over_quota(self, scores: np.ndarray) -> np.ndarray:
        """The lowest scores fall as far as the run's quota allows; one token always stays."""
        self._seen += len(scores)
        allowed = int((1 - self.pruning.keep_rate) * self._seen - self._fallen + 1e-9)
        n = min(allowed, len(scores) - 1)
        pruned = np.zeros(len(scores), bool)
        pruned[np.argsort(scores, kind="stable")[:n]] = True
        self._fallen += n
        return pruned
