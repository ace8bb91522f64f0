"""Sweeps over values of a parameter: `make test` runs a few, `make test-all` every one."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """Parameters of a test or fixture: every value, marked slow unless it is one of the few.

    Args:
        values: of one parameter, or tuples of several.
        few: the values that prove the property in every run; each must be among ``values``.
    """
    values = list(values)
    unknown = [value for value in few if value not in values]
    if unknown:
        raise ValueError(f"{unknown} are not among {values}")
    return [_param(value, () if value in few else pytest.mark.slow) for value in values]


def _param(value: Any, marks) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=marks)
