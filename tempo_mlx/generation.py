"""The loop: select, append, forward, combine.

Each step reads one distribution, keeps its tokens above the threshold as a parallel set, appends
them to the sequence at one position in one forward pass, and combines the rows of that pass into
the next distribution.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generation_stream, wired_limit

from .combining import combine
from .decoding import SequenceState
from .hindsight import Hindsight
from .lattice import Lattice, Slots, Step, Token
from .models import PositionedModel
from .result import GenerationResult
from .schedules import interpolate
from .selection import Candidates, gumbel_top_k, keep, most_probable
from .settings import Settings
from .tokens import Vocabulary, encode_prompt
from .verification import verify as verify_run

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]

#: Steps after which mlx's buffer cache is emptied, as mlx-lm does.
CLEAR_CACHE_EVERY = 256


@dataclass(frozen=True)
class StepResponse:
    """What :func:`stream_generate` yields after each step.

    Args:
        step: the step just made; its tokens are final except for ``pruned_at``.
        result: the run so far; complete with the last response.
        slots_held: slots in the cache.
        cache_bytes: bytes of its keys and values, room for slots to come included.
        finish_reason: None, or "stop" (end of text or a stop text), "length" (``max_tokens``) or
            "context" (the model's context is full).
    """

    step: Step
    result: GenerationResult
    slots_held: int
    cache_bytes: int
    finish_reason: str | None = None


def generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    verbose: bool = False,
    **kwargs: Any,
) -> GenerationResult:
    """Generate with parallel sets and return the whole result.

    Args:
        model: as :func:`tempo_mlx.load` or ``mlx_lm.load`` returns it.
        tokenizer: the model's tokenizer.
        prompt: text, token ids, or chat messages for the model's template.
        verbose: print the sets as they come.
        kwargs: arguments of :func:`stream_generate`, which are those of :class:`Settings`.

    Raises:
        ValueError: for an argument out of range or a prompt that is empty or too long.
        UnsupportedModelError: for a model that cannot hold parallel tokens exactly.
        NonFiniteLogitsError: if the model returns NaN.
    """
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        if verbose:
            print(render_plain(response.step), end="", flush=True)
    if verbose:
        print()
    return response.result


def render_plain(step: Step) -> str:
    """A step as text: the token, or `[ on/ under]` for a set of several."""
    texts = [token.text for token in step.tokens]
    return texts[0] if len(texts) == 1 else f"[{'/'.join(texts)}]" if texts else ""


def stream_generate(
    model: nn.Module | PositionedModel,
    tokenizer: Any,
    prompt: Prompt,
    *,
    verify: bool = False,
    model_name: str | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Generator[StepResponse, None, None]:
    """Generate with parallel sets, one response for each step.

    Args:
        model, tokenizer, prompt: as in :func:`generate`.
        verify: after the last step, replay the run in one uncached pass and put the largest
            difference into ``result.verification``. Keeps every step's logits in memory.
        model_name: what the result calls the model.
        prompt_progress_callback: called with (prompt tokens read, prompt tokens).
        settings: fields of :class:`Settings`.

    Yields:
        :class:`StepResponse`; the last one has a ``finish_reason``.

    Raises:
        As :func:`generate`.
    """
    chosen = Settings.of(settings).seeded()
    positioned = PositionedModel.of(model)
    if chosen.pruning is not None and chosen.pruning.needs_attention:
        positioned.require_capture()
    if chosen.weighting != "none":
        positioned.require_additive_masks()
    prompt_tokens = encode_prompt(tokenizer, prompt, positioned.context_length)
    result = GenerationResult(
        model=positioned,
        vocabulary=Vocabulary(tokenizer),
        model_name=model_name or positioned.name or str(getattr(tokenizer, "name_or_path", "")),
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(prompt_tokens),
        lattice=Lattice(prompt_tokens),
        settings=chosen,
    )
    yield from run(result, verify, prompt_progress_callback)


def run(
    result: GenerationResult,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[StepResponse, None, None]:
    """Extend the result's lattice step by step; see :func:`stream_generate`."""
    settings, lattice, model = result.settings, result.lattice, result.model
    vocabulary, stats = result.vocabulary, result.stats
    state = SequenceState(
        model, lattice, settings.visibility, settings.weighting != "none", keep_logits=verify
    )
    hindsight = Hindsight(lattice, settings, model.n_layers) if settings.looks_back else None
    length = len(lattice.prompt_tokens)
    key = mx.random.key(settings.seed or 0)
    k = settings.max_parallel
    if settings.greedy:
        k = 1
    elif not settings.samples:
        # End tokens are never kept, so room for them lets a set still fill up.
        k += len(vocabulary.end_tokens)
    limit = min(
        settings.max_tokens, (model.context_length or length + settings.max_tokens) - length
    )

    def candidates(logits: mx.array, weights: mx.array, *also: mx.array) -> Candidates:
        """Start computing what may come next, and whatever else the host will read with it."""
        nonlocal key
        p, rows = combine(settings.combine, logits, weights, settings.temp)
        if settings.samples:
            key, draw = mx.random.split(key)
            ids = gumbel_top_k(p, k, draw)
        else:
            ids = most_probable(p, k)
        found = Candidates.of(ids, p, rows)
        mx.async_eval(found.ids, found.probabilities, found.transitions, state.cache.state, *also)
        return found

    def append(ids: mx.array, probabilities: np.ndarray, queries: Slots) -> Candidates:
        """Append a set and start computing what may follow it."""
        with mx.stream(generation_stream):
            capture = hindsight.capture(probabilities) if hindsight else None
            logits, attention = state.append(ids, queries, capture)
            received = hindsight.attend(attention, state.held) if hindsight else []
            return candidates(logits, mx.array(probabilities), *received)

    def repaired(fallen: int) -> Candidates:
        """Run what saw the fallen tokens again; what may follow now."""
        # Siblings saw them too where they see each other.
        first = fallen if settings.visibility == "visible" else fallen + 1
        live = [token.probability for token in lattice.steps[-1].live]
        with mx.stream(generation_stream):
            return candidates(state.recompute(first), mx.array(live))

    with wired_limit(model.model, cast(Any, [generation_stream])):
        start = time.perf_counter()
        with mx.stream(generation_stream):
            found = candidates(state.prefill(settings.prefill_step_size, progress), mx.ones(1))
            mx.eval(found.ids)
        stats.prompt_seconds = time.perf_counter() - start
        start = time.perf_counter()

        for step in range(limit):
            more = step + 1 < limit
            threshold = interpolate(
                settings.threshold,
                settings.final_threshold or settings.threshold,
                settings.schedule,
                step,
                settings.max_tokens,
            )
            if settings.always_single:
                # The set is one token wide whatever its value: the next pass starts before
                # the host has seen it.
                queries = lattice.reserve(1, step)
                upcoming = append(found.ids[:1], np.ones(1), queries) if more else found
            kept = keep(found, threshold, settings.max_parallel, vocabulary.end_tokens)
            if hindsight and len(kept.ids):
                hindsight.select(kept.probabilities, kept.transitions)
                fallen = hindsight.prune()
                if fallen is not None and settings.repairs:
                    found = repaired(fallen)
                    kept = keep(found, threshold, settings.max_parallel, vocabulary.end_tokens)
                    kept = kept.with_rows([t.pruned_at is None for t in lattice.steps[-1].tokens])
                    if len(kept.ids):
                        hindsight.select(kept.probabilities, kept.transitions, again=True)
            if not settings.always_single:
                queries = lattice.reserve(len(kept.ids), step)
            tokens = [
                Token(int(id), vocabulary.text(int(id)), float(p), int(slot))
                for id, p, slot in zip(kept.ids, kept.probabilities, queries.index, strict=False)
            ]
            record = Step(step, length + step, threshold, tokens, kept.endings)
            lattice.steps.append(record)
            lattice.transitions.append(kept.transitions)
            if hindsight:
                hindsight.weigh()
            stats.generation_seconds = time.perf_counter() - start
            stats.peak_memory_gb = mx.get_peak_memory() / 1e9
            ended = not tokens or any(text in text_so_far(lattice) for text in settings.stop)
            if ended or not more:
                break
            if hindsight:
                state.compact(settings.compact_above, step)
            if not settings.always_single:
                upcoming = append(mx.array(kept.ids), kept.probabilities, queries)
            found = upcoming
            if step % CLEAR_CACHE_EVERY == CLEAR_CACHE_EVERY - 1:
                mx.clear_cache()
            yield StepResponse(record, result, state.cache.n_slots, state.cache.nbytes)
        if state.logits is not None:
            result.verification = verify_run(model, lattice, settings, state.logits)
    reason = "stop" if ended else "length" if limit == settings.max_tokens else "context"
    result.finish_reason = reason
    yield StepResponse(record, result, state.cache.n_slots, state.cache.nbytes, reason)


def text_so_far(lattice: Lattice) -> str:
    """Texts of the most probable token of each set."""
    return "".join(step.tokens[0].text for step in lattice.steps if step.tokens)
