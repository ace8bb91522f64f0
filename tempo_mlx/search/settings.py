"""Settings of a text search."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models import KVQuantization
from ..needs import Need, Needs, told, unmet
from ..rules.grammar import compiled, json_schema_setting, lark_setting, regex_setting
from ..rules.rule import Rule, find
from ..rules.table import (
    Bytes,
    Count,
    Number,
    RuleChoice,
    Seed,
    Temperature,
    Texts,
    check_all,
    documented,
    same,
    setting,
)
from ..settings import Settings
from .monte_carlo import BackupRule, ChildRule, TreePolicy

#: The longest time that may be set, in seconds: more than 30 years.
MOST_SECONDS = 1e9


def arithmetic_mean(probabilities: list[float]) -> float:
    """The mean probability of a text's tokens, as in the original TEMPO."""
    return float(np.mean(probabilities))


def geometric_mean(probabilities: list[float]) -> float:
    """exp of the mean log-probability; 1 without tokens, 0 if a probability underflowed."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(probabilities or [1.0]))))


@dataclass(frozen=True)
class EvaluationRule(Rule):
    """A rule (probabilities of a leaf's tokens, at least one) -> its value in [0, 1].

    Args:
        rolls_out: whether the probabilities of a rollout after the leaf are included.
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

#: Conditions under which settings have an effect.
NEEDS: Needs = {
    "depth": (_ROLLOUT,),
    "rollout_temp": (_ROLLOUT,),
    "kv_group_size": (Need("kv_bits"),),
}

#: Settings that decide which of several continuations is chosen.
_CHOICES = ("simulations", "selection", "exploration", "backup", "evaluation", "leaves_per_batch")


@documented
@dataclass(frozen=True)
class SearchSettings:
    """Settings of a text search.

    Rules can be given by name, as a function, or as an instance of the rule's class; see
    docs/extending.md.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    max_tokens: int = setting(32, Count(), "Most tokens of the text, at least 1.", short="-m")
    simulations: int = setting(
        32,
        Count(),
        "Simulations for each token, at least 1. Then the most visited child is committed, and "
        "its subtree is kept.",
        short="-s",
    )
    threshold: float = setting(
        0.05,
        Number(0, 1, low_open=True),
        "Try tokens with at least this probability, in (0, 1]; the most probable one is always "
        "tried.",
    )
    max_parallel: int = setting(8, Count(), "Most tokens tried after each text, at least 1.")
    selection: str | ChildRule = same(TreePolicy, "selection", "puct")
    exploration: float = same(TreePolicy, "exploration", 1.0)
    backup: str | BackupRule = same(TreePolicy, "backup", "mean")
    leaves_per_batch: int = same(TreePolicy, "leaves_per_batch", 8)
    evaluation: str | EvaluationRule = setting(
        "mean_logprob",
        RuleChoice(EVALUATIONS, EvaluationRule),
        "Value of a text: mean_probability of its tokens, mean_logprob (the geometric mean of "
        "their probabilities), or rollout (the geometric mean including `depth` more tokens). Or "
        "your own rule: a function of the probabilities of its tokens.",
    )
    depth: int = setting(8, Count(), "Tokens of a rollout, at least 1.")
    rollout_temp: float = setting(
        0.0,
        Temperature(advice="0 makes rollouts greedy", or_zero=True),
        "Temperature of rollouts, in [1e-6, 1e6], or 0 for greedy rollouts.",
    )
    seed: int = setting(0, Seed(), "Seed of the draws.")
    max_forward_tokens: int | None = setting(
        None,
        Count(),
        "Stop searching once this many tokens have passed through the model, including the prompt; "
        "more than the prompt has.",
    )
    max_seconds: float | None = setting(
        None,
        Number(0, MOST_SECONDS, low_open=True, said="above 0, "),
        "Stop searching this many seconds after the prompt was read; tokens that the tree already "
        "has are still committed.",
    )
    max_kv_bytes: int | None = setting(
        None, Bytes(), "Most memory for keys, values and states, such as 800MB or 2GiB."
    )
    json_schema: Mapping[str, Any] | None = json_schema_setting()
    regex: str | None = regex_setting()
    grammar: str | None = lark_setting()
    stop: tuple[str, ...] = setting(
        (), Texts(), "End before this text, once a text's tokens spell it. Repeatable."
    )
    kv_bits: int | None = same(Settings, "kv_bits", None)
    kv_group_size: int = same(Settings, "kv_group_size", 64)
    prefill_step_size: int = setting(
        2048, Count(), "Prompt tokens in one forward pass, at least 1.", option=False
    )

    def __post_init__(self) -> None:
        check_all(self)
        compiled(self.json_schema, self.regex, self.grammar)

    @property
    def kv_quantization(self) -> KVQuantization | None:
        """How keys and values are quantised; None for not at all. Applies from the first token."""
        return None if self.kv_bits is None else KVQuantization(self.kv_bits, self.kv_group_size)

    @property
    def uses_rng(self) -> bool:
        """Whether anything is drawn, so the seed matters."""
        return evaluation_rule(self.evaluation).rolls_out and self.rollout_temp > 0

    def notes(self, given: Iterable[str] | None = None) -> list[str]:
        """What a user should know about this combination of settings.

        Args:
            given: names of the settings that were given; None for those that differ from their
                defaults.
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
                f"{', '.join(choices)}: no effect, because every text has only one continuation "
                "(threshold 1 or max_parallel 1)"
            )
        return notes

    def policy(self) -> TreePolicy:
        """The settings of the underlying tree search."""
        return TreePolicy(self.selection, self.exploration, self.backup, self.leaves_per_batch)

    def to_dict(self) -> dict[str, Any]:
        """One key for each setting; rules by their names."""
        rules = {name: str(getattr(self, name)) for name in ("selection", "backup", "evaluation")}
        return vars(self) | rules | {"stop": list(self.stop)}
