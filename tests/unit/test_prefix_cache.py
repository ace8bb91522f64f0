"""Prompts that begin with what was read before: the same answers, fewer tokens read."""

from tempo_mlx import PositionedModel
from tempo_mlx.decode.prefix_cache import LEAST, PrefixCache
from tempo_mlx.decode.request import Request
from tempo_mlx.decode.scheduler import Scheduler
from tempo_mlx.generation import begin
from tempo_mlx.settings import Settings

import numpy as np
import pytest

from ..comparison import assert_close
from ..tiny_models import tiny_model, window_fields
from ..tiny_tokenizer import TinyTokenizer

pytestmark = pytest.mark.usefixtures("uncompiled")

SYSTEM = [int(i) for i in np.random.default_rng(0).integers(3, 60, 20)]

#: one key for all, sliding windows that the texts cross, compressed keys, recurrent layers
NAMES = (
    "gemma3_text",
    "qwen3_next",
    pytest.param("deepseek_v2", marks=pytest.mark.slow),
    pytest.param("llama", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return PositionedModel(tiny_model(request.param, **window_fields(request.param)))


def run(scheduler, model, prompts, **settings):
    """The results of prompts that are submitted together."""
    tokenizer = TinyTokenizer(60, ())
    for i, prompt in enumerate(prompts):
        made = Settings(max_tokens=6, **settings)
        scheduler.submit(i, lambda p=prompt, s=made: Request(begin(model, tokenizer, p, s)))
    results = {}
    while scheduler.left:
        results |= dict(scheduler.tick())
    return [results[i] for i in range(len(prompts))]


def assert_same(model, results):
    for result in results:
        fresh = Scheduler(model, 4, 10**9)
        settings = {
            "threshold": result.settings.threshold,
            "visibility": result.settings.visibility,
        }
        expected = run(fresh, model, [result.lattice.prompt_tokens], **settings)[0]
        assert_close(result.lattice.steps_to_dict(), expected.lattice.steps_to_dict())


@pytest.mark.parametrize(
    "how",
    [
        {"threshold": 1.0},
        pytest.param({"threshold": 0.02, "visibility": "tree"}, marks=pytest.mark.slow),
    ],
)
def test_a_next_turn_reads_its_new_tokens_only(model, how):
    scheduler = Scheduler(model, 4, 10**9, keeps_prefixes=True)
    text, results = list(SYSTEM), []
    for turn in range(3):
        [result] = run(scheduler, model, [[*text, 5, 6 + turn]], **how)
        read = len(result.lattice.prompt_tokens) - result.stats.cached_tokens
        # The last token of an answer is not read, nor is it where layers have states.
        assert read <= (3 if turn else 22) + (6 if turn and "visibility" in how else 0)
        text = [*result.lattice.prompt_tokens, *result.known_best()]
        results.append(result)
    assert_same(model, results)


def test_prompts_share_what_they_have_in_common(model):
    scheduler = Scheduler(model, 4, 10**9, keeps_prefixes=True)
    first = run(scheduler, model, [[*SYSTEM, 7]], threshold=1.0)
    later = run(
        scheduler, model, [[*SYSTEM, 8, 9], [*SYSTEM, 11], [*SYSTEM[:12], 4]], threshold=1.0
    )
    cached = [result.stats.cached_tokens for result in later]
    # States are kept at the ends of what was read.
    assert cached == ([20, 20, 0] if model.is_recurrent else [20, 20, 12])
    assert_same(model, [*first, *later])


def test_what_was_not_needed_for_longest_is_dropped_first():
    model = PositionedModel(tiny_model("llama"))
    scheduler = Scheduler(model, 4, 10**9, keeps_prefixes=True)
    texts = [[a, *SYSTEM] for a in (3, 4, 5)]
    run(scheduler, model, texts, threshold=1.0)
    held = scheduler.prefixes
    run(scheduler, model, texts[:1], threshold=1.0)
    whole = held.nbytes
    held.shrink(whole * 2 // 3)
    assert [held.covers(text) > 0 for text in texts] == [True, False, True]
    held.shrink(0)
    assert held.nbytes == len(held) == 0


def test_bytes_are_those_of_the_edges_and_texts_in_common_are_held_once():
    model = PositionedModel(tiny_model("llama"))
    scheduler = Scheduler(model, 4, 10**9, keeps_prefixes=True)
    for last in ([7, 8], [7, 9], [], [7, 8, 2]):
        run(scheduler, model, [[*SYSTEM, *last, 1]], threshold=1.0)
    held = scheduler.prefixes
    assert held.nbytes == len(held) * model.slot_bytes
    edges = {tuple(edge.tokens): edge.slots.n_slots for edge, _ in held._edges(held._first)}
    assert all(len(tokens) == n for tokens, n in edges.items())


def test_memory_belongs_to_those_that_run():
    model = PositionedModel(tiny_model("llama"))
    budget = 40 * model.slot_bytes
    scheduler = Scheduler(model, 4, budget, keeps_prefixes=True)
    results = [run(scheduler, model, [[a, *SYSTEM]], threshold=1.0)[0] for a in (3, 4, 3, 5, 3)]
    assert scheduler.prefixes.nbytes <= budget
    assert_same(model, results)


def test_little_is_not_worth_it():
    assert PrefixCache().covers(SYSTEM) == 0
    model = PositionedModel(tiny_model("llama"))
    scheduler = Scheduler(model, 4, 10**9, keeps_prefixes=True)
    run(scheduler, model, [SYSTEM], threshold=1.0)
    assert scheduler.prefixes.covers([*SYSTEM[: LEAST - 1], 59, 58]) == 0
    assert scheduler.prefixes.covers([*SYSTEM[:LEAST], 59, 58]) == LEAST
