"""Keyword arguments of a search, for editors and type checkers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from .monte_carlo import BackupRule, ChildRule
from .settings import EvaluationRule, SearchSettings

if TYPE_CHECKING:
    from .text import SearchResult


class SettingsKeywords(TypedDict, total=False):
    """Fields of :class:`SearchSettings`."""

    max_tokens: int
    simulations: int
    threshold: float
    max_parallel: int
    selection: str | ChildRule
    exploration: float
    backup: str | BackupRule
    leaves_per_batch: int
    evaluation: str | EvaluationRule
    depth: int
    rollout_temp: float
    seed: int
    max_forward_tokens: int | None
    max_seconds: float | None
    max_kv_bytes: int | None
    json_schema: Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    stop: tuple[str, ...]
    kv_bits: int | None
    kv_group_size: int
    prefill_step_size: int


class SearchKeywords(SettingsKeywords, total=False):
    """Arguments of :func:`tempo_mlx.stream_search` other than ``value``."""

    model_name: str | None
    progress: "Callable[[int, SearchResult], None] | None"
    prompt_progress_callback: Callable[[int, int], None] | None
    settings: SearchSettings | None
