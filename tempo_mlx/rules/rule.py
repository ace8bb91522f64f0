"""What a rule is: a name and what it does, in a dictionary or of the user's own."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, TypeVar

from ..arguments import shown
from ..errors import TempoError


class Named:
    """What all rules have: a name, and what it does.

    Rules are frozen: two that are equal do the same.
    """

    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """What results and messages call the rule."""

    def __str__(self) -> str:
        return self.name

    def from_place(self, place: str, setting: str, kind: "type[Named]") -> Self:
        """The rule, which knows that it was loaded from FILE.py:NAME.

        Another process loads it again, as its module has no name that could be imported there.
        """
        found = copy.copy(self)
        object.__setattr__(found, "_loaded", (place, setting, kind))
        return found

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        loaded = self.__dict__.get("_loaded")
        return (_load_again, loaded) if loaded else super().__reduce_ex__(protocol)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Self:
        """The rule that a function is."""
        raise NotImplementedError


def name_of(function: Any) -> str:
    """What results call a function of the user's own, or an object that is called or wraps one."""
    inner = getattr(function, "function", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


@dataclass(frozen=True)
class Rule(Named):
    """A rule that is one function.

    Args:
        name: what results and messages call it.
        function: what it does; calling the rule calls it.
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

#: What the names of our own modules begin with.
PACKAGE = __name__.partition(".")[0] + "."

#: Attribute of a module that was loaded from a file: the SHA-256 of what was loaded.
SOURCE = "__tempo_source__"


def find(setting: str, given: Any, known: Mapping[str, R], kind: type[R]) -> R:
    """The rule that a setting asks for.

    Args:
        setting: its name, for messages.
        given: a name, a rule, a rule's class that needs no arguments, or a function.
        known: rules by name.
        kind: their class.

    Raises:
        TempoError: for anything else.
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
                f"{setting} {given.__name__} needs arguments, so give an object of it: {error}"
            ) from error
    if callable(given) and not isinstance(given, Named):
        return kind.of(given)
    raise wrong()


def stored(rule: R, known: Mapping[str, R]) -> str | R:
    """The name of a rule that is known by it, else the rule."""
    return rule.name if known.get(rule.name) is rule else rule


def called(rule: Named, function: Callable[..., Any], *given: Any) -> Any:
    """What a rule's function returns.

    Raises:
        TempoError: naming the rule, for whatever a function of the user's own raises. An error in
            one of ours keeps its type and traceback.
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
    """64 hexadecimal digits that change with what a rule does: with its module's source.

    Without a source, as in an interactive session, with its function's code.
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
