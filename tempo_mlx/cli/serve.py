"""``tempo-mlx serve``: an OpenAI-style server on this machine."""

import asyncio
import logging
import os
import signal
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..arguments import check_choice, check_count, check_range, parse_bytes
from ..errors import TempoError
from ..io.console import Console
from ..models import PositionedModel
from ..weights import load
from .options import AdapterPath, Model

#: Hosts that only this machine reaches, which need no key.
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

#: Packages of the extra.
NEEDED = ("starlette", "uvicorn", "pydantic")

LEVELS = ("debug", "info", "warning", "error")

#: The variable that may hold the key, so that it need not stand in a command.
KEY_VARIABLE = "TEMPO_MLX_API_KEY"


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    model: Model = "smollm2-135m",
    adapter_path: AdapterPath = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Anything but this machine needs --api-key."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 to 65535; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY_VARIABLE,
            help="Key that clients must send (Authorization: Bearer KEY).",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin of a page that may call the server from a browser, such as "
            "https://example.org; may be given more than once. None without it.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Requests that generate at the same time, at least 1.")
    ] = 32,
    max_queue: Annotated[
        int,
        typer.Option(help="Requests that may wait for a place; more are refused with 429."),
    ] = 256,
    max_kv_bytes: Annotated[
        str | None,
        typer.Option(
            help="Memory for keys, values and recurrent states, such as 800MB or 2GiB. Half of "
            "what the model leaves, by default."
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="What is logged: debug, info, warning or error.")
    ] = "info",
) -> None:
    """Serve a model over HTTP with OpenAI's API, with exact scores and sets.

    Completions and chat completions with n, logprobs, echo and streaming; /v1/score ranks words
    after contexts. Requests join and leave one running batch. Ctrl-C lets streams end first.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise TempoError(f"serve needs {', '.join(missing)}: pip install 'tempo-mlx[server]'")
    check_range("--port", port, 0, 65535)
    check_count("--batch-size", batch_size)
    check_count("--max-queue", max_queue, 0)
    kv_bytes = parse_bytes(max_kv_bytes) if max_kv_bytes is not None else None
    check_choice("--log-level", log_level, LEVELS)
    if host not in LOOPBACK and not api_key:
        raise TempoError(
            f"--host {host} can be reached from other machines: give an --api-key, or set "
            f"{KEY_VARIABLE}"
        )
    import uvicorn

    from ..server.app import application
    from ..server.engine import Engine

    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    listener = _bound(host, port)
    loaded, tokenizer = load(model, adapter_path=adapter_path)
    name = Path(model).name if os.path.isdir(model) else model
    engine = Engine(PositionedModel.of(loaded), tokenizer, name, batch_size, kv_bytes, max_queue)
    engine.start()
    hosts = LOOPBACK if host in LOOPBACK else None
    served = application(engine, api_key, allowed_origins or (), hosts)
    address = f"[{host}]" if ":" in host else host
    where = f"http://{address}:{listener.getsockname()[1]}"
    Console(highlight=False).print(f"serving {name} on {where}")
    config = uvicorn.Config(served, log_level=log_level, lifespan="off")
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        # A second Ctrl-C must not end the interpreter below the thread that computes.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        engine.stop()


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for the traceback of a request that a second Ctrl-C has cut off."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; found out before a model is loaded.

    Raises:
        TempoError: if the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise TempoError(
            f"--host {host} --port {port} cannot be served: {error.strerror or error}; choose "
            "another port, or 0 for a free one"
        ) from error
