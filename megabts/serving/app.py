"""The routes: OpenAI's completions, chat completions and models; health, metrics, and the page."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from megabts.serving import metrics
from megabts.serving.answers import Answer, Kind
from megabts.serving.chat import ChatTemplate
from megabts.serving.errors import ApiError
from megabts.serving.fields import read_json
from megabts.serving.http import encode
from megabts.serving.requests import Asked, Reader, read_chat, read_completion
from megabts.serving.service import Call, Service

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page is one file: nothing else is loaded, and it talks to nobody but its server."""
T = TypeVar("T")


class Gone(Exception):
    """The client went away."""


def make_app(service: Service, template: ChatTemplate) -> FastAPI:
    """The application of one service. Every error it answers is JSON."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    served = service.served
    readers: dict[Kind, Reader] = {
        "completion": lambda content: read_completion(content, served),
        "chat": lambda content: read_chat(content, served, template),
    }
    app.add_api_route("/v1/completions", _endpoint(service, "completion", readers["completion"]), methods=["POST"])
    app.add_api_route("/v1/chat/completions", _endpoint(service, "chat", readers["chat"]), methods=["POST"])
    _add_reports(app, service)
    for kind in (ApiError, HTTPException, Gone, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


def _endpoint(service: Service, kind: Kind, read: Reader) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        body = await request.body()
        # Tokenizing a long prompt takes a while: the event loop goes on meanwhile.
        asked = await asyncio.to_thread(lambda: read(read_json(body)))
        if asked.stream:
            return await _streamed(request, service, kind, asked)
        answer = Answer(kind, asked, service.served)
        with service.call(asked) as call:
            await _unless_gone(request, _collect(answer, call))
        return _json(answer.whole())

    return endpoint


async def _collect(answer: Answer, call: Call) -> None:
    async for told in call.told():
        answer.add(told.index, told.event)


async def _streamed(request: Request, service: Service, kind: Kind, asked: Asked) -> Response:
    """An answer as server-sent events. What fails before the first token is an error with a status."""
    chunks = _chunks(service, kind, asked)
    try:
        first = await _unless_gone(request, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise

    async def events() -> AsyncIterator[bytes]:
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event([error.content()])
        finally:
            await chunks.aclose()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _chunks(service: Service, kind: Kind, asked: Asked) -> AsyncGenerator[list[dict[str, Any]], None]:
    """Lists of chunks, the first with the first token."""
    answer = Answer(kind, asked, service.served)
    begun = answer.opening()
    with service.call(asked) as call:
        async for told in call.told():
            chunks = [*begun, *answer.add(told.index, told.event)]
            begun = []
            if chunks:
                yield chunks
    if asked.include_usage:
        yield [answer.usage_chunk()]


def _event(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result. Raises Gone, and cancels the work, when the client hangs up first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _add_reports(app: FastAPI, service: Service) -> None:
    served, page = service.served, files("megabts.serving") / "static" / "index.html"
    model = {"id": served.name, "object": "model", "created": 0, "owned_by": "megabts", "megabts": served.describe()}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != served.name:
            raise ApiError(404, f"there is no model {name[:80]!r}; this is {served.name!r}", "model", "model_not_found")
        return _json(model)

    @app.get("/health")
    async def health() -> Response:
        if service.worker.failure is not None:
            return _json({"status": "failed", "message": "the model failed and the server ends"}, 503)
        if service.ended.is_set():
            return _json({"status": "ending"}, 503)
        return _json({"status": "ok"})

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page.read_text("utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(content), status, headers, media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Gone):
        error = ApiError(499, "the client went away")  # nobody reads it; metrics count it
    elif isinstance(error, HTTPException):
        method, path = request.method[:20], request.url.path[:80]
        words = {404: f"there is nothing at {path!r}", 405: f"{path!r} takes no {method}"}
        what = words.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, what, None, None, dict(error.headers or {}))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server made a mistake; its log says which", None, "internal_error")
    return _json(error.content(), error.status, error.headers)
