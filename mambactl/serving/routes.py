"""The routes of the server, and what stands in front of all of them."""

import asyncio
import hmac
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mambactl import console
from mambactl.decode.prompts import Prompt
from mambactl.foreign import reason
from mambactl.serving.answering import reply
from mambactl.serving.prometheus import CONTENT_TYPE
from mambactl.serving.refusals import Refused, ending
from mambactl.serving.reply_format import ChatFormat, CompletionFormat, sent_event
from mambactl.serving.request_fields import ChatBody, CompletionBody, parsed
from mambactl.serving.service import Service

MB = 10**6
# paths that need the key
GUARDED = "/v1/"
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


class Routes:
    """Answers to requests for one service."""

    def __init__(self, service: Service):
        self.service = service

    async def chat(self, request: Request) -> Response:
        """Answer a request to /v1/chat/completions."""
        service = self.service
        service.ready()
        body = parsed(ChatBody, await self._body(request))
        service.require_model(body.model)
        tools = body.offered_tools()
        options = {} if tools is None else {"tool_choice": body.model_dump()["tool_choice"]}
        messages = body.rendered_messages()
        ids = await service.encode(Prompt(messages, tools=tools, template=options), chat=True)
        form = ChatFormat(service.name, body.alternatives is not None)
        names = {tool["function"]["name"] for tool in tools or ()}
        return await reply(service, request, body, service.jobs([ids], body), form, names)

    async def completions(self, request: Request) -> Response:
        """Answer a request to /v1/completions."""
        service = self.service
        service.ready()
        body = parsed(CompletionBody, await self._body(request))
        service.require_model(body.model)
        prompts = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompts.append(await service.encode(Prompt.of(prompt), chat=False))
            else:
                prompts.append(service.require_tokens(prompt))
        form = CompletionFormat(service.name, body.alternatives is not None)
        return await reply(service, request, body, service.jobs(prompts, body), form)

    async def models(self, request: Request) -> Response:
        """List the one model, for /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model, for /v1/models/NAME."""
        self.service.require_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Report health, for /health: 200 once requests are answered."""
        ready = self.service.scheduler is not None
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Report the server's metrics, for /metrics."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE)

    def _model(self) -> dict[str, object]:
        service = self.service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "mambactl",
            "max_model_len": service.max_length or None,
        }

    async def _body(self, request: Request) -> bytes:
        """The body; Refused where it is too large, or takes too long to arrive."""
        config, parts, size = self.service.config, [], 0
        try:
            async with asyncio.timeout(config.read_timeout):
                async for part in request.stream():
                    size += len(part)
                    # a client that sends on would not read the reply
                    if size <= config.max_body * MB:
                        parts.append(part)
        except TimeoutError:
            seconds = f"{config.read_timeout:g} s"
            raise Refused(
                f"the request did not arrive in {seconds}", 408, headers={"Connection": "close"}
            ) from None
        if size > config.max_body * MB:
            raise Refused(f"the body is larger than {config.max_body:g} MB", 413)
        return b"".join(parts)


class Gate:
    """Asks for the key, and counts the replies."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]):
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.service.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        if scope["path"].startswith(GUARDED) and not self._allowed(Request(scope)):
            refusal = Refused("the API key is missing or wrong", 401, code="invalid_api_key")
            await _refused(refusal)(scope, receive, counted)
            return
        try:
            await self.app(scope, receive, counted)
        except asyncio.CancelledError:
            # the grace of a server that ends is over: the last that this task does
            if not started:
                await _refused(ending())(scope, receive, counted)
                return
            # replies that have begun and not ended are streams
            body = sent_event(ending().content())
            await send({"type": "http.response.body", "body": body, "more_body": False})

    def _allowed(self, request: Request) -> bool:
        key = self.service.key
        if key is None:
            return True
        given = request.headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {key}".encode())


def make_app(service: Service, lifespan: Lifespan) -> ASGIApp:
    """The application; `lifespan` starts and ends what decodes."""
    routes = Routes(service)
    table = [
        Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        Route("/v1/completions", routes.completions, methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/health", routes.health),
        Route("/metrics", routes.metrics),
    ]
    handlers = {
        Refused: _on_refusal,
        HTTPException: _on_http,
        ClientDisconnect: _on_leaving,
        Exception: _on_bug,
    }
    app = Starlette(routes=table, exception_handlers=handlers, lifespan=lifespan)
    return Gate(app, service, frozenset(route.path for route in table))


def _refused(refusal: Refused) -> JSONResponse:
    return JSONResponse(refusal.content(), refusal.status, headers=refusal.headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    return _refused(error) if isinstance(error, Refused) else await _on_bug(request, error)


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return await _on_bug(request, error)
    where = f"{request.method} {request.url.path}"
    return _refused(Refused(f"{where}: {error.detail}", error.status_code))


async def _on_leaving(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_bug(request: Request, error: Exception) -> Response:
    console.warn(f"{request.url.path}: {reason(error)}")
    return _refused(Refused(f"the request failed ({reason(error)})", 500))
