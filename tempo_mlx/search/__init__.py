"""Monte Carlo tree search."""

from .environment import Batched
from .monte_carlo import SearchError, TreePolicy, TreeSearch
from .settings import SearchSettings
from .text import SearchResult, search, stream_search
from .tree import Tree

__all__ = [
    "Batched",
    "SearchError",
    "SearchResult",
    "SearchSettings",
    "Tree",
    "TreePolicy",
    "TreeSearch",
    "search",
    "stream_search",
]
