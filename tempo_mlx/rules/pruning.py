"""Retroactive pruning: which tokens of earlier parallel sets the future did not need.

A rule scores the live tokens of one set by the evidence that has come since; a decision turns the
scores into a verdict.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import shown
from ..errors import TempoError
from ..lattice.lattice import PruningDecision
from ..old_names import renames
from .rule import Rule, find
from .schedules import Bezier, Schedule
from .table import (
    Choice,
    Count,
    Layers,
    Number,
    RuleChoice,
    ScheduleText,
    check_all,
    documented,
    setting,
)


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class PruningRule(Rule):
    """A rule (evidence) -> scores [n]; a higher score is better.

    Args:
        needs_attention: whether it reads ``evidence.attention``, which costs a pass more time.
        draws: whether it draws, so that the seed matters.
    """

    needs_attention: bool = False
    draws: bool = False

    def scores(self, evidence: Evidence) -> np.ndarray:
        """The rule's scores, [n]; TempoError for what are none."""
        found = np.asarray(self(evidence), np.float64)
        if found.shape != evidence.slots.shape or np.isnan(found).any():
            raise TempoError(
                f"prune rule {self.name} must return {len(evidence.slots)} numbers, "
                f"got {shown(found)}"
            )
        return found


#: Name -> rule.
RULES: dict[str, PruningRule] = {
    rule.name: rule
    for rule in (
        PruningRule("attention", attention, needs_attention=True),
        PruningRule("posterior", posterior),
        PruningRule("probability", probability),
        PruningRule("random", random, draws=True),
    )
}


def pruning_rule(given: Any) -> PruningRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("prune rule", given, RULES, PruningRule)


@dataclass(frozen=True)
class Judging:
    """What a decision knows beside the scores of the n live tokens of a set.

    Args:
        threshold: of this step.
        steepness, keep_rate: see :class:`Pruning`.
        rng: where verdicts are drawn; None draws none.
        seen: tokens that the run has judged, this set's included.
        pruned: those of them that were pruned.
    """

    threshold: float
    steepness: float = 50.0
    keep_rate: float = 0.75
    rng: np.random.Generator | None = None
    seen: int = 0
    pruned: int = 0


def relative(scores: np.ndarray, judging: Judging) -> np.ndarray:
    """score / best score of the set < threshold."""
    # Without products of subnormals.
    best = scores.max()
    return scores < judging.threshold * best if best > 0 else np.zeros(len(scores), bool)


def absolute(scores: np.ndarray, judging: Judging) -> np.ndarray:
    """score < threshold."""
    return scores < judging.threshold


def sigmoid(scores: np.ndarray, judging: Judging) -> np.ndarray:
    """1 / (1 + exp(-steepness (threshold - score))) > 0.5, or drawn."""
    if judging.rng is None:
        # The sigmoid is above 0.5 exactly where its argument is above 0.
        return scores < judging.threshold
    with np.errstate(over="ignore"):
        chance = 1.0 / (1.0 + np.exp(-judging.steepness * (judging.threshold - scores)))
    return chance > judging.rng.random(len(scores))


def quota(scores: np.ndarray, judging: Judging) -> np.ndarray:
    """The lowest scores, as far as ``keep_rate`` of all tokens allows; one token always stays."""
    allowed = int((1 - judging.keep_rate) * judging.seen - judging.pruned + 1e-9)
    pruned = np.zeros(len(scores), bool)
    pruned[np.argsort(scores, kind="stable")[: min(allowed, len(scores) - 1)]] = True
    return pruned


@dataclass(frozen=True)
class DecisionRule(Rule):
    """A rule (scores [n], judging) -> which tokens are pruned, booleans [n].

    Args:
        by_threshold: whether it compares with a threshold, at every age of a set; a set is judged
            once otherwise, when it is ``lookback`` steps old.
        keeps_best: whether it never prunes the best token of a set.
        draws: whether it draws where the run samples.
    """

    by_threshold: bool = True
    keeps_best: bool = False
    draws: bool = False

    def verdict(self, scores: np.ndarray, judging: Judging) -> np.ndarray:
        """Which tokens are pruned, [n], before ``if_all_pruned``; TempoError for what says none."""
        found = np.asarray(self(scores, judging))
        if found.shape != scores.shape or found.dtype != bool:
            raise TempoError(
                f"prune decision {self.name} must return {len(scores)} booleans, got {shown(found)}"
            )
        return found


#: Name -> rule.
DECISIONS: dict[str, DecisionRule] = {
    rule.name: rule
    for rule in (
        DecisionRule("relative", relative, keeps_best=True),
        DecisionRule("absolute", absolute),
        DecisionRule("sigmoid", sigmoid, draws=True),
        DecisionRule("quota", quota, by_threshold=False, keeps_best=True),
    )
}


def decision_rule(given: Any) -> DecisionRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("prune decision", given, DECISIONS, DecisionRule)


def keep_best(pruned: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """All but the best token are pruned."""
    kept = pruned.copy()
    kept[scores.argmax()] = False
    return kept


def keep_all(pruned: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """No token is pruned."""
    return np.zeros(len(pruned), bool)


def drop_set(pruned: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """All tokens are pruned, and the set is gone."""
    return pruned


#: Name -> the verdict on a set that would lose all its tokens.
IF_ALL_PRUNED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "keep_best": keep_best,
    "keep_all": keep_all,
    "drop_set": drop_set,
}
LAYER_WEIGHTS = ("uniform", "rising")
#: Share of slots in the cache that may hold nothing of use.
COMPACT_ABOVE = 0.25
QUERY_WEIGHTS = ("equal", "probability")
REPAIRS = ("none", "recompute")


_PANEL = "Retroactive pruning"


@renames(when_all_fall="if_all_pruned")
@documented
@dataclass(frozen=True)
class Pruning:
    """How tokens are pruned after the fact.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    rule: str | PruningRule = setting(
        "posterior",
        RuleChoice(RULES, PruningRule),
        "Prune tokens of earlier sets by what came after them. posterior: how well they explain "
        "it. attention: how much later rows look at them. probability, random: baselines that "
        "look at nothing. Or a rule of your own.",
        panel=_PANEL,
    )
    threshold: float = setting(
        0.5,
        Number(0, 1),
        "Base of the pruning threshold, in [0, 1]; see `pruning.schedule`.",
        panel=_PANEL,
    )
    decision: str | DecisionRule = setting(
        "relative",
        RuleChoice(DECISIONS, DecisionRule),
        "relative: score / best score of the set below the threshold. absolute: score below it. "
        "sigmoid: 1 / (1 + exp(-steepness (threshold - score))) above 0.5, or drawn where the run "
        "samples. quota: the lowest scores, so that `pruning.keep_rate` stays. Or a rule of your "
        "own.",
        panel=_PANEL,
    )
    steepness: float = setting(
        50.0,
        Number(0, sys.float_info.max, low_open=True),
        "Steepness of the sigmoid decision, above 0.",
        panel=_PANEL,
    )
    keep_rate: float = setting(
        0.75,
        Number(0, 1, low_open=True),
        "Share of the tokens in sets of several that quota keeps, in (0, 1].",
        panel=_PANEL,
    )
    schedule: Schedule = setting(
        Bezier(),
        ScheduleText(),
        "Factor f(step / `max_tokens`) on the pruning threshold: constant, bezier(p1,p2) or "
        "relu(activation); `tempo-mlx schedule` draws it.",
        panel=_PANEL,
    )
    lookback: int = setting(
        3, Count(), "Judge a set until it is this many steps old. At least 1.", panel=_PANEL
    )
    min_age: int = setting(
        1, Count(), "Judge no set that is younger, in [1, `pruning.lookback`].", panel=_PANEL
    )
    if_all_pruned: str = setting(
        "keep_best",
        Choice(IF_ALL_PRUNED),
        "What happens to a set that would lose all.",
        panel=_PANEL,
    )
    layers: int | tuple[int, ...] | None = setting(
        None,
        Layers(),
        "Layers whose attention counts: all, last:N, or numbers from 0 like 3,7,11.",
        shown="all",
        panel=_PANEL,
    )
    layer_weights: str = setting(
        "uniform",
        Choice(LAYER_WEIGHTS),
        "rising: linear from 0.5 to 1 over the layers.",
        panel=_PANEL,
    )
    query_weights: str = setting(
        "equal",
        Choice(QUERY_WEIGHTS),
        "Whether rows count alike or by the probability of their token.",
        panel=_PANEL,
    )
    repair: str = setting(
        "none",
        Choice(REPAIRS),
        "recompute: run later slots again as if the pruned token had never been there.",
        panel=_PANEL,
    )
    compact_above: float = setting(
        COMPACT_ABOVE,
        Number(0, 1),
        "Share of dead slots in the cache above which it is compacted, in [0, 1].",
        option=False,
    )

    def __post_init__(self) -> None:
        check_all(self, "prune ")
        if self.min_age > self.lookback:
            raise TempoError(
                f"prune min_age must be in [1, lookback] = [1, {self.lookback}], got {self.min_age}"
            )
        if self.repair == "recompute" and self.if_all_pruned == "drop_set":
            raise TempoError(
                "prune repair recompute needs a token of each set to go on from, "
                "so if_all_pruned must be keep_best or keep_all, got 'drop_set'"
            )

    @property
    def scoring(self) -> PruningRule:
        """The rule that scores."""
        return pruning_rule(self.rule)

    @property
    def deciding(self) -> DecisionRule:
        """The rule that decides."""
        return decision_rule(self.decision)

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
        weights /= weights.sum()
        return weights

    def to_dict(self) -> dict[str, Any]:
        """One key for each setting; the schedule as its text."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        texts = {name: str(getattr(self, name)) for name in ("rule", "decision", "schedule")}
        return {**vars(self), **texts, "layers": layers}


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
        self._seen = self._pruned = 0

    def judge(self, step: int, set_step: int, evidence: Evidence) -> PruningDecision:
        """The verdict on the live tokens of one set after the forward pass of ``step``."""
        pruning = self.pruning
        scores = pruning.scoring.scores(evidence)
        threshold = pruning.threshold * pruning.schedule(step / self._total_steps)
        self._seen += len(scores)
        judging = Judging(
            threshold, pruning.steepness, pruning.keep_rate, self._rng, self._seen, self._pruned
        )
        pruned = pruning.deciding.verdict(scores, judging)
        if pruned.all():
            pruned = IF_ALL_PRUNED[pruning.if_all_pruned](pruned, scores)
        self._pruned += int(pruned.sum())
        return PruningDecision(
            step,
            set_step,
            threshold,
            evidence.slots.tolist(),
            scores.tolist(),
            pruned.tolist(),
        )

    def wants(self, age: int) -> bool:
        """Whether a set of this age, in steps, is to be judged."""
        if not self.pruning.deciding.by_threshold:
            return age == self.pruning.lookback
        return self.pruning.min_age <= age <= self.pruning.lookback
