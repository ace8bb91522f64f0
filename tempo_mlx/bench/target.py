"""What a measurement should be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A measurement beside what it should be.

    Args:
        name: what is measured.
        relation: ">=" or "<=".
        wanted, value: the bound, and what was found.
    """

    name: str
    relation: str
    wanted: float
    value: float

    @property
    def met(self) -> bool:
        return self.value >= self.wanted if self.relation == ">=" else self.value <= self.wanted
