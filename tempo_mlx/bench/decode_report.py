"""What the bench of decoding found, beside its targets."""

from dataclasses import asdict, dataclass
from typing import Any

from .target import Target
from .timing import Spread

#: Version of the dictionary that :meth:`Report.to_dict` returns.
SCHEMA = 1

STOCK, SINGLE = "mlx-lm", "threshold 1"

#: What the targets ask for.
MIN_SPEED_RATIO = 0.97
MAX_MEMORY_RATIO = 1.05
MAX_STEP_RATIO = 1.45
TARGET_SIBLINGS = 8
#: Our rise in time per step over a long run may exceed mlx-lm's by this factor, which is noise.
MAX_RISE_RATIO = 1.05


@dataclass(frozen=True)
class Measured:
    """What all runs of one variant say.

    Args:
        name: of the variant.
        siblings: tokens of each step.
        step_seconds: time of a step; the median of a run's steps, spread over the rounds.
        weight_bandwidth: bytes of weights read in a second.
        peak_bytes: the most memory that mlx held in a run, weights included.
        slots: entries of the cache after the last step.
        time_to_stock: time of a step over that of mlx-lm, spread over the rounds.
        time_to_one: time of a step over that of one sibling; of threshold 1 if that was not run.
    """

    name: str
    siblings: int
    step_seconds: Spread
    weight_bandwidth: float
    peak_bytes: int
    slots: int
    time_to_stock: Spread
    time_to_one: Spread

    @property
    def steps_per_second(self) -> Spread:
        return self.step_seconds.inverse()

    @property
    def tokens_per_second(self) -> Spread:
        return self.steps_per_second.scaled(self.siblings)


@dataclass(frozen=True)
class LongRun:
    """Time per step as the cache grows.

    Args:
        block: steps behind each entry.
        stock, ours: median seconds per step at threshold 1, block after block.
    """

    block: int
    stock: list[float]
    ours: list[float]

    @property
    def target(self) -> Target:
        """How much more our step slows from the first to the last block than mlx-lm's."""
        rise = (self.ours[-1] / self.ours[0]) / (self.stock[-1] / self.stock[0])
        return Target("rise of ms/step over a long run / mlx-lm's", "<=", MAX_RISE_RATIO, rise)


@dataclass(frozen=True)
class Report:
    """Everything that :func:`.decode.bench_decode` found, with where it was found."""

    model: str
    setting: dict[str, Any]
    weight_bytes: int
    copy_bandwidth: float
    measured: list[Measured]
    long: LongRun | None = None

    @property
    def targets(self) -> list[Target]:
        """What the measurements should be; those that were not taken are missing."""
        found = {m.name: m for m in self.measured}
        stock, single = found[STOCK], found[SINGLE]
        targets = [
            Target(
                "tokens/s at threshold 1 / mlx-lm's",
                ">=",
                MIN_SPEED_RATIO,
                1 / single.time_to_stock.median,
            ),
            Target(
                "peak memory at threshold 1 / mlx-lm's",
                "<=",
                MAX_MEMORY_RATIO,
                single.peak_bytes / stock.peak_bytes,
            ),
        ]
        wide = found.get(sibling_name(TARGET_SIBLINGS))
        if wide is not None:
            targets.append(
                Target(
                    f"ms/step of {TARGET_SIBLINGS} siblings / of one",
                    "<=",
                    MAX_STEP_RATIO,
                    wide.time_to_one.median,
                )
            )
        if self.long is not None:
            targets.append(self.long.target)
        return targets

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, schema version 1; times in seconds, bandwidths in bytes/s."""
        return {
            "schema": SCHEMA,
            "bench": "decode",
            "model": self.model,
            **self.setting,
            "weight_bytes": self.weight_bytes,
            "copy_bandwidth": self.copy_bandwidth,
            "runs": [
                {
                    **asdict(m),
                    "steps_per_second": asdict(m.steps_per_second),
                    "tokens_per_second": asdict(m.tokens_per_second),
                }
                for m in self.measured
            ],
            "long": asdict(self.long) if self.long is not None else None,
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def sibling_name(n: int) -> str:
    return f"{n} sibling{'s' if n > 1 else ''}"
