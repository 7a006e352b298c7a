"""How does the world talk to it? OpenAI's API over HTTP: `create_app` for any server, `serve` for the command.

The files beside this one, by the question they answer: api_schema (what may be sent), api_replies (what comes back),
api_params (what it asks of the engine), api_prompt, api_chat, api_message, api_completions, api_tokens, api_logprobs,
api_score (reward models), api_stream (how it travels), api_limits, api_errors, api_metrics.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from groundup import __version__
from groundup.adapt.scored import is_scoring
from groundup.device import share_arenas
from groundup.errors import UserError
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import params_from_dir
from groundup.infer.speculate import Drafter, ModelDrafter, NgramDrafter
from groundup.infer.worker import Draining, Limits, Worker
from groundup.model.hub import resolve
from groundup.serve import api_chat, api_completions, api_score, api_tokens
from groundup.serve.api_context import Context, context
from groundup.serve.api_errors import install, json_response
from groundup.serve.api_limits import LimitBody, RequireKey
from groundup.serve.api_metrics import CountRequests, Metrics
from groundup.serve.api_models import Models, Served, ServerSettings
from groundup.serve.api_replies import ERRORS, Health, ModelCard, ModelList, Version
from groundup.serve.api_score import ServedScorer, load_scorer
from groundup.serve.script import load_pair

router = APIRouter()
LAST_WORDS = 10  # seconds that clients have to read their answers after the drain


def create_app(
    models: Sequence[Served], settings: ServerSettings | None = None, scorers: Sequence[ServedScorer] = ()
) -> FastAPI:
    """The API over running models, those that write and those that score; their workers start and stop with it.

    Its pages need nothing from a network, so there is no interactive documentation: /openapi.json describes it.
    """
    settings = settings or ServerSettings()
    everyone: list[Served | ServedScorer] = [*models, *scorers]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for one in everyone:
            one.worker.start()
        yield
        for one in everyone:
            await asyncio.to_thread(one.worker.stop)

    app = FastAPI(title="groundup", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    for routes in (api_chat.router, api_completions.router, api_tokens.router, api_score.router, router):
        app.include_router(routes)
    metrics = Metrics(models, [path for path in app.openapi()["paths"] if "{" not in path])
    app.state.context = Context(Models(models, scorers), settings, metrics)
    install(app)
    # The last one added sees a request first.
    app.add_middleware(LimitBody, most=settings.max_body_bytes)
    if settings.api_key:
        app.add_middleware(RequireKey, key=settings.api_key)
    app.add_middleware(CountRequests, metrics=metrics)
    if settings.cors_origins:
        origins = list(settings.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


@router.get("/v1/models", responses={200: {"model": ModelList}, **ERRORS})
async def list_models(request: Request) -> Response:
    """The names that may be asked, adapters among them."""
    return json_response({"object": "list", "data": context(request).models.cards()})


@router.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}, **ERRORS})
async def one_model(request: Request, name: str) -> Response:
    models = context(request).models
    if name not in models.scorers:
        models.find(name)
    return json_response(next(card for card in models.cards() if card["id"] == name))


@router.get("/health", responses={200: {"model": Health}, **ERRORS})
async def health(request: Request) -> Response:
    """200 while requests are taken and answered, 503 when not (any more)."""
    models = context(request).models
    everyone: list[Served | ServedScorer] = [*models.served, *models.scorers.values()]
    if not all(one.worker.healthy for one in everyone):
        raise Draining
    return json_response({"status": "ok"})


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **ERRORS})
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(context(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses={200: {"model": Version}, **ERRORS})
async def version() -> Response:
    return json_response({"version": __version__})


def serve(
    directory: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    adapters: Sequence[str] = (),
    quantize: str | None = None,
    draft: str | None = None,
    cache_gb: float | None = None,
    max_waiting: int = Limits.max_waiting,
    max_total_tokens: int | None = None,
    max_tokens_limit: int | None = None,
    request_timeout: float | None = None,
    cors_origins: Sequence[str] = (),
    drain_seconds: float = ServerSettings.drain_seconds,
    device: str = "auto",
    scorers: Sequence[str] = (),
) -> None:
    """Serve a model folder until SIGTERM or Ctrl-C: then running requests finish, for up to drain_seconds.

    A reward model's folder is served for POST /score alone; scorers: NAME=PATH of some beside a model that writes.

    name: what clients call the model (default: the folder's name). adapters: NAME=PATH of LoRA adapters, each a model
    of its own to clients. draft: a folder of a smaller model that guesses ahead, or "ngram". api_key: also from
    GROUNDUP_API_KEY, which other users of the machine cannot see. port 0: any free one. cache_gb: memory for keys and
    values (None: a quarter of what is free). Raises UserError: no model folder, an adapter or draft that does not fit,
    a port that is taken.
    """
    settings = ServerSettings(
        api_key=api_key or os.environ.get("GROUNDUP_API_KEY") or None,
        max_tokens_limit=max_tokens_limit,
        cors_origins=tuple(cors_origins),
        drain_seconds=drain_seconds,
    )
    share_arenas()
    engine_settings = EngineSettings(memory=cache_gb and cache_gb * 1e9, quantize=quantize)
    own_name, limits = name or Path(directory).resolve().name, Limits(max_waiting, max_total_tokens, request_timeout)
    with listen(host, port) as listener:
        scored = [load_scorer(*_named(text, "--scorer"), device, limits) for text in scorers]
        served = []
        if is_scoring(resolve(directory)):
            _refuse_for_scorers(**{"--adapter": adapters, "--quantize": quantize, "--draft": draft})
            scored.insert(0, load_scorer(own_name, directory, device, limits))
        else:
            model, tokenizer = load_pair(directory, device)
            engine = Engine(model, tokenizer, engine_settings, _drafter(draft, device))
            pairs = [_named(adapter, "--adapter") for adapter in adapters]
            for pair in pairs:
                engine.load_adapter(*pair)
            names, habits = tuple(one for one, _ in pairs), params_from_dir(directory)
            served = [Served(own_name, Worker(engine, limits), tokenizer, engine.context, habits, names)]
        app = create_app(served, settings, scored)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_WORDS, server_header=False)
        Server(config, [*served, *scored], settings).run(sockets=[listener])


def _named(text: str, option: str) -> tuple[str, str]:
    """The two halves of NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(option, f"{text!r} names no folder", "write NAME=PATH")
    return name, path


def _refuse_for_scorers(**options: object) -> None:
    for option, value in options.items():
        if value:
            raise UserError(option, "is for a model that writes, and this one scores", "leave it out")


def _drafter(draft: str | None, device: str) -> Drafter | None:
    if draft is None or draft == "ngram":
        return NgramDrafter() if draft else None
    return ModelDrafter(load_pair(draft, device)[0])


class Server(uvicorn.Server):
    """uvicorn, but the first SIGTERM or SIGINT drains and the second leaves at once; either way it ends with 0."""

    def __init__(
        self, config: uvicorn.Config, models: Sequence[Served | ServedScorer], settings: ServerSettings
    ) -> None:
        super().__init__(config)
        self._models, self._settings = models, settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        names = ", ".join(served.name for served in self._models)
        host, port = (sockets or self.servers[0].sockets)[0].getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        print(f"groundup serves {names} at {where} (Ctrl-C stops)", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._drain is not None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = self._drain or asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        """Answer 503 to what comes now, finish what runs, then let uvicorn close."""
        grace = self._settings.drain_seconds
        await asyncio.gather(*(served.worker.drain(grace) for served in self._models))
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a port that is taken is known before the model is loaded. Raises UserError."""
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends at once (TCP_NODELAY) on sockets that name their protocol only; else each token waits 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UserError("--port", f"cannot listen on {host}:{port} ({why})", "choose another port or host") from None
    return listener
