"""Suites: prompts, seeds and a grid of settings, written in one YAML file.

A suite expands into runs. A run is identified by its full configuration and the model, so a suite
finds its own results again, and no others.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    field_validator,
)

from ..decode.prompt_files import setting_names, settings_from_json
from ..decode.request import require_observable
from ..errors import TempoError
from ..rules.own import is_place, load_rules
from ..rules.pruning import Pruning
from ..settings import Settings
from .suite_keys import STRICT, Grid, SettingsSpec

#: Version of what identifies a run.
SCHEMA = 1

#: What is kept of a run besides its tokens.
CAPTURES = ("reductions", "full", "none")


class SuiteError(TempoError):
    """A suite cannot be run. One line names the key and its value."""


Text = Annotated[str, Field(min_length=1)]
Category = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Suite(BaseModel):
    """One experiment, as its file has it.

    Every combination of the grid is a condition. Every prompt is run in every condition, with every
    seed where the condition draws tokens.
    """

    model_config = STRICT
    _folder: Path | None = PrivateAttr(None)

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the suite.")
    ]
    description: str = Field("", description="Purpose of the suite.")
    model: Text = Field(
        "smollm2-135m", description="Recipe, folder in mlx-lm layout, or Hugging Face Hub id."
    )
    prompts: dict[Category, Annotated[list[Text], Field(min_length=1)]] = Field(
        min_length=1, description="Prompts by category; each prompt is one observation."
    )
    seeds: list[Seed] = Field(
        [], description="Seeds of the draws, for conditions with sampling gumbel or pruning random."
    )
    settings: SettingsSpec = Field(  # type: ignore[valid-type]
        default_factory=SettingsSpec, description="Settings of every run."
    )
    grid: Grid = Field(  # type: ignore[valid-type]
        default_factory=Grid,
        description="Settings that vary, each with a list of values; every combination is run.",
    )
    captures: Literal["reductions", "full", "none"] = Field(
        "reductions",
        description="What is kept besides the tokens: reductions of attention and distributions, "
        "attention matrices as well, or nothing.",
    )

    @field_validator("prompts")
    @classmethod
    def _once(cls, prompts: dict[str, list[str]]) -> dict[str, list[str]]:
        texts = [text for each in prompts.values() for text in each]
        for text in texts:
            if texts.count(text) > 1:
                raise TempoError(f"{text!r} is there twice; each prompt is one observation")
        return prompts

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise TempoError("a seed is there twice")
        return seeds

    def beside(self, file: Path) -> "Suite":
        """The suite of a file, whose folder the paths of rules are relative to."""
        self._folder = file.parent
        return self

    def to_dict(self) -> dict[str, Any]:
        """The suite as in its file, with defaults."""
        data = self.model_dump(mode="json", exclude={"settings", "grid"})
        return data | {name: self._given(name) for name in ("settings", "grid")}

    def _given(self, name: str) -> dict[str, Any]:
        """The keys that are set in the settings or the grid."""
        given: dict[str, Any] = getattr(self, name).model_dump(exclude_unset=True)
        return given

    def conditions(self) -> Iterator[tuple[dict[str, Any], Settings]]:
        """(value of each grid key, settings) of every combination; visibility varies fastest.

        Raises:
            SuiteError: naming a setting that is out of range or conflicts with another.
        """
        fixed = self._given("settings")
        axes: dict[str, list[Any]] = {}
        for name, values in self._given("grid").items():
            if isinstance(values, dict):
                axes |= {f"{name}.{inner}": each for inner, each in values.items()}
            else:
                axes[name] = values
        # The last axis varies fastest.
        names = sorted(axes, key=lambda name: name == "visibility")
        for values in itertools.product(*(axes[name] for name in names)):
            varied = dict(zip(names, values, strict=True))
            given = dict(fixed)
            for name, value in varied.items():
                outer, _, inner = name.partition(".")
                if inner:
                    value = {**(given.get(outer) or {}), inner: value}
                given[outer] = value
            try:
                settings = _settings(given, self._folder)
            except TempoError as error:
                shown = ", ".join(f"{name} {_shown(value)}" for name, value in varied.items())
                where = f" ({shown})" if shown else ""
                raise SuiteError(f"suite {self.name}{where}: {error}") from error
            # The user's own rule is recorded by its name.
            known = settings.values()
            yield {n: str(known[n]) if is_place(varied[n]) else varied[n] for n in axes}, settings

    def expand(self) -> "Plan":
        """The runs of the suite.

        Raises:
            SuiteError: as :meth:`conditions`, or if a condition draws tokens without seeds.
        """
        runs: dict[str, RunConfig] = {}
        in_grid = 0
        seeds: list[int | None] = [*self.seeds] or [None]
        conditions = list(self.conditions())
        still = [settings for _, settings in conditions if not settings.uses_rng]
        varying = [
            n for n in conditions[0][0] if any(v[n] != conditions[0][0][n] for v, _ in conditions)
        ]
        labels = [label(varied, settings, varying) for varied, settings in conditions]
        for (_, settings), condition in zip(conditions, labels, strict=True):
            if settings.uses_rng and not self.seeds:
                raise SuiteError(
                    f"suite {self.name}: condition {condition} draws tokens, but seeds is empty"
                )
            if settings.branching == "replicate":
                raise SuiteError(
                    f"suite {self.name}: branching replicate generates from one prompt at a time; "
                    "use branching shared"
                )
            if self.captures != "none":
                try:
                    require_observable(settings)
                except TempoError as error:
                    raise SuiteError(f"suite {self.name}, captures {self.captures}: {error}") from (
                        error
                    )
        for category, texts in self.prompts.items():
            for number, text in enumerate(texts, 1):
                for seed in seeds:
                    for (varied, settings), condition in zip(conditions, labels, strict=True):
                        in_grid += 1
                        run = RunConfig(
                            f"{category}-{number}",
                            category,
                            text,
                            replace(settings, seed=seed if settings.uses_rng else None),
                            condition,
                            varied,
                            self.captures,
                        )
                        runs.setdefault(run.id(""), run)
        notes = []
        if self.seeds and still:
            which = (
                "no condition draws"
                if len(still) == len(conditions)
                else f"{len(still)} conditions draw no"
            )
            notes.append(
                f"seeds have no effect where selection is deterministic ({which} tokens): "
                f"each distinct configuration is run once, {len(runs)} runs of {in_grid} in the "
                "grid"
            )
        elif len(runs) < in_grid:
            notes.append(
                f"{in_grid - len(runs)} runs of the grid are copies of others and are left out"
            )
        return Plan(list(runs.values()), in_grid, notes + self._without_effect(conditions))

    def _without_effect(self, conditions: list[tuple[dict[str, Any], Settings]]) -> list[str]:
        """Settings without effect, and in how many conditions."""
        counts = Counter(
            note
            for varied, settings in conditions
            for note in settings.notes(setting_names(self._given("settings") | varied))
        )
        n = len(conditions)
        return [
            note if k == n else f"{note} (in {k} of {n} conditions)" for note, k in counts.items()
        ]


@dataclass(frozen=True)
class RunConfig:
    """One run of a suite.

    Args:
        prompt_id: category and number, "narrative-1".
        category: of the prompt.
        prompt: text.
        settings: with the seed, which is None if nothing is drawn.
        condition: label of the values that the grid varies.
        varied: value of each grid key.
        captures: one of :data:`CAPTURES`.
    """

    prompt_id: str
    category: str
    prompt: str
    settings: Settings
    condition: str
    varied: dict[str, Any]
    captures: str = "reductions"

    def to_dict(self) -> dict[str, Any]:
        """What determines the results, together with the model."""
        return {
            "schema": SCHEMA,
            "prompt": self.prompt,
            "settings": self.settings.to_dict(),
            "captures": self.captures,
        }

    def id(self, model: str) -> str:
        """16 hexadecimal digits, a hash of the configuration and the model.

        Args:
            model: the :func:`~tempo_mlx.weights.fingerprint.identify` of model and tokenizer.
        """
        text = json.dumps(
            [self.to_dict() | {"settings": self.settings.identity()}, model], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def group(self) -> str:
        """Key of the run's group: equal for runs that differ in visibility only."""
        data = self.to_dict() | {"settings": self.settings.identity()}
        del data["settings"]["visibility"]
        data["settings"].get("rules", {}).pop("visibility", None)
        return json.dumps(data, sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """The runs of a suite.

    Args:
        runs: each distinct configuration once.
        in_grid: prompts x conditions x seeds.
        notes: for the user.
    """

    runs: list[RunConfig]
    in_grid: int
    notes: list[str]

    @property
    def groups(self) -> list[list[RunConfig]]:
        """The runs, grouped with those that differ in visibility only."""
        found: dict[str, list[RunConfig]] = {}
        for run in self.runs:
            found.setdefault(run.group, []).append(run)
        return list(found.values())


def label(varied: dict[str, Any], settings: Settings, names: list[str]) -> str:
    """The visibility and the other named grid keys: "visible, combine=mean"."""
    others = [f"{name}={_shown(varied[name])}" for name in names if name != "visibility"]
    return ", ".join([settings.visibility_rule.name, *others])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}={_shown(each)}" for name, each in value.items()) + ")"
    return "none" if value is None else str(value)


def _settings(given: dict[str, Any], folder: Path | None) -> Settings:
    """Settings of values as YAML has them.

    Args:
        folder: of the suite's file, which the files of rules are relative to.
    """
    values = load_rules(settings_from_json(given, Settings), Settings, folder)
    if values.get("pruning") is not None:
        values["pruning"] = Pruning(**values["pruning"])
    return Settings(**values)
