"""Old names of settings: still accepted, with a warning."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .errors import TempoError

C = TypeVar("C", bound=type)

#: Class -> its settings' old names -> new names.
_RENAMED: dict[type, dict[str, str]] = {}


class RenamedWarning(DeprecationWarning):
    """A setting was given by its old name."""


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a setting was renamed."""
    warnings.warn(f"{old} is now called {new}", RenamedWarning, stacklevel=stacklevel)


def renamed(owner: type) -> Mapping[str, str]:
    """Old names of a class's settings -> new names."""
    return _RENAMED.get(owner, {})


def new_names(given: Mapping[str, Any], owner: type, stacklevel: int = 4) -> dict[str, Any]:
    """Replace old names of a class's settings by new ones, with a warning for each.

    Raises:
        TempoError: if a setting is given by both names.
    """
    values = dict(given)
    for old, new in renamed(owner).items():
        if old in values:
            if new in values:
                raise TempoError(f"{old} is the old name of {new}; give only one")
            warn_renamed(old, new, stacklevel)
            values[new] = values.pop(old)
    return values


def first_names(values: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """Values by the original names of a class's settings."""
    old = {new: old for old, new in renamed(owner).items()}
    return {old.get(name, name): value for name, value in values.items()}


def renames(**names: str) -> Callable[[C], C]:
    """Let a class's fields also be given and read by their old names; ``old="new"``."""

    def decorate(owner: C) -> C:
        _RENAMED[owner] = names
        made = owner.__init__  # type: ignore[misc]

        @functools.wraps(made)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **new_names(kwargs, owner))

        def by_old_name(self: Any, name: str) -> Any:
            if name not in names:
                raise AttributeError(f"{owner.__name__!r} object has no attribute {name!r}")
            warn_renamed(name, names[name])
            return getattr(self, names[name])

        owner.__init__ = init  # type: ignore[misc]
        owner.__getattr__ = by_old_name  # type: ignore[attr-defined]
        return owner

    return decorate
