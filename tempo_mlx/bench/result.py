"""Results of benches: rows of measurements, and targets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

#: Version of the dictionary that :meth:`Result.to_dict` returns.
SCHEMA = 2


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a repeated measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios of paired measurements."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


@dataclass(frozen=True)
class Row:
    """One quantity of one variant.

    Args:
        group: rows that are compared with each other.
        name: of the variant.
        measure: what was measured, such as "time of a step".
        unit: of the values: "s", "bytes", "bytes/s", "tokens/s", "nats"; "" for plain numbers.
        values: one for each round, or a single one.
        ratios: of the values to those of other variants, round by round, by the other's name.
    """

    group: str
    name: str
    measure: str
    unit: str
    values: list[float]
    ratios: dict[str, Spread] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.values)

    @property
    def median(self) -> float:
        return self.spread.median

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | asdict(self.spread)


def compared(
    group: str,
    measure: str,
    unit: str,
    taken: Mapping[str, Sequence[float]],
    *baselines: str,
) -> list[Row]:
    """A row for each variant, with its ratios to each of the baselines.

    Args:
        taken: name of the variant -> its values, one for each round.
        baselines: names of variants.
    """
    return [
        Row(
            group,
            name,
            measure,
            unit,
            [*values],
            {of: ratio(values, taken[of]) for of in baselines},
        )
        for name, values in taken.items()
    ]


def single(group: str, measure: str, unit: str, taken: Mapping[str, float]) -> list[Row]:
    """A row for each variant, with a single value."""
    return [Row(group, name, measure, unit, [one]) for name, one in taken.items()]


@dataclass(frozen=True)
class Target:
    """A target for a measurement.

    Args:
        name: what is measured.
        relation: ">=" or "<=".
        wanted, value: the bound, and the measured value.
    """

    name: str
    relation: str
    wanted: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.relation == ">=" else self.value <= self.wanted


@dataclass(frozen=True)
class Result:
    """The result of a bench.

    Args:
        bench: its name.
        model: name of the model.
        setting: where and how it was measured, see :meth:`.setting.Subject.describe`.
        rows: the measurements.
        targets: for some of the measurements.
    """

    bench: str
    model: str
    setting: dict[str, Any]
    rows: list[Row]
    targets: list[Target]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: seconds, bytes, nats; :data:`SCHEMA` is its version."""
        return {
            "schema": SCHEMA,
            "bench": self.bench,
            "model": self.model,
            **self.setting,
            "rows": [row.to_dict() for row in self.rows],
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def finder(rows: Sequence[Row]) -> Callable[[str, str], Row]:
    """A function (name of a variant, measure) -> row."""
    found = {(row.name, row.measure): row for row in rows}
    return lambda name, measure: found[name, measure]
