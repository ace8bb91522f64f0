"""Settings of a search over texts."""

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
NEEDS: Needs = {
    "depth": (_ROLLOUT,),
    "rollout_temp": (_ROLLOUT,),
    "kv_group_size": (Need("kv_bits"),),
}

#: Settings that say which of several continuations is chosen.
_CHOICES = ("simulations", "selection", "exploration", "backup", "evaluation", "leaves_per_batch")


@documented
@dataclass(frozen=True)
class SearchSettings:
    """How a text is searched for.

    Where a name of a rule is accepted, a function or an object of the rule's class is, too; see
    docs/extending.md.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    max_tokens: int = setting(32, Count(), "Tokens of the text at most, at least 1.", short="-m")
    simulations: int = setting(
        32,
        Count(),
        "Simulations for each token, at least 1; then the most visited child is committed, and "
        "what is known below it is kept.",
        short="-s",
    )
    threshold: float = setting(
        0.05,
        Number(0, 1, low_open=True),
        "Tokens with at least this probability are tried, in (0, 1]; the most probable one always "
        "is.",
    )
    max_parallel: int = setting(8, Count(), "Tokens tried after each text at most, at least 1.")
    selection: str | ChildRule = same(TreePolicy, "selection", "puct")
    exploration: float = same(TreePolicy, "exploration", 1.0)
    backup: str | BackupRule = same(TreePolicy, "backup", "mean")
    leaves_per_batch: int = same(TreePolicy, "leaves_per_batch", 8)
    evaluation: str | EvaluationRule = setting(
        "mean_logprob",
        RuleChoice(EVALUATIONS, EvaluationRule),
        "What a text is worth: mean_probability of its tokens, mean_logprob (the geometric mean "
        "of their probabilities), or rollout (the same of it and `depth` more tokens). Or a rule "
        "of your own, of the probabilities of its tokens.",
    )
    depth: int = setting(8, Count(), "Tokens of a rollout, at least 1.")
    rollout_temp: float = setting(
        0.0,
        Temperature(advice="0 makes rollouts greedy", or_zero=True),
        "0 for greedy rollouts, else the temperature they are drawn at, in [1e-6, 1e6].",
    )
    seed: int = setting(0, Seed(), "Seed of the draws.")
    max_forward_tokens: int | None = setting(
        None,
        Count(),
        "End when this many tokens, the prompt included, passed through the model; above the "
        "prompt's number.",
    )
    max_seconds: float | None = setting(
        None,
        Number(0, MOST_SECONDS, low_open=True, said="above 0, "),
        "End this long after the prompt was read, with what is known.",
    )
    max_kv_bytes: int | None = setting(
        None, Bytes(), "Memory for keys, values and states, such as 800MB or 2GiB."
    )
    json_schema: Mapping[str, Any] | None = json_schema_setting()
    regex: str | None = regex_setting()
    grammar: str | None = lark_setting()
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
        """How keys and values are quantised; from the beginning, for texts of all lengths."""
        return None if self.kv_bits is None else KVQuantization(self.kv_bits, self.kv_group_size)

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
