"""Settings of a run: frozen, and validated on creation with errors that name the argument."""

import difflib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar, cast

from .arguments import shown
from .errors import TempoError
from .models import KVQuantization, PlainModel, PositionedModel
from .needs import NEEDS, told, unmet
from .old_names import first_names, renamed, renames
from .rules.combining import COMBINE, CombiningRule, combining_rule
from .rules.grammar import GRAMMARS, compiled, json_schema_setting, lark_setting, regex_setting
from .rules.processors import LogitsProcessor, Sampler
from .rules.pruning import COMPACT_ABOVE, Pruning
from .rules.rule import Named, source_of, stored
from .rules.schedules import Constant, Schedule
from .rules.selection import SAMPLING, SamplingRule, sampling_rule
from .rules.table import (
    Biases,
    Choice,
    Count,
    Function,
    Functions,
    Inner,
    Number,
    OneOf,
    RuleChoice,
    ScheduleText,
    Seed,
    Temperature,
    Texts,
    check_all,
    documented,
    setting,
    table,
)
from .rules.visibility import VISIBILITY, Visibility, visibility_of

#: How the tokens of a set are weighted as keys.
WEIGHTINGS = ("none", "prior", "posterior")

#: Steps that a posterior weight looks ahead without pruning, which has its own lookback.
WEIGHTING_LOOKBACK = 3

#: Largest beam margin in nats; no model's logits differ by more.
MOST_MARGIN = 1e6

#: How the branches of a tree are stored.
BRANCHING = ("shared", "replicate")


#: Panels of the command line's help.
_SPEED = "Speed"
_MLX = "As in mlx-lm"
_tree_setting = partial(setting, panel="Trees")
_speed_setting = partial(setting, panel=_SPEED)
_mlx_setting = partial(setting, panel=_MLX)

#: Sources of drafts.
DRAFTS = ("auto", "lookup", "recycle", "none")

#: Bits and group sizes that ``mx.quantize`` supports.
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)

#: Largest penalty on a logit.
MOST_PENALTY = 1e6


@renames(max_leaves="beam_width", leaf_margin="beam_margin")
@documented
@dataclass(frozen=True)
class Settings:
    """Settings of a run: selection, visibility, combining and more.

    Rules can be given by name, as a function, or as an instance of the rule's class; see
    docs/extending.md.

    Raises:
        ValueError: naming the argument, its value and the allowed range.
    """

    max_tokens: int = setting(
        100, Count(), "Most steps; each makes one set. At least 1.", short="-m"
    )
    threshold: float = setting(
        0.1,
        Number(0, 1, low_open=True),
        "Tokens with at least this probability form the set, in (0, 1]. 1 is greedy decoding; "
        "0.05 shows many alternatives.",
    )
    final_threshold: float | None = setting(
        None,
        Number(0, 1, low_open=True),
        "Threshold that `schedule` reaches at step = `max_tokens`, one after the last step, in "
        "(0, 1].",
    )
    schedule: Schedule = setting(
        Constant(),
        ScheduleText(),
        "How the threshold moves to `final_threshold`: constant, bezier(p1,p2) with p1, p2 in "
        "[0, 1], or relu(activation) with activation in [0, 1).",
    )
    max_parallel: int = setting(
        16, Count(), "Most tokens in one set; the most probable ones are kept. At least 1."
    )
    temp: float = setting(
        1.0,
        Temperature(advice="for greedy decoding use threshold 1"),
        "Temperature of the softmax before the threshold, in [1e-6, 1e6].",
    )
    sampling: str | SamplingRule = setting(
        "deterministic",
        RuleChoice(SAMPLING, SamplingRule),
        "deterministic, or gumbel: draw `max_parallel` tokens without replacement, then apply the "
        "threshold to them. Or your own rule.",
    )
    seed: int | None = setting(
        None, Seed(), "Seed of the draws; it has no effect unless the run draws something."
    )
    visibility: str | Visibility | None = setting(
        None,
        RuleChoice(VISIBILITY, Visibility),
        "What a token sees. isolated: earlier steps and itself. visible: also its siblings. "
        "hidden: as isolated, but later steps do not see sets of several tokens. tree: the tokens "
        "that lead to it; every branch continues separately. recombined: as tree, with one branch "
        "for each token, its most probable text. Or your own rule.",
        shown="recombined; isolated with pruning, weighting or `temp`",
    )
    combine: str | CombiningRule = setting(
        "mixture",
        RuleChoice(COMBINE, CombiningRule),
        "How the rows of a set are combined into the next distribution. mixture: weighted by the "
        "tokens' probabilities. mean: equal weights. product: weighted mean of the "
        "log-probabilities. last: the last row alone. Or your own rule.",
    )
    pruning: Pruning | None = setting(
        None, Inner(Pruning), "Settings of retroactive pruning; None prunes nothing."
    )
    beam_width: int = _tree_setting(
        8,
        Count(),
        "With `visibility` tree, most branches; the most probable texts are kept. At least 1.",
    )
    beam_margin: float | None = _tree_setting(
        None,
        Number(0, MOST_MARGIN),
        "With `visibility` tree, drop branches more than this many nats below the best one.",
    )
    branching: str = _tree_setting(
        "shared",
        Choice(BRANCHING),
        "With `visibility` tree, how branches are stored. shared: all in one sequence. replicate: "
        "each with a copy of the state, which works for any model.",
    )
    weighting: str = setting(
        "none",
        Choice(WEIGHTINGS),
        "Weight of a set's tokens as keys, summing to 1 over the set. prior: selection "
        "probability. posterior: probability given what came after. none: each has weight 1.",
    )
    stop: tuple[str, ...] = setting(
        (), Texts(), "Stop before this text, once the most probable tokens spell it. Repeatable."
    )
    top_p: float = _mlx_setting(
        0.0,
        Number(0, 1),
        "Keep the most probable tokens that together have this probability, in [0, 1]; 0 and 1 "
        "keep all. This and the following options change each branch's distribution before the "
        "threshold, as mlx-lm does.",
    )
    top_k: int = _mlx_setting(
        0, Count(0), "Keep this many of the most probable tokens; 0 keeps all."
    )
    min_p: float = _mlx_setting(
        0.0,
        Number(0, 1),
        "Keep tokens with at least this share of the highest probability, in [0, 1].",
    )
    min_tokens_to_keep: int = _mlx_setting(
        1, Count(), "Fewest tokens that `min_p` keeps. At least 1."
    )
    xtc_probability: float = _mlx_setting(
        0.0, Number(0, 1), "Probability of excluding all top choices except the least likely one."
    )
    xtc_threshold: float = _mlx_setting(
        0.1, Number(0, 0.5), "Least probability of a top choice for `xtc_probability`, in [0, 0.5]."
    )
    repetition_penalty: float | None = _mlx_setting(
        None,
        Number(0, MOST_PENALTY, low_open=True),
        "Divide positive logits of tokens that occur in the text by this, and multiply negative "
        "ones; 1 changes nothing.",
    )
    repetition_context_size: int = _mlx_setting(
        20, Count(), "Last tokens of the text that `repetition_penalty` looks at."
    )
    presence_penalty: float | None = _mlx_setting(
        None,
        Number(-MOST_PENALTY, MOST_PENALTY),
        "Subtract this from the logits of tokens that occur in the text.",
    )
    presence_context_size: int = _mlx_setting(
        20, Count(), "Last tokens of the text that `presence_penalty` looks at."
    )
    frequency_penalty: float | None = _mlx_setting(
        None,
        Number(-MOST_PENALTY, MOST_PENALTY),
        "Subtract this from a token's logit for each occurrence in the text.",
    )
    frequency_context_size: int = _mlx_setting(
        20, Count(), "Last tokens of the text that `frequency_penalty` looks at."
    )
    logit_bias: Mapping[int, float] | None = _mlx_setting(
        None, Biases(), "Add a number to the logit of a token: ID=BIAS. Repeatable."
    )
    logits_processors: tuple[LogitsProcessor, ...] = setting(
        (),
        Functions(),
        "Functions (tokens so far [L], logits [1, V]) -> logits, as in mlx-lm.",
        option=False,
    )
    sampler: Sampler | None = setting(
        None,
        Function(),
        "Function (log-probabilities [1, V]) -> a drawn token [1], as in mlx-lm; needs threshold "
        "1.",
        option=False,
    )
    json_schema: Mapping[str, Any] | None = json_schema_setting()
    regex: str | None = regex_setting()
    grammar: str | None = lark_setting()
    kv_bits: int | None = _mlx_setting(
        None,
        OneOf(KV_BITS),
        "Keep keys and values as numbers of so many bits, as mlx-lm does: 2, 3, 4, 5, 6 or 8. "
        "Less memory, other results.",
    )
    kv_group_size: int = _mlx_setting(
        64,
        OneOf(KV_GROUP_SIZES),
        "Numbers of a key or value that share a scale with `kv_bits`: 32, 64 or 128.",
    )
    quantized_kv_start: int = _mlx_setting(
        5000,
        Count(0),
        "Quantise with `kv_bits` once the text has so many tokens; in a batch it must be 0.",
    )
    draft: str = _speed_setting(
        "auto",
        Choice(DRAFTS),
        "How to draft tokens, which are then checked several in one pass; results are the same. "
        "lookup: what followed the text's last tokens before. recycle: what last followed each "
        "token. auto: lookup, where measurements on this device show it to be faster. none: no "
        "drafts.",
    )
    num_draft_tokens: int = _speed_setting(
        16, Count(), "Most tokens drafted in one pass. At least 1."
    )
    prefill_step_size: int = setting(
        2048, Count(), "Prompt tokens in one forward pass; fewer need less memory. At least 1."
    )

    def __post_init__(self) -> None:
        check_all(self)
        moves = not isinstance(self.schedule, Constant)
        if self.final_threshold is not None and not moves:
            raise TempoError(
                "final_threshold needs a schedule that moves: bezier(p1,p2) or relu(activation)"
            )
        if self.final_threshold is None and moves:
            raise TempoError(f"schedule {self.schedule} needs a final_threshold to move towards")
        if self.branching == "replicate" and self.visibility_rule is not VISIBILITY["tree"]:
            raise TempoError(
                f"branching replicate needs visibility tree, got {self.visibility_rule}: each "
                "branch has a row and sees its own text"
            )
        if self.has_parents:
            self._check_parents()
        if self.kv_bits is not None:
            if self.branching == "replicate":
                raise TempoError(
                    "kv_bits needs branching shared: replicate keeps its rows in mlx-lm's batch "
                    "caches, which cannot quantise"
                )
            if self.draft not in ("auto", "none"):
                raise TempoError(f"draft must be auto or none with kv_bits, got {self.draft}")
        one = self.greedy and self.by_probability and self.branching != "replicate"
        if self.sampler is not None and not one:
            raise TempoError(
                "sampler draws the one token of each step: it needs threshold 1, sampling "
                "deterministic and branching shared. For sets, use sampling gumbel with top_p, "
                "top_k and the like"
            )
        if self.has_grammar:
            compiled(self.json_schema, self.regex, self.grammar)
            if not (self.has_parents or self.always_single):
                raise TempoError(
                    f"a grammar needs tokens that continue one text, and with visibility "
                    f"{self.visibility_rule} a set of several continues all of them: choose "
                    "recombined or tree"
                )

    def _check_parents(self) -> None:
        """Refuse settings without an exact meaning when tokens have parents."""
        where = f"visibility {self.visibility_rule}"
        if self.pruning is not None:
            raise TempoError(
                f"pruning judges the tokens of a set by what follows all of them; with {where} "
                "each token continues one other, and dies with its branch. Leave pruning out"
            )
        if self.weighting != "none":
            raise TempoError(f"weighting must be none with {where}, got {self.weighting!r}")
        if self.temp != 1.0:
            raise TempoError(
                f"temp must be 1 with {where}, whose texts are scored by the model's own "
                f"probabilities, got {self.temp}"
            )
        if self.branches and not self.by_probability:
            raise TempoError(f"sampling must be deterministic with {where}, got {self.sampling}")

    @property
    def kv_quantization(self) -> KVQuantization | None:
        """How keys and values are quantised; None for not at all."""
        if self.kv_bits is None:
            return None
        return KVQuantization(self.kv_bits, self.kv_group_size, self.quantized_kv_start)

    @property
    def visibility_rule(self) -> Visibility:
        """The visibility; if it was not given, one that suits the other settings."""
        if self.visibility is not None:
            return visibility_of(self.visibility)
        if self.branching == "replicate":
            return VISIBILITY["tree"]
        sets = self.pruning is not None or self.weighting != "none" or self.temp != 1.0
        return VISIBILITY["isolated" if sets else "recombined"]

    @property
    def combining_rule(self) -> CombiningRule:
        """How the rows of a set are combined."""
        return combining_rule(self.combine)

    @property
    def sampling_rule(self) -> SamplingRule:
        """How candidates are ranked."""
        return sampling_rule(self.sampling)

    @property
    def by_probability(self) -> bool:
        """Whether candidates are ranked by their probability."""
        return self.sampling_rule is SAMPLING["deterministic"]

    @property
    def has_parents(self) -> bool:
        """Whether each token continues one other token."""
        return self.visibility_rule.has_parents

    @property
    def branches(self) -> bool:
        """Whether each token of a set has its own continuations."""
        return self.visibility_rule.branches

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.sampling_rule.draws

    @property
    def uses_rng(self) -> bool:
        """Whether anything is drawn, so the seed matters."""
        drawn = self.is_sampled or self.xtc_probability > 0
        return drawn or (self.pruning is not None and self.pruning.scoring.draws)

    @property
    def greedy(self) -> bool:
        """Whether the threshold is always 1, so only the first candidate can be kept."""
        return self.threshold == 1.0 and self.final_threshold in (None, 1.0)

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar restricts which tokens may follow."""
        return any(each is not None for each in (self.json_schema, self.regex, self.grammar))

    @property
    def always_single(self) -> bool:
        """Whether every set has exactly one token, for any model."""
        if self.branches:
            return self.greedy or self.max_parallel == 1 or self.beam_width == 1
        return self.greedy or self.max_parallel == 1

    @property
    def looks_back(self) -> bool:
        """Whether earlier sets are pruned or weighted by what came after them."""
        return not self.always_single and (self.pruning is not None or self.weighting != "none")

    @property
    def repairs(self) -> bool:
        """Whether slots that saw a pruned token are run again."""
        return self.pruning is not None and self.pruning.repair == "recompute"

    @property
    def compact_above(self) -> float:
        """Share of dead slots above which the cache is compacted."""
        return self.pruning.compact_above if self.pruning else COMPACT_ABOVE

    @property
    def lookback(self) -> int:
        """Age in steps after which a set is no longer judged or weighted."""
        return self.pruning.lookback if self.pruning else WEIGHTING_LOOKBACK

    def resolved(self, model: PositionedModel | PlainModel) -> "Settings":
        """The settings for a run of a model, with a visibility and, if it draws, a seed.

        Raises:
            UnsupportedModelError: if the model does not support the settings.
            TempoError: for layers or token ids that the model does not have.
        """
        rule = self.visibility_rule
        if isinstance(model, PositionedModel):
            if not (self.has_parents or self.always_single):
                model.require_merging(rule.name)
            if self.pruning is not None and self.pruning.scoring.needs_attention:
                model.require_capture()
                self.pruning.chosen_layers(model.n_layers)
            if self.weighting != "none":
                model.require_additive_masks()
        for id in self.logit_bias or ():
            if id >= model.vocabulary_size:
                raise TempoError(
                    f"logit_bias must have token ids below {model.vocabulary_size}, the size of "
                    f"the model's vocabulary, got {id}"
                )
        seed = secrets.randbelow(2**32) if self.uses_rng and self.seed is None else self.seed
        return replace(self, visibility=stored(rule, VISIBILITY), seed=seed)

    def values(self) -> dict[str, Any]:
        """Every setting by name; settings of pruning, if any, are named "pruning.rule" etc."""
        own = vars(self) | {"visibility": stored(self.visibility_rule, VISIBILITY)}
        return own | ({} if self.pruning is None else _inner(self.pruning))

    def changed(self) -> set[str]:
        """Names of the settings that differ from their defaults."""
        defaults = type(self)().values() | _inner(Pruning())
        return {name for name, value in self.values().items() if value != defaults[name]}

    def notes(self, given: Iterable[str] | None = None) -> list[str]:
        """What a user should know about this combination of settings.

        Args:
            given: names of the settings that were given; None for those that differ from their
                defaults.
        """
        asked = self.changed() if given is None else set(given)
        values = self.values()
        names = [name for name in values if name in asked]
        notes = []
        if "seed" in names and self.seed is not None and not self.uses_rng:
            notes.append(
                "seed has no effect: a run is deterministic unless sampling is gumbel, the "
                "pruning rule is random or xtc_probability is above 0"
            )
        for name in names:
            if missing := unmet(name, NEEDS, values.__getitem__):
                notes.append(f"{name} has no effect {told(missing)}")
        sets = [name for name in names if name in ("combine", "pruning", "weighting")]
        if sets and self.always_single:
            notes.append(
                f"{', '.join(sets)}: no effect, because every set has one token (threshold 1, or "
                "max_parallel or beam_width 1)"
            )
        elif (
            self.pruning
            and self.pruning.scoring.needs_attention
            and self.visibility_rule.hides_sets
        ):
            notes.append(
                f"pruning.rule {self.pruning.rule} scores every token 0 with visibility "
                f"{self.visibility_rule}, where no later step looks at a set"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """One key for each setting; the schedule as text, rules by name."""
        return {
            **vars(self),
            "schedule": str(self.schedule),
            "sampling": str(self.sampling),
            "visibility": self.visibility_rule.name,
            "combine": str(self.combine),
            "pruning": self.pruning and self.pruning.to_dict(),
            "stop": list(self.stop),
            "logit_bias": self.logit_bias and {str(id): b for id, b in self.logit_bias.items()},
            "logits_processors": [_name_of(each) for each in self.logits_processors],
            "sampler": self.sampler and _name_of(self.sampler),
        }

    def identity(self) -> dict[str, Any]:
        """Everything that determines a run's results: settings, and the sources of users' rules.

        Settings have their original names, so results of earlier versions are found again.
        """
        own = {n: source_of(rule) for n, rule in self.values().items() if isinstance(rule, Named)}
        settings = first_names(self.to_dict(), Settings)
        for name, entry in table(Settings).items():
            if entry.panel == _SPEED:
                # Does not change results.
                del settings[name]
                continue
            # Settings that earlier versions did not have.
            later = entry.panel in (_MLX, GRAMMARS) or entry.kind.python_only
            if later and getattr(self, name) == getattr(Settings, name):
                del settings[name]
        if self.pruning is not None:
            settings["pruning"] = first_names(self.pruning.to_dict(), Pruning)
        return settings | ({"rules": own} if own else {})


def _name_of(function: Any) -> str:
    """A function's name in the record of settings."""
    named = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', '')}.{named}"


S = TypeVar("S")


def given(settings: S | None, kwargs: Mapping[str, Any], kind: type[S]) -> S:
    """The settings that a caller gave, as an object or as keyword arguments.

    Raises:
        TypeError: if both are given, or a name is not a setting.
        TempoError: for settings of another class, or invalid values.
    """
    if settings is None:
        known = [f.name for f in fields(cast(Any, kind))]
        unknown = sorted(set(kwargs) - {*known, *renamed(kind)})
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"unknown setting {unknown[0]!r}; {hint}settings are {', '.join(sorted(known))}"
            )
        return kind(**kwargs)
    if kwargs:
        raise TypeError(
            f"{sorted(kwargs)[0]!r} is given as well as settings; put it in the settings"
        )
    if not isinstance(settings, kind):
        raise TempoError(f"settings must be {kind.__name__}, got {shown(settings)}")
    return settings


def _inner(pruning: Pruning) -> dict[str, Any]:
    return {f"pruning.{name}": value for name, value in vars(pruning).items()}
