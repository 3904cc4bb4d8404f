"""What every HTTP surface of llmster shares: ids, the error envelope, disconnects, guards."""

import asyncio
import json
import logging
import re
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import BadRequest, LlmsterError
from ..home import is_loopback
from ..serving import new_request_id

log = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

REQUEST_ID = "x-llmster-request-id"
ROUTE = "x-llmster-route"
PLAN = "x-llmster-plan"
"""Set by the gateway: this node is to answer the request itself, in this way."""
PREFER = "x-llmster-prefer"
"""Set by a client: `colocated` or `split`, where the pool can do both."""

MAX_BODY_BYTES = 32 << 20
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class Edge:
    """The outermost layer: request ids and route headers on every response, and who may ask.

    What listens on loopback is open to this machine's programs, but not to web pages that a
    browser on it shows: requests for other host names (DNS rebinding) or from other origins are
    refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(REQUEST_ID.encode(), b"").decode("latin-1")
        if PLAN.encode() not in headers or not _ID.fullmatch(request_id):
            request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {key for key, _ in message["headers"]}
                message["headers"] = list(message["headers"])
                if REQUEST_ID.encode() not in names:
                    message["headers"].append((REQUEST_ID.encode(), request_id.encode()))
                if ROUTE.encode() not in names and scope["path"].startswith("/v1/"):
                    message["headers"].append((ROUTE.encode(), b"none"))
            await send(message)

        refusal = _refusal(headers)
        if refusal is None:
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as error:
                if started or scope["type"] != "http":
                    raise
                log.exception("an unforeseen error in request %s", request_id)
                await error_response(_surprise(error))(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await error_response(refusal)(scope, receive, send_with_headers)
        else:
            await send({"type": "websocket.close", "code": 4403, "reason": refusal.code})


def _surprise(error: Exception) -> LlmsterError:
    return LlmsterError(
        "internal_error",
        f"an unforeseen error ({type(error).__name__})",
        "this is a bug in llmster; the log of the process has the details",
    )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _refusal(headers: dict[bytes, bytes]) -> LlmsterError | None:
    host = headers.get(b"host", b"localhost").decode("latin-1")
    if not is_loopback(_host_of(f"//{host}")):
        return LlmsterError(
            "bad_host", "this server answers for localhost only", "use http://127.0.0.1:PORT", 403
        )
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and not is_loopback(_host_of(origin)):
        return LlmsterError(
            "bad_origin",
            "web pages of other sites may not use this server",
            "serve the page from http://localhost, or ask without an `origin` header",
            403,
        )
    return None


def error_response(error: LlmsterError) -> JSONResponse:
    """The envelope as a response."""
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.envelope(), error.status, headers)


def install(app: FastAPI) -> None:
    """Add the edge and the error handlers to an application."""
    app.add_middleware(Edge)

    @app.exception_handler(LlmsterError)
    async def on_llmster_error(_: Request, error: LlmsterError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        detail = error.errors()[0]
        where = detail["loc"][1:] if detail["loc"][0] == "body" else detail["loc"]
        return error_response(bad_field(detail, where))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        known = {404: "not_found", 405: "method_not_allowed"}
        what = f"{request.method} {request.url.path}"
        message = {404: f"there is no {what}", 405: f"{what}: wrong method"}
        response = error_response(
            LlmsterError(
                known.get(error.status_code, "http_error"),
                message.get(error.status_code, str(error.detail)),
                "see docs/api.md for what is served",
                error.status_code,
            )
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def on_client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)


def bad_field(detail: Any, where: Sequence[str | int]) -> BadRequest:
    """A pydantic error as one of ours. Never quotes the input: it may be a prompt."""
    param = ".".join(str(part) for part in where) or None
    code = "missing_field" if detail["type"] == "missing" else "invalid_value"
    return BadRequest(
        code,
        f"{param or 'the body'}: {detail['msg'].lower()}",
        "see docs/api.md for the fields and their types",
        param=param,
    )


async def read_body(request: Request) -> bytes:
    """The body. Raises LlmsterError 413 for one that is too large."""
    length = request.headers.get("content-length", "")
    body = bytearray()
    too_large = LlmsterError(
        "body_too_large",
        f"the request is larger than {MAX_BODY_BYTES >> 20} MiB",
        "shorten the prompt",
        413,
    )
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)


def parse(model: type[M], body: bytes) -> M:
    """The body as this type. Raises BadRequest that names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False)
        if details[0]["type"] == "json_invalid":
            raise BadRequest(
                "invalid_json",
                f"the body is not JSON: {details[0]['ctx']['error']}",
                "send one JSON object, with `content-type: application/json`",
            ) from None
        value = from_json(body)
        # Of a value that may be of several types: the type that it came closest to.
        located = [(detail, _path(detail, value)) for detail in details]
        raise bad_field(*max(located, key=lambda found: len(found[1]))) from None


def _path(detail: Any, value: Any) -> list[str | int]:
    """Where in `value` a pydantic error is: its `loc`, less the names of types in between."""
    path: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(value, dict):
            inside = part in value
        else:
            inside = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside:
            value = value[part]
            path.append(part)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return path


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; cancel it as soon as the client hangs up. Raises ClientGone then.

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has hung up. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def sse_error(error: LlmsterError) -> bytes:
    """An error after the stream has begun: the envelope as the last event."""
    return b"data: " + json.dumps(error.envelope()).encode() + b"\n\n"
