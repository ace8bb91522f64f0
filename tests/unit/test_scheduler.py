"""Requests that join and leave a running batch give what each gives alone."""

from tempo_mlx import PositionedModel, batch_generate
from tempo_mlx.decode.request import Request
from tempo_mlx.decode.result import GenerationResult
from tempo_mlx.decode.scheduler import Scheduler
from tempo_mlx.errors import TempoError
from tempo_mlx.generation import begin
from tempo_mlx.settings import Settings

import pytest

from ..tiny_models import tiny_model
from ..tiny_tokenizer import TinyTokenizer

pytestmark = pytest.mark.usefixtures("uncompiled")

PROMPTS = [[3, 9, 4], [5], list(range(20)), [9, 2, 40, 8], [3, 9, 4], [11, 12]]


@pytest.fixture(scope="module")
def model():
    return PositionedModel(tiny_model("llama", seed=1))


@pytest.fixture(scope="module")
def tokenizer():
    return TinyTokenizer(60, ())


def settings(i):
    return Settings(max_tokens=4 + i, threshold=(1.0, 0.05, 0.1)[i % 3])


def alone(model, tokenizer, prompt, settings):
    return batch_generate(model, tokenizer, [prompt], settings).results[0]


def sets(result):
    return [[token.id for token in step.tokens] for step in result.lattice.steps]


def test_requests_join_and_leave_while_others_generate(model, tokenizer):
    scheduler = Scheduler(model, 3, 10**9)

    def make(i):
        return lambda: Request(begin(model, tokenizer, PROMPTS[i], settings(i)))

    outcomes, ticks = {}, 0
    for i in (0, 1):
        scheduler.submit(i, make(i))
    streamed = dict.fromkeys(range(len(PROMPTS)), 0)
    while scheduler.left:
        if ticks < 4:
            scheduler.submit(2 + ticks, make(2 + ticks))
        if ticks == 2:
            scheduler.cancel(1)  # generates
        if ticks == 4:
            scheduler.cancel(5)  # waits
            scheduler.cancel("nobody")
        outcomes |= dict(scheduler.tick())
        for key, request in scheduler.stepped:
            streamed[key] += 1
            assert request.step == streamed[key]
        ticks += 1
    assert outcomes.keys() == {0, 2, 3, 4}
    assert streamed[1] and not streamed[5]
    for i, result in outcomes.items():
        assert sets(result) == sets(alone(model, tokenizer, PROMPTS[i], settings(i)))
    assert (scheduler.tick(), scheduler.left) == ([], 0)


def test_a_request_is_cancelled_while_its_prompt_is_read(model, tokenizer):
    scheduler = Scheduler(model, 3, 10**9)
    short = Settings(max_tokens=3, prefill_step_size=4)
    scheduler.submit("long", lambda: Request(begin(model, tokenizer, PROMPTS[2], short)))
    scheduler.tick()
    assert scheduler.status.reading == 1
    scheduler.cancel("long")
    scheduler.submit("next", lambda: Request(begin(model, tokenizer, PROMPTS[0], short)))
    outcomes = dict(scheduler.outcomes(lambda status: None))
    assert list(outcomes) == ["next"]
    assert sets(outcomes["next"]) == sets(alone(model, tokenizer, PROMPTS[0], short))


def test_what_cannot_start_fails_alone(model, tokenizer):
    scheduler = Scheduler(model, 3, 10**9)
    scheduler.submit("empty", lambda: Request(begin(model, tokenizer, [], Settings())))
    scheduler.submit("fine", lambda: Request(begin(model, tokenizer, [5], Settings(max_tokens=2))))
    outcomes = dict(scheduler.outcomes(lambda status: None))
    assert isinstance(outcomes["empty"], TempoError)
    assert isinstance(outcomes["fine"], GenerationResult)
