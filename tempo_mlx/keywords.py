"""Keyword arguments that an editor shows: the settings and what the functions take beside them.

Types only, without a run's values: tests hold them to the fields of the settings classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from .decode.observation import Observer
from .decode.prompt_cache import PromptCache
from .decode.scheduler import BatchStatus
from .rules.combining import CombiningRule
from .rules.processors import LogitsProcessor, Sampler
from .rules.pruning import Pruning
from .rules.schedules import Schedule
from .rules.selection import SamplingRule
from .rules.visibility import Visibility
from .settings import Settings


class SettingsKeywords(TypedDict, total=False):
    """Fields of :class:`tempo_mlx.Settings`."""

    max_tokens: int
    threshold: float
    final_threshold: float | None
    schedule: Schedule
    max_parallel: int
    temp: float
    sampling: str | SamplingRule
    seed: int | None
    visibility: str | Visibility | None
    combine: str | CombiningRule
    pruning: Pruning | None
    beam_width: int
    beam_margin: float | None
    branching: str
    weighting: str
    stop: tuple[str, ...]
    top_p: float
    top_k: int
    min_p: float
    min_tokens_to_keep: int
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float | None
    repetition_context_size: int
    presence_penalty: float | None
    presence_context_size: int
    frequency_penalty: float | None
    frequency_context_size: int
    logit_bias: Mapping[int, float] | None
    logits_processors: tuple[LogitsProcessor, ...]
    sampler: Sampler | None
    json_schema: Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    draft: str
    num_draft_tokens: int
    prefill_step_size: int


class GenerateKeywords(SettingsKeywords, total=False):
    """Arguments of :func:`tempo_mlx.stream_generate`."""

    verify: bool
    model_name: str | None
    prompt_cache: PromptCache | None
    paths: int
    prompt_progress_callback: Callable[[int, int], None] | None
    settings: Settings | None


class BatchKeywords(SettingsKeywords, total=False):
    """Arguments of :func:`tempo_mlx.stream_batch_generate`."""

    batch_size: int
    max_kv_bytes: int | None
    prompt_cache: PromptCache | None
    paths: int
    verify: bool
    model_name: str | None
    observe: Callable[[int], Observer | None] | None
    progress: Callable[[BatchStatus], None] | None
