"""Settings of a search over texts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import MOST_BYTES, check_count, check_range, check_seed
from ..kinds import Temperature
from ..needs import Need, Needs, told, unmet
from ..rules.rule import Rule, find, stored
from .monte_carlo import BackupRule, ChildRule, TreePolicy

#: The longest time that may be set, in seconds: more than 30 years.
MOST_SECONDS = 1e9


def arithmetic_mean(probabilities: list[float]) -> float:
    """The mean probability of a text's tokens: the original's."""
    return float(np.mean(probabilities))


def geometric_mean(probabilities: list[float]) -> float:
    """exp of the mean log-probability; 1 for no tokens, 0 if one of them underflowed."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(probabilities or [1.0]))))


@dataclass(frozen=True)
class EvaluationRule(Rule):
    """A rule (probabilities of a leaf's tokens, at least one) -> its value in [0, 1].

    Args:
        rolls_out: whether tokens that may follow the leaf count, too.
    """

    rolls_out: bool = False


#: Name -> rule.
EVALUATIONS: dict[str, EvaluationRule] = {
    rule.name: rule
    for rule in (
        EvaluationRule("mean_logprob", geometric_mean),
        EvaluationRule("mean_probability", arithmetic_mean),
        EvaluationRule("rollout", geometric_mean, rolls_out=True),
    )
}


def evaluation_rule(given: Any) -> EvaluationRule:
    """The rule of a name, an object or a function; TempoError for anything else."""
    return find("evaluation", given, EVALUATIONS, EvaluationRule)


_ROLLOUT = Need("evaluation", ("rollout",), holds=lambda rule: evaluation_rule(rule).rolls_out)

#: What settings need to have an effect.
NEEDS: Needs = {"depth": (_ROLLOUT,), "rollout_temp": (_ROLLOUT,)}

#: Settings that say which of several continuations is chosen.
_CHOICES = ("simulations", "selection", "exploration", "backup", "evaluation", "leaves_per_batch")


@dataclass(frozen=True)
class SearchSettings:
    """How a text is searched for.

    Args:
        max_tokens: tokens of the text at most, at least 1.
        simulations: for each token of the text, at least 1; after them the most visited child is
            committed, and what is known below it is kept.
        threshold: tokens with p >= threshold are a node's children, (0, 1]; the most probable one
            always is.
        max_parallel: children at most, at least 1.
        selection, exploration, backup, leaves_per_batch: see
            :class:`~tempo_mlx.search.monte_carlo.TreePolicy`.
        evaluation: "mean_probability" of a text's tokens (the original's), "mean_logprob" (the
            geometric mean of their probabilities, so that it is in [0, 1]), or "rollout" (the
            same of the text and ``depth`` tokens that follow it).
        depth: tokens of a rollout, at least 1.
        rollout_temp: 0 for greedy rollouts, else the temperature at which they are drawn,
            [1e-6, 1e6].
        seed: of the draws.
        max_forward_tokens: the search ends once so many tokens have passed through the model, the
            prompt included; the batch that reaches the number is finished. None sets no bound.
        max_seconds: the search ends once so many seconds have passed since the prompt was read;
            None sets no bound.
        max_kv_bytes: bytes of keys, values and recurrent states at most; None sets no bound.
        prefill_step_size: prompt tokens in one forward pass, at least 1.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    max_tokens: int = 32
    simulations: int = 32
    threshold: float = 0.05
    max_parallel: int = 8
    selection: str | ChildRule = "puct"
    exploration: float = 1.0
    backup: str | BackupRule = "mean"
    leaves_per_batch: int = 8
    evaluation: str | EvaluationRule = "mean_logprob"
    depth: int = 8
    rollout_temp: float = 0.0
    seed: int = 0
    max_forward_tokens: int | None = None
    max_seconds: float | None = None
    max_kv_bytes: int | None = None
    prefill_step_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_tokens", "simulations", "max_parallel", "depth", "prefill_step_size"):
            check_count(name, getattr(self, name))
        if self.max_forward_tokens is not None:
            check_count("max_forward_tokens", self.max_forward_tokens)
        if self.max_kv_bytes is not None:
            check_count("max_kv_bytes", self.max_kv_bytes, most=MOST_BYTES)
        if self.max_seconds is not None:
            check_range("max_seconds", self.max_seconds, 0.0, MOST_SECONDS, True, "above 0, ")
        check_range("threshold", self.threshold, 0.0, 1.0, low_open=True)
        if self.rollout_temp != 0:
            Temperature(advice="0 makes rollouts greedy").check("rollout_temp", self.rollout_temp)
        check_seed(self.seed)
        rule = stored(evaluation_rule(self.evaluation), EVALUATIONS)
        object.__setattr__(self, "evaluation", rule)
        policy = self.policy()
        for name in ("selection", "backup"):
            object.__setattr__(self, name, getattr(policy, name))

    @property
    def uses_rng(self) -> bool:
        """Whether anything is drawn, so that the seed matters."""
        return evaluation_rule(self.evaluation).rolls_out and self.rollout_temp > 0

    def notes(self, given: Iterable[str] | None = None) -> list[str]:
        """What a user should know about this combination of settings.

        Args:
            given: names of the settings that somebody asked for; those that are not at their
                defaults, if nobody says.
        """
        values, defaults = vars(self), vars(type(self)())
        asked = {n for n in values if values[n] != defaults[n]} if given is None else set(given)
        notes = []
        if "seed" in asked and not self.uses_rng:
            notes.append(
                "seed has no effect: a search is deterministic unless evaluation is rollout and "
                "rollout_temp is above 0"
            )
        for name in values:
            if name in asked and (missing := unmet(name, NEEDS, values.__getitem__)):
                notes.append(f"{name} has no effect {told(missing)}")
        choices = [name for name in values if name in asked and name in _CHOICES]
        if choices and (self.threshold == 1.0 or self.max_parallel == 1):
            notes.append(
                f"{', '.join(choices)}: no effect, because every text has one continuation "
                "(threshold 1 or max_parallel 1)"
            )
        return notes

    def policy(self) -> TreePolicy:
        """The part of the settings that knows of trees only."""
        return TreePolicy(self.selection, self.exploration, self.backup, self.leaves_per_batch)

    def to_dict(self) -> dict[str, Any]:
        """One key for each setting; rules by their names."""
        rules = {name: str(getattr(self, name)) for name in ("selection", "backup", "evaluation")}
        return vars(self) | rules
