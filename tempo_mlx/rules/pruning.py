"""Retroactive pruning: removing tokens of earlier sets that later steps did not need.

A pruning rule scores the live tokens of one set by the evidence from later steps. A decision rule
turns the scores into a verdict.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    """The evidence on the n live tokens of one set when it is judged; every array is [n].

    Args:
        probabilities: selection probabilities.
        slots: slot numbers.
        attention: received from the rows of the last forward pass, averaged over rows, heads and
            layers; zeros if nothing was captured.
        posterior: gamma, how well each token explains the tokens that followed; sums to 1.
        seed: of the run, for rules that draw.
    """

    probabilities: np.ndarray
    slots: np.ndarray
    attention: np.ndarray
    posterior: np.ndarray
    seed: int


def attention(evidence: Evidence) -> np.ndarray:
    """Attention received, a_i = mean over query rows, heads and layers of softmax(q k^T)_i.

    TEMPO's idea: a token that later steps do not attend to was not needed. Attention pools in the
    first token and decays with distance, so only scores of siblings can be compared.
    """
    return evidence.attention


def posterior(evidence: Evidence) -> np.ndarray:
    """gamma_i ~ alpha_i beta_i of the forward-backward algorithm; see :mod:`.posterior`."""
    return evidence.posterior


def probability(evidence: Evidence) -> np.ndarray:
    """The selection probability: a baseline that ignores later steps."""
    return evidence.probabilities


def random(evidence: Evidence) -> np.ndarray:
    """A uniform draw for each token, the same each time it is judged: a baseline."""
    return np.array(
        [np.random.default_rng([evidence.seed, slot]).random() for slot in evidence.slots]
    )


@dataclass(frozen=True)
class PruningRule(Rule):
    """A rule (evidence) -> scores [n]; a higher score is better.

    Args:
        needs_attention: whether it reads ``evidence.attention``, which makes passes slower.
        draws: whether it uses random numbers, so the seed matters.
    """

    needs_attention: bool = False
    draws: bool = False

    def scores(self, evidence: Evidence) -> np.ndarray:
        """The rule's scores, [n]; TempoError if it returns anything else."""
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
    """Arguments of a decision rule besides the scores of the n live tokens of a set.

    Args:
        threshold: of this step.
        steepness, keep_rate: see :class:`Pruning`.
        rng: for drawn verdicts; None if verdicts are not drawn.
        seen: tokens that the run has judged so far, including this set's.
        pruned: how many of them were pruned.
    """

    threshold: float
    steepness: float = 50.0
    keep_rate: float = 0.75
    rng: np.random.Generator | None = None
    seen: int = 0
    pruned: int = 0


def relative(scores: np.ndarray, judging: Judging) -> np.ndarray:
    """score / best score of the set < threshold."""
    # score / best < threshold, without a division by 0.
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
    """Prune the lowest scores, as many as ``keep_rate`` of all tokens allows, but never a set."""
    allowed = int((1 - judging.keep_rate) * judging.seen - judging.pruned + 1e-9)
    pruned = np.zeros(len(scores), bool)
    pruned[np.argsort(scores, kind="stable")[: min(allowed, len(scores) - 1)]] = True
    return pruned


@dataclass(frozen=True)
class DecisionRule(Rule):
    """A rule (scores [n], judging) -> which tokens are pruned, booleans [n].

    Args:
        by_threshold: whether it compares with a threshold and judges a set at every age. If not, a
            set is judged once, when it is ``lookback`` steps old.
        keeps_best: whether it never prunes the best token of a set.
        draws: whether its verdicts are drawn if the run samples.
    """

    by_threshold: bool = True
    keeps_best: bool = False
    draws: bool = False

    def verdict(self, scores: np.ndarray, judging: Judging) -> np.ndarray:
        """Which tokens are pruned, booleans [n], before ``if_all_pruned``.

        Raises:
            TempoError: if the rule returns anything else.
        """
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
    """Prune all but the best token."""
    kept = pruned.copy()
    kept[scores.argmax()] = False
    return kept


def keep_all(pruned: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Prune nothing."""
    return np.zeros(len(pruned), bool)


def drop_set(pruned: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Prune all tokens, which removes the set."""
    return pruned


#: Name -> the verdict for a set that would lose all its tokens.
IF_ALL_PRUNED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "keep_best": keep_best,
    "keep_all": keep_all,
    "drop_set": drop_set,
}
LAYER_WEIGHTS = ("uniform", "rising")
#: Share of dead slots above which the cache is compacted.
COMPACT_ABOVE = 0.25
QUERY_WEIGHTS = ("equal", "probability")
REPAIRS = ("none", "recompute")


_setting = partial(setting, panel="Retroactive pruning")


@renames(when_all_fall="if_all_pruned")
@documented
@dataclass(frozen=True)
class Pruning:
    """Settings of retroactive pruning.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    rule: str | PruningRule = _setting(
        "posterior",
        RuleChoice(RULES, PruningRule),
        "Prune tokens of earlier sets by what came after them. posterior: how well they explain "
        "it. attention: how much attention later rows pay to them. probability, random: baselines "
        "that ignore later steps. Or your own rule.",
    )
    threshold: float = _setting(
        0.5, Number(0, 1), "Base of the pruning threshold, in [0, 1]; see `pruning.schedule`."
    )
    decision: str | DecisionRule = _setting(
        "relative",
        RuleChoice(DECISIONS, DecisionRule),
        "relative: score / best score of the set below the threshold. absolute: score below it. "
        "sigmoid: 1 / (1 + exp(-steepness (threshold - score))) above 0.5, or drawn if the run "
        "samples. quota: prune the lowest scores and keep `pruning.keep_rate`. Or your own rule.",
    )
    steepness: float = _setting(
        50.0,
        Number(0, sys.float_info.max, low_open=True),
        "Steepness of the sigmoid decision, above 0.",
    )
    keep_rate: float = _setting(
        0.75,
        Number(0, 1, low_open=True),
        "Share of the tokens that quota keeps in sets of several tokens, in (0, 1].",
    )
    schedule: Schedule = _setting(
        Bezier(),
        ScheduleText(),
        "Factor f(step / `max_tokens`) on the pruning threshold: constant, bezier(p1,p2) or "
        "relu(activation); `tempo-mlx schedule` draws it.",
    )
    lookback: int = _setting(3, Count(), "Judge sets up to this age in steps. At least 1.")
    min_age: int = _setting(1, Count(), "Judge sets from this age on, in [1, `pruning.lookback`].")
    if_all_pruned: str = _setting(
        "keep_best", Choice(IF_ALL_PRUNED), "What to do with a set that would lose all its tokens."
    )
    layers: int | tuple[int, ...] | None = _setting(
        None,
        Layers(),
        "Layers whose attention counts: all, last:N, or numbers from 0 like 3,7,11.",
        shown="all",
    )
    layer_weights: str = _setting(
        "uniform", Choice(LAYER_WEIGHTS), "How layers are weighted; rising: linearly from 0.5 to 1."
    )
    query_weights: str = _setting(
        "equal", Choice(QUERY_WEIGHTS), "Weight rows equally, or by the probability of their token."
    )
    repair: str = _setting(
        "none",
        Choice(REPAIRS),
        "recompute: run later slots again as if the pruned token had never existed.",
    )
    compact_above: float = setting(
        COMPACT_ABOVE,
        Number(0, 1),
        "Compact the cache above this share of dead slots, in [0, 1].",
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
                "prune repair recompute needs a token of each set to continue from, "
                "so if_all_pruned must be keep_best or keep_all, got 'drop_set'"
            )

    @property
    def scoring(self) -> PruningRule:
        """The pruning rule."""
        return pruning_rule(self.rule)

    @property
    def deciding(self) -> DecisionRule:
        """The decision rule."""
        return decision_rule(self.decision)

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """Numbers of the layers to average in a model with ``n_layers``.

        Raises:
            ValueError: if the model does not have a layer.
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
        """One key for each setting; rules and the schedule as text."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        texts = {name: str(getattr(self, name)) for name in ("rule", "decision", "schedule")}
        return {**vars(self), **texts, "layers": layers}


class Pruner:
    """Judges the sets of one run.

    Args:
        pruning: the settings.
        total_steps: most steps of the run; the schedule's time is step / total_steps.
        seed: of the run's draws.
        uses_rng: whether verdicts of rules that draw are drawn.
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
        """Whether a set of this age in steps is judged."""
        if not self.pruning.deciding.by_threshold:
            return age == self.pruning.lookback
        return self.pruning.min_age <= age <= self.pruning.lookback
