"""Users' rules, loaded from Python files: FILE.py:NAME.

The command line, suites and Python code can load rules. Prompt files cannot, because they are data
and may come from someone else.
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
    """Whether a value is FILE.py:NAME and not the name of a rule."""
    return isinstance(text, str) and PLACE.match(text) is not None


def load_object(place: str, setting: str, folder: Path | None = None) -> Any:
    """Run a file and return the object that FILE.py:NAME refers to.

    Args:
        place: FILE.py:NAME.
        setting: that it was given for, for messages.
        folder: base of a relative path; None is the current one.

    Raises:
        TempoError: if the file or the name does not exist, or the file raises.
    """
    given, _, name = place.rpartition(":")
    file = (folder or Path()) / given
    if not given or not file.is_file():
        raise TempoError(
            f"{setting} must be FILE.py:NAME with an existing file, got {shown(place)}"
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
        # Classes and pickles look up their module by name.
        sys.modules[module_name] = module
        # Stored now, because the file may change later.
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
    """Load a rule from FILE.py:NAME: a function, or an instance or subclass of ``kind``.

    Raises:
        TempoError: as :func:`load_object`, or if the name refers to anything else.
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
    """Replace every FILE.py:NAME among the values of settings by the loaded rule.

    Args:
        values: by name; nested settings as dictionaries.
        owner: the settings class.
        folder: base of relative paths; None is the current one.
        prefix: of names in messages.
    """
    found = dict(values)
    for name, entry in table(owner).items():
        value = found.get(name)
        if isinstance(entry.kind, RuleChoice) and isinstance(value, str) and is_place(value):
            found[name] = load_rule(value, prefix + name, entry.kind.rule, folder)
        elif isinstance(entry.kind, Inner) and isinstance(value, Mapping):
            found[name] = load_rules(value, entry.kind.owner, folder, "prune ")
    return found
