"""A user's own rules, loaded from Python files: FILE.py:NAME.

The command line, suites and Python load them. Files of prompts do not: they are data, which may
come from others.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import TempoError
from .rule import SOURCE, Named, find
from .table import Inner, RuleChoice, table

#: FILE.py:NAME.
PLACE = re.compile(r"^.+\.py:[^:]*$")


def is_place(text: Any) -> bool:
    """Whether a text is FILE.py:NAME, and not the name of a rule."""
    return isinstance(text, str) and PLACE.match(text) is not None


def load_object(place: str, setting: str, folder: Path | None = None) -> Any:
    """What FILE.py:NAME names; the file is run.

    Args:
        place: the text.
        setting: what it was given for, for messages.
        folder: that the file's path is relative to; None is the current one.

    Raises:
        TempoError: if there is none, or the file raises.
    """
    given, _, name = place.rpartition(":")
    file = (folder or Path()) / given
    if not given or not file.is_file():
        raise TempoError(
            f"{setting} must be FILE.py:NAME of a file that exists, got {shown(place)}"
        )
    if file.suffix != ".py":
        raise TempoError(f"{setting} {place}: {file} is not a Python file")
    content = file.read_bytes()
    digest = hashlib.sha256(bytes(file.resolve()) + content).hexdigest()
    module_name = f"tempo_mlx_own_{digest[:32]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Classes and pickles look their module up by its name.
        sys.modules[module_name] = module
        # The file may have changed when somebody asks.
        setattr(module, SOURCE, hashlib.sha256(content).hexdigest())
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            what = type(error).__name__
            raise TempoError(f"{setting} {file} raised {what}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        raise TempoError(f"{setting} {place}: {file} has no {name or 'name'}")
    return found


def load_rule(place: str, setting: str, kind: type[Named], folder: Path | None = None) -> Named:
    """The rule that FILE.py:NAME names: a function, an object or a class of the kind.

    Raises:
        TempoError: as :func:`load_object`; or for something else of that name.
    """
    found = load_object(place, setting, folder)
    if isinstance(found, str):
        raise TempoError(f"{setting} {place} must be a {kind.__name__} or a function, not a text")
    rule = find(setting, found, {}, kind)
    file = Path(place.rpartition(":")[0])
    where = (folder or Path()).resolve() / file
    return rule.from_place(f"{where}:{place.rpartition(':')[2]}", setting, kind)


def load_rules(
    values: Mapping[str, Any], owner: type, folder: Path | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Settings in which rules that stand as FILE.py:NAME are loaded.

    Args:
        values: by name; inner settings as dictionaries.
        owner: the settings' class.
        folder: that paths are relative to; None is the current one.
        prefix: what messages say before a name.
    """
    found = dict(values)
    for name, entry in table(owner).items():
        value = found.get(name)
        if isinstance(entry.kind, RuleChoice) and isinstance(value, str) and is_place(value):
            found[name] = load_rule(value, prefix + name, entry.kind.rule, folder)
        elif isinstance(entry.kind, Inner) and isinstance(value, Mapping):
            found[name] = load_rules(value, entry.kind.owner, folder, "prune ")
    return found
