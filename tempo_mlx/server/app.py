"""The HTTP interface: routes, who may use them, and how errors are told."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import TempoError
from ..scoring import ContinuationScorer
from ..scoring.rescoring import Weights, rescore
from ..text.vocabulary import encode_prompt
from .answers import chat_logprobs, completion_logprobs, envelope, error_body, usage
from .completions import (
    Job,
    chat_job,
    check_streams,
    complete,
    complete_chat,
    completion_jobs,
    pieces,
)
from .engine import Engine, EngineStoppedError, FailedRequestError, QueueFullError
from .protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RescoreRequestBody,
    ScoreRequestBody,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

Body = TypeVar("Body", bound=BaseModel)

#: Bytes of a request's body at most.
MOST_BYTES = 32 * 2**20

#: Seconds after which a client that found the queue full may try again.
RETRY_AFTER = 1

#: Routes that need no key: they tell whether the server works, and nothing else.
OPEN = frozenset({"/health"})


class RequestError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client.
        param: the field that is wrong, if one is.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status == 429 else None
        body = error_body(str(self), kind, self.param, self.code)
        return JSONResponse(body, self.status, headers)


class Gate:
    """Refuses who has no key, asks for another host, or sends too much.

    Args:
        app: what is behind it.
        api_key: that clients must send; None asks for none.
        hosts: names in the Host header that are answered; None answers all. A page of another site
            can make a browser call a server on its own machine under that site's name.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: frozenset[str] | None):
        self._app, self._api_key, self._hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(Request(scope))
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _refusal(self, request: Request) -> RequestError | None:
        host = (request.url.hostname or "").lower()
        if self._hosts is not None and host not in self._hosts:
            return RequestError(403, f"this server does not answer for host {host!r}")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            return RequestError(413, f"a request has at most {MOST_BYTES:,} bytes")
        if self._api_key is None or request.url.path in OPEN or request.method == "OPTIONS":
            return None
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._api_key.encode()):
            return RequestError(401, "the API key is missing or wrong", code="invalid_api_key")
        return None


def _bounded(receive: Receive) -> Receive:
    """Messages of a client as long as its body is not too large."""
    seen = 0

    async def bounded() -> Any:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST_BYTES:
            raise RequestError(413, f"a request has at most {MOST_BYTES:,} bytes")
        return message

    return bounded


def application(
    engine: Engine,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = (),
    hosts: frozenset[str] | None = None,
) -> Starlette:
    """The application of an engine that runs.

    Args:
        engine: generates.
        api_key, hosts: see :class:`Gate`.
        allowed_origins: of pages that may call the server from a browser.
    """
    server = Server(engine)
    routes = [
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.models),
        Route("/v1/completions", _guarded(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", _guarded(server.chat_completions), methods=["POST"]),
        Route("/v1/score", _guarded(server.score), methods=["POST"]),
        Route("/v1/rescore", _guarded(server.rescore), methods=["POST"]),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/detokenize", server.detokenize, methods=["POST"]),
        Route("/tokenizer_info", server.tokenizer_info),
    ]
    middleware = [
        Middleware(Gate, api_key=api_key, hosts=hosts),
        Middleware(
            CORSMiddleware,
            allow_origins=list(allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        ),
    ]
    ours = (RequestError, TempoError, EngineStoppedError)
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        **dict.fromkeys(ours, _refused),
        **dict.fromkeys((404, 405), _unknown),
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _guarded(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose internal errors are logged, and told without closing the connection."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (RequestError, TempoError, EngineStoppedError):
            raise
        except Exception as error:
            logger.exception("%s %s failed", request.method, request.url.path)
            return described(error).response()

    return guarded


async def _refused(request: Request, error: Exception) -> Response:
    return described(error).response()


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = f"{request.method} {request.url.path}"
    return RequestError(status, f"there is no {what}").response()


def described(error: Exception) -> RequestError:
    """An error as the client hears of it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, EngineStoppedError):
        return RequestError(503, str(error))
    if isinstance(error, FailedRequestError) or not isinstance(error, TempoError):
        return RequestError(500, f"the server failed: {error}")
    return RequestError(400, str(error), _named(str(error)))


def _named(message: str) -> str | None:
    """The field that a message begins with, as ours do."""
    first = message.split(" ", 1)[0].strip(":")
    return first if first.replace("_", "").replace(".", "").isalnum() else None


class Server:
    """What the routes do.

    Args:
        engine: generates.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._started = int(time.time())
        self._scorer: ContinuationScorer | None = None

    async def health(self, request: Request) -> Response:
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        counts, status = self._engine.counts, self._engine.status
        values = {
            "requests_total": ("counter", counts.requests),
            "requests_failed_total": ("counter", counts.failed),
            "requests_cancelled_total": ("counter", counts.cancelled),
            "prompt_tokens_total": ("counter", counts.prompt_tokens),
            "cached_tokens_total": ("counter", counts.cached_tokens),
            "generated_tokens_total": ("counter", counts.generated_tokens),
            "requests_running": ("gauge", status.running),
            "requests_waiting": ("gauge", status.waiting),
            "cache_bytes": ("gauge", status.cache_bytes),
            "prefix_cache_bytes": ("gauge", self._engine.prefix_bytes),
            "forward_passes_total": ("counter", status.passes),
        }
        lines = []
        for name, (kind, value) in values.items():
            lines += [f"# TYPE tempo_mlx_{name} {kind}", f"tempo_mlx_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        model = {
            "id": self._engine.name,
            "object": "model",
            "created": self._started,
            "owned_by": "tempo-mlx",
            "max_model_len": self._engine.model.context_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        body = await self._body(request, CompletionRequest)
        if not body.stream:
            return JSONResponse(await _while_connected(request, complete(self._engine, body)))
        if body.echo:
            raise TempoError("echo must be false with stream")
        jobs = completion_jobs(self._engine, body)
        for job in jobs:
            check_streams(job)
        return _events(self._completion_chunks(body, jobs))

    async def chat_completions(self, request: Request) -> Response:
        body = await self._body(request, ChatRequest)
        if not body.stream:
            return JSONResponse(await _while_connected(request, complete_chat(self._engine, body)))
        return _events(self._chat_chunks(body, chat_job(self._engine, body)))

    async def _completion_chunks(
        self, body: CompletionRequest, jobs: list[Job]
    ) -> AsyncIterator[dict[str, Any]]:
        shared = envelope("text_completion", self._engine.name)
        said, offsets, cached = 0, dict[int, int](), dict[int, int]()
        async for piece in pieces(self._engine, jobs):
            logprobs = None
            if body.logprobs is not None:
                logprobs = completion_logprobs(
                    self._engine.vocabulary, piece.scores, offsets.get(piece.index, 0)
                )
            offsets[piece.index] = offsets.get(piece.index, 0) + len(piece.text)
            said += piece.count
            if piece.reason is not None:
                _note_cached(cached, piece.index // body.n, piece.cached)
            entry = {
                "index": piece.index,
                "text": piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.reason,
            }
            yield shared | {"choices": [entry | _step(piece.step)]}
        if body.stream_options is not None and body.stream_options.include_usage:
            total = sum(len(job.ids) for job in jobs)
            yield shared | {"choices": [], "usage": usage(total, said, sum(cached.values()))}

    async def _chat_chunks(self, body: ChatRequest, job: Job) -> AsyncIterator[dict[str, Any]]:
        shared = envelope("chat.completion.chunk", self._engine.name)
        begun, said, cached = set[int](), 0, dict[int, int]()
        async for piece in pieces(self._engine, [job]):
            delta: dict[str, Any] = {}
            if piece.index not in begun:
                begun.add(piece.index)
                delta["role"] = "assistant"
            if piece.text or "role" in delta:
                delta["content"] = piece.text
            logprobs = None
            if body.logprobs and piece.scores:
                logprobs = chat_logprobs(self._engine.vocabulary, piece.scores)
            said += piece.count
            if piece.reason is not None:
                _note_cached(cached, 0, piece.cached)
            entry = {
                "index": piece.index,
                "delta": delta,
                "logprobs": logprobs,
                "finish_reason": piece.reason,
            }
            yield shared | {"choices": [entry | _step(piece.step)]}
        if body.stream_options is not None and body.stream_options.include_usage:
            total = usage(len(job.ids), said, sum(cached.values()))
            yield shared | {"choices": [], "usage": total}

    async def score(self, request: Request) -> Response:
        body = await self._body(request, ScoreRequestBody)

        def work() -> list[list[float]]:
            return self._known_scorer().score_continuations(body.contexts, body.candidates)

        scores = await asyncio.wrap_future(self._engine.call(work))
        return JSONResponse({"object": "list", "model": self._engine.name, "scores": scores})

    async def rescore(self, request: Request) -> Response:
        body = await self._body(request, RescoreRequestBody)
        lists = [each.model_dump(exclude_none=True) for each in body.lists]
        weights = Weights(**body.weights.model_dump())

        def work() -> list[dict[str, Any]]:
            found = rescore(self._known_scorer(), lists, weights, body.end)
            return [each.to_dict() for each in found]

        ranked = await asyncio.wrap_future(self._engine.call(work))
        return JSONResponse({"object": "list", "model": self._engine.name, "lists": ranked})

    def _known_scorer(self) -> ContinuationScorer:
        """The scorer, which keeps what it has read; for the engine's thread."""
        if self._scorer is None:
            self._scorer = ContinuationScorer(self._engine.model, self._engine.tokenizer)
        return self._scorer

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise TempoError("prompt or messages must be given, one of them")
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            ids = encode_prompt(self._engine.tokenizer, messages, self._engine.model)
        else:
            ids = self._engine.tokenizer.encode(
                body.prompt, add_special_tokens=body.add_special_tokens
            )
        return JSONResponse(
            {"tokens": ids, "count": len(ids), "max_model_len": self._engine.model.context_length}
        )

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeRequest)
        most = self._engine.model.vocabulary_size
        for id in body.tokens:
            if not 0 <= id < most:
                raise TempoError(f"tokens must be ids from 0 to {most - 1}, got {id}")
        return JSONResponse({"prompt": self._engine.tokenizer.decode(body.tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._engine.tokenizer
        return JSONResponse(
            {
                "name": self._engine.name,
                "vocab_size": self._engine.model.vocabulary_size,
                "eos_token": tokenizer.eos_token,
                "eos_token_ids": sorted(tokenizer.eos_token_ids),
                "bos_token": tokenizer.bos_token,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """The request's body.

        Raises:
            RequestError: naming the field that is wrong; or for a model that is not this one.
        """
        try:
            given = json.loads(await request.body())
            body = kind.model_validate(given)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(400, f"the body is not JSON: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            what = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
            raise RequestError(400, f"{field or 'the body'}: {what}", field) from error
        name = getattr(body, "model", None)
        if name is not None and name != self._engine.name:
            raise RequestError(
                404,
                f"the model {name!r} is not served here; this server has {self._engine.name!r}",
                "model",
                "model_not_found",
            )
        return body


def _note_cached(cached: dict[int, int], prompt: int, n: int) -> None:
    """Of several samples of a prompt, one reads what is new of it."""
    cached[prompt] = min(cached.get(prompt, n), n)


def _step(step: dict[str, Any] | None) -> dict[str, Any]:
    return {} if step is None else {"tempo": step}


async def _while_connected(request: Request, work: Any) -> Any:
    """What the work gives; it is cancelled when the client has gone."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def _events(chunks: AsyncIterator[dict[str, Any]]) -> Response:
    """Chunks as server-sent events; an error on the way is the last one."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except Exception as error:
            if not isinstance(error, (TempoError, RequestError, EngineStoppedError)):
                logger.exception("a stream failed")
            told = described(error)
            kind = "invalid_request_error" if told.status < 500 else "server_error"
            yield f"data: {json.dumps(error_body(str(told), kind, told.param, told.code))}\n\n"
            return
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )
