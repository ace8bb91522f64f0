"""Text generation with parallel token sets on MLX."""

import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# This comes first, because it has no effect once mlx.core is imported.
from . import blas

blas.preload()

__version__: str

if TYPE_CHECKING:
    from .conversation import Conversation as Conversation
    from .decode.prompt_cache import PromptCache as PromptCache
    from .decode.result import GenerationResult as GenerationResult
    from .decode.result import Path as Path
    from .generation import batch_generate as batch_generate
    from .generation import generate as generate
    from .generation import stream_batch_generate as stream_batch_generate
    from .generation import stream_generate as stream_generate
    from .lattice.lattice import Lattice as Lattice
    from .models import PositionedModel as PositionedModel
    from .models import UnsupportedModelError as UnsupportedModelError
    from .rules.combining import CombiningRule as CombiningRule
    from .rules.pruning import Pruning as Pruning
    from .rules.pruning import PruningRule as PruningRule
    from .rules.visibility import Visibility as Visibility
    from .scoring import ContinuationScorer as ContinuationScorer
    from .search import search as search
    from .search import stream_search as stream_search
    from .settings import Settings as Settings
    from .weights import load as load

#: Public name -> the module that has it.
_HOMES = {
    "CombiningRule": "rules.combining",
    "ContinuationScorer": "scoring",
    "Conversation": "conversation",
    "GenerationResult": "decode.result",
    "Lattice": "lattice.lattice",
    "Path": "decode.result",
    "PositionedModel": "models",
    "PromptCache": "decode.prompt_cache",
    "Pruning": "rules.pruning",
    "PruningRule": "rules.pruning",
    "Settings": "settings",
    "UnsupportedModelError": "models",
    "Visibility": "rules.visibility",
    "batch_generate": "generation",
    "generate": "generation",
    "load": "weights",
    "search": "search",
    "stream_batch_generate": "generation",
    "stream_generate": "generation",
    "stream_search": "search",
}

__all__ = list(_HOMES)


class _Package(ModuleType):
    """Imports the module of a public name when the name is first used.

    Importing all modules takes seconds, during which the command line could not handle Ctrl-C.
    """

    def __getattr__(self, name: str) -> Any:
        value: Any
        if name == "__version__":
            value = version("tempo-mlx")
        elif name in _HOMES:
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            value = import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # `search` is a function and a package; importing the package must not hide the function.
        if name != "search" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__, "__version__"})


sys.modules[__name__].__class__ = _Package
