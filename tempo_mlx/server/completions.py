"""Completions and chat completions: what is generated for a request, and how it is told."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..decode.result import GenerationResult
from ..errors import TempoError
from ..settings import Settings
from ..text.vocabulary import Prompt, encode_prompt
from .answers import chat_logprobs, completion_logprobs, envelope, finish_reason, usage
from .engine import Engine
from .generation import StepEvent, TextStream, TokenScore, running
from .protocol import ChatRequest, CompletionRequest, Sampling
from .scoring import text_scores


@dataclass
class Choice:
    """One text that a request gets.

    Args:
        index: in the answer.
        text: without what stood before it.
        ids: of its tokens.
        scores: of its tokens, if they were wanted.
        reason: why it ended.
        lattice: the whole result, if it was wanted.
        logprob: of the tokens, nats; by which best_of ranks.
        cached: tokens of the prompt that were not read again.
    """

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[TokenScore] | None = None
    reason: str = "stop"
    lattice: dict[str, Any] | None = None
    logprob: float = 0.0
    cached: int = 0


@dataclass(frozen=True)
class Job:
    """What is generated for one prompt of a request.

    Args:
        prompt: text, ids or messages.
        ids: of the prompt.
        wants: number of texts.
        candidates: texts that are generated, of which the ``wants`` best are told.
        max_tokens: of each text; 0 generates nothing.
        top: alternatives of each token that are told; None tells no log-probabilities.
        request: temperature, filters, stops.
    """

    prompt: Prompt
    ids: list[int]
    wants: int
    candidates: int
    max_tokens: int
    top: int | None
    request: Sampling

    @property
    def wants_lattice(self) -> bool:
        tempo = self.request.tempo
        return tempo is not None and tempo.return_ == "lattice"

    def settings(self) -> list[Settings]:
        """Of each generation: one for all texts of a tree, one for each text that is sampled."""
        if self.max_tokens == 0:
            return []
        base = self.request.settings(self.max_tokens, self.candidates)
        if not self.request.samples or self.candidates == 1:
            return [base]
        seed = secrets.randbelow(2**32) if base.seed is None else base.seed
        return [replace(base, seed=(seed + i) % 2**63) for i in range(self.candidates)]


def completion_jobs(engine: Engine, request: CompletionRequest) -> list[Job]:
    """The jobs of a completion, one for each prompt.

    Raises:
        TempoError: naming the field that cannot be honoured.
    """
    n, best_of = request.n, request.best_of or request.n
    if best_of < n:
        raise TempoError(f"best_of must be at least n, {n}, got {best_of}")
    if request.tempo is not None and best_of > 1:
        raise TempoError("n and best_of must be 1 with tempo: its lattice has the alternatives")
    if best_of > n and request.stream:
        raise TempoError("best_of must be n with stream: the best ones are known at the end")
    if request.max_tokens == 0 and not request.echo:
        raise TempoError("max_tokens must be at least 1 without echo")
    if not (request.samples or request.is_tree or request.tempo) and best_of > 1:
        raise TempoError("best_of needs a temperature above 0, or n above 1")
    jobs = []
    for prompt in request.prompts():
        ids = encode_prompt(engine.tokenizer, prompt, engine.model)
        jobs.append(Job(prompt, ids, n, best_of, request.max_tokens, request.logprobs, request))
        jobs[-1].settings()
    return jobs


def chat_job(engine: Engine, request: ChatRequest) -> Job:
    """The job of a chat completion.

    Raises:
        TempoError: naming the field that cannot be honoured.
    """
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise TempoError("give one of max_tokens and max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise TempoError("top_logprobs needs logprobs true")
    if request.tempo is not None and request.n > 1:
        raise TempoError("n must be 1 with tempo: its lattice has the alternatives")
    messages = [message.plain() for message in request.messages]
    ids = encode_prompt(engine.tokenizer, messages, engine.model)
    room = (engine.model.context_length or 2**20) - len(ids)
    wanted = request.max_completion_tokens or request.max_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    job = Job(messages, ids, request.n, request.n, wanted or max(1, room), top, request)
    job.settings()
    return job


async def choices_of(engine: Engine, job: Job, first: int = 0) -> list[Choice]:
    """The texts of a job, best first where they are ranked.

    Args:
        first: index of the first one.
    """
    found = [
        choice
        for choices in await asyncio.gather(
            *(_generated(engine, job, settings) for settings in job.settings())
        )
        for choice in choices
    ]
    if job.candidates > job.wants and job.request.samples:
        found.sort(key=lambda choice: -choice.logprob / max(1, len(choice.ids)))
    found = found[: job.wants]
    for i, choice in enumerate(found):
        choice.index = first + i
    return found


async def _generated(engine: Engine, job: Job, settings: Settings) -> list[Choice]:
    """The texts of one generation."""
    ranks = job.candidates > job.wants and job.request.samples
    top = (job.top or 0) if ranks or job.top is not None else None
    tree = settings.branches
    alone = tree or job.request.tempo is not None
    scores: list[TokenScore] = []
    async with running(
        engine, job.prompt, settings, None if alone else top, paths=job.wants if tree else 0
    ) as generation:
        async for event in generation.events():
            if isinstance(event, StepEvent):
                if event.score is not None:
                    scores.append(event.score)
            else:
                result = event
    if not alone:
        ids = [step.tokens[0].id for step in result.lattice.steps if step.tokens]
        choice = Choice(0, result.text, ids, reason=finish_reason(result), cached=_cached(result))
        choice.scores = None if top is None else scores
        choice.logprob = sum(score.logprob or 0.0 for score in scores)
        return [choice]
    return await _of_lattice(engine, job, result, top)


def _cached(result: GenerationResult) -> int:
    return result.stats.cached_tokens


async def _text(engine: Engine, result: GenerationResult) -> str:
    """The result's text; the model is asked for it where sets were merged."""
    if result.known_best() is None:
        await asyncio.wrap_future(engine.call(result.find_paths))
    return result.text


async def _of_lattice(
    engine: Engine, job: Job, result: GenerationResult, top: int | None
) -> list[Choice]:
    paths = await asyncio.wrap_future(engine.call(lambda: result.find_paths(job.wants)))
    found = []
    for path in paths:
        cut = path.text != engine.vocabulary.decode(path.tokens)
        reason = "stop" if path.ended or cut else finish_reason(result)
        choice = Choice(0, path.text, path.tokens, reason=reason, logprob=path.logprob)
        choice.cached = _cached(result)
        if top is not None:
            choice.scores = await scores_of(engine, [*job.ids, *path.tokens], top, len(job.ids))
        found.append(choice)
    if job.wants_lattice:
        found[0].lattice = result.to_dict()
    return found


async def scores_of(
    engine: Engine, ids: Sequence[int], top: int, first: int = 0
) -> list[TokenScore]:
    """The scores of a text's tokens; see :func:`.scoring.text_scores`."""
    return await asyncio.wrap_future(
        engine.call(lambda: text_scores(engine.model.model, ids, top, first))
    )


async def complete(engine: Engine, request: CompletionRequest) -> dict[str, Any]:
    """The answer to a completion that is not streamed."""
    jobs = completion_jobs(engine, request)
    texts = await asyncio.gather(
        *(choices_of(engine, job, i * request.n) for i, job in enumerate(jobs))
    )
    told = []
    for i, (job, choices) in enumerate(zip(jobs, texts, strict=True)):
        before, prompt_scores = "", []
        if request.echo:
            given = job.prompt
            before = given if isinstance(given, str) else engine.tokenizer.decode(job.ids)
            if request.logprobs is not None:
                prompt_scores = await scores_of(engine, job.ids, request.logprobs)
        for choice in choices or [Choice(i * request.n, reason="length")]:
            scores = None
            if request.logprobs is not None:
                scores = completion_logprobs(
                    engine.vocabulary, [*prompt_scores, *(choice.scores or [])]
                )
            entry = {
                "index": choice.index,
                "text": before + choice.text,
                "logprobs": scores,
                "finish_reason": choice.reason,
            }
            if choice.lattice is not None:
                entry["tempo"] = choice.lattice
            told.append(entry)
    return {
        **envelope("text_completion", engine.name),
        "choices": told,
        "usage": _usage(jobs, texts),
    }


async def complete_chat(engine: Engine, request: ChatRequest) -> dict[str, Any]:
    """The answer to a chat completion that is not streamed."""
    job = chat_job(engine, request)
    choices = await choices_of(engine, job)
    told = []
    for choice in choices:
        entry: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None
            if job.top is None
            else chat_logprobs(engine.vocabulary, choice.scores or []),
            "finish_reason": choice.reason,
        }
        if choice.lattice is not None:
            entry["tempo"] = choice.lattice
        told.append(entry)
    return {
        **envelope("chat.completion", engine.name),
        "choices": told,
        "usage": _usage([job], [choices]),
    }


def _usage(jobs: Sequence[Job], texts: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    said = sum(len(choice.ids) for choices in texts for choice in choices)
    # Of several samples of a prompt, one reads what is new of it.
    cached = sum(min((c.cached for c in choices), default=0) for choices in texts)
    return usage(sum(len(job.ids) for job in jobs), said, cached)


@dataclass(frozen=True)
class Piece:
    """A part of a choice's text as it is streamed.

    Args:
        index: of the choice.
        text: that is new.
        scores: of the tokens that were read for it.
        step: of the lattice, if it was wanted.
        reason: why the text ended, in its last piece.
        count: tokens of the text, in its last piece.
        cached: tokens of the prompt that were not read again, in the last piece.
    """

    index: int
    text: str
    scores: tuple[TokenScore, ...] = ()
    step: dict[str, Any] | None = None
    reason: str | None = None
    count: int = 0
    cached: int = 0


async def pieces(engine: Engine, jobs: Sequence[Job]) -> AsyncIterator[Piece]:
    """The texts of jobs as they come, those of several generations mixed."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
    each = [
        (job, settings, i * job.wants + k)
        for i, job in enumerate(jobs)
        for k, settings in enumerate(job.settings())
    ]

    async def follow(job: Job, settings: Settings, index: int) -> None:
        try:
            async for piece in _followed(engine, job, settings, index):
                await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(follow(*one)) for one in each]
    left = len(tasks)
    try:
        while left:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()


async def _followed(
    engine: Engine, job: Job, settings: Settings, index: int
) -> AsyncIterator[Piece]:
    """The pieces of one generation; distinct texts of a tree are told at its end."""
    single = not settings.branches and job.request.tempo is None
    if not single and not job.wants_lattice:
        for k, choice in enumerate(await _generated(engine, job, settings)):
            scores = tuple(choice.scores or ())
            n = len(choice.ids)
            yield Piece(index + k, choice.text, scores, None, choice.reason, n, choice.cached)
        return
    stream = TextStream(engine.vocabulary, settings.stop)
    waiting: list[TokenScore] = []
    top = job.top if single else None
    async with running(engine, job.prompt, settings, top, job.wants_lattice) as generation:
        async for event in generation.events():
            if isinstance(event, StepEvent):
                if event.score is not None:
                    waiting.append(event.score)
                text = stream.write(event.ids[0]) if single and event.ids else ""
                if text or event.lattice is not None:
                    yield Piece(index, text, tuple(waiting), event.lattice)
                    waiting = []
                continue
            rest = stream.finish(await _text(engine, event))
            count = len(event.lattice)
            reason = finish_reason(event)
            yield Piece(index, rest, tuple(waiting), None, reason, count, _cached(event))


def check_streams(job: Job) -> None:
    """Raise TempoError for what cannot be streamed."""
    if job.max_tokens == 0:
        raise TempoError("max_tokens must be at least 1 with stream")
