"""Rules: a name and a function, built in or written by the user."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar

from ..arguments import shown
from ..errors import TempoError


class Named:
    """Base of all rules. Rules are frozen, and equal rules do the same."""

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """The rule's name in results and messages."""

    def __str__(self) -> str:
        return self.name

    def from_place(self, place: str, setting: str, kind: "type[Named]") -> Self:
        """A copy of the rule that remembers the FILE.py:NAME that it was loaded from.

        Pickling stores that place, because other processes cannot import the module by name.
        """
        found = copy.copy(self)
        object.__setattr__(found, "_loaded", (place, setting, kind))
        return found

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        loaded = self.__dict__.get("_loaded")
        return (_load_again, loaded) if loaded else super().__reduce_ex__(protocol)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Self:
        """A rule made from a function."""
        raise NotImplementedError


def name_of(function: Any) -> str:
    """Name of a user's function, callable object or wrapped function in results."""
    inner = getattr(function, "function", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


@dataclass(frozen=True)
class Rule(Named):
    """A rule that consists of one function.

    Args:
        name: used in results and messages.
        function: called when the rule is called.
    """

    name: str
    function: Callable[..., Any]

    __str__ = Named.__str__

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Self:
        return cls(name_of(function), function)

    def __call__(self, *given: Any) -> Any:
        return called(self, self.function, *given)


def _load_again(place: str, setting: str, kind: type[Named]) -> Named:
    from .own import load_rule

    return load_rule(place, setting, kind)


R = TypeVar("R", bound=Named)

#: Prefix of this package's module names.
PACKAGE = __name__.partition(".")[0] + "."

#: Attribute of modules loaded from a file: the SHA-256 of the file's content.
SOURCE = "__tempo_source__"


def find(setting: str, given: Any, known: Mapping[str, R], kind: type[R]) -> R:
    """Look up or make the rule for a setting.

    Args:
        setting: its name, for messages.
        given: a name, a rule, a rule class without required arguments, or a function.
        known: rules by name.
        kind: their class.

    Raises:
        TempoError: if ``given`` is anything else.
    """

    def wrong() -> TempoError:
        names = f"one of {', '.join(known)}, " if known else ""
        return TempoError(
            f"{setting} must be {names}a function or a {kind.__name__}, got {shown(given)}"
        )

    if isinstance(given, str):
        if given not in known:
            raise wrong()
        given = known[given]
    if isinstance(given, kind):
        return given
    if isinstance(given, type):
        if not issubclass(given, kind):
            raise TempoError(f"{setting} {given.__name__} must be a subclass of {kind.__name__}")
        try:
            return given()
        except TypeError as error:
            raise TempoError(
                f"{setting} {given.__name__} needs arguments; pass an instance of it: {error}"
            ) from error
    if callable(given) and not isinstance(given, Named):
        return kind.of(given)
    raise wrong()


def stored(rule: R, known: Mapping[str, R]) -> str | R:
    """The name of a built-in rule; a user's rule itself."""
    return rule.name if known.get(rule.name) is rule else rule


def called(rule: Named, function: Callable[..., Any], *given: Any) -> Any:
    """Call a rule's function.

    Raises:
        TempoError: naming the rule, if a user's function raises anything. Errors in built-in
            rules keep their type and traceback.
    """
    if str(getattr(rule, "function", type(rule)).__module__).startswith(PACKAGE):
        return function(*given)
    try:
        return function(*given)
    except TempoError:
        raise
    except Exception as error:
        what = type(error).__name__
        raise TempoError(f"the rule {rule.name} raised {what}: {error}") from error


def source_of(rule: Named) -> str:
    """64 hexadecimal digits that change whenever the source of a rule's module changes.

    Without source, as in an interactive session, they change with the function's bytecode.
    """
    code = rule.function if isinstance(rule, Rule) else type(rule)
    module = inspect.getmodule(code)
    text = getattr(module, SOURCE, None)
    if text is None:
        try:
            text = inspect.getsource(module or code)
        except (OSError, TypeError):
            compiled = getattr(code, "__code__", None)
            text = f"{compiled.co_code!r} {compiled.co_consts!r}" if compiled else repr(code)
    return hashlib.sha256(f"{rule.name} {text}".encode()).hexdigest()
