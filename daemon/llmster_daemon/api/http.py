"""What every HTTP surface of llmster shares: ids, the error envelope, disconnects, guards."""

import asyncio
import json
import logging
import re
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
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

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {key for key, _ in message["headers"]}
                message["headers"] = list(message["headers"])
                if REQUEST_ID.encode() not in names:
                    message["headers"].append((REQUEST_ID.encode(), request_id.encode()))
                if ROUTE.encode() not in names and scope["path"].startswith("/v1/"):
                    message["headers"].append((ROUTE.encode(), b"none"))
            await send(message)

        refusal = _refusal(headers)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await error_response(refusal)(scope, receive, send_with_headers)
        else:
            await send({"type": "websocket.close", "code": 4403, "reason": refusal.code})


def _refusal(headers: dict[bytes, bytes]) -> LlmsterError | None:
    host = urlsplit("//" + headers.get(b"host", b"localhost").decode("latin-1")).hostname
    if not is_loopback(host or ""):
        return LlmsterError(
            "bad_host", "this server answers for localhost only", "use http://127.0.0.1:PORT", 403
        )
    origin = headers.get(b"origin", b"").decode("latin-1")
    if origin and not is_loopback(urlsplit(origin).hostname or ""):
        return LlmsterError(
            "bad_origin", "web pages of other sites may not use this server", "", 403
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
        return error_response(bad_field(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        known = {404: "not_found", 405: "method_not_allowed"}
        what = f"{request.method} {request.url.path}"
        message = {404: f"there is no {what}", 405: f"{what}: wrong method"}
        return error_response(
            LlmsterError(
                known.get(error.status_code, "http_error"),
                message.get(error.status_code, str(error.detail)),
                "see docs/api.md for what is served",
                error.status_code,
            )
        )

    @app.exception_handler(ClientGone)
    async def on_client_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def on_surprise(_: Request, error: Exception) -> Response:
        return error_response(
            LlmsterError(
                "internal_error",
                f"an unforeseen error ({type(error).__name__})",
                "this is a bug in llmster; the log of the process has the details",
            )
        )


def bad_field(detail: Any) -> BadRequest:
    """A pydantic error as one of ours. Never quotes the input: it may be a prompt."""
    where = [str(part) for part in detail["loc"]]
    if where and where[0] == "body":
        where = where[1:]
    param = ".".join(where) or None
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
        detail = error.errors(include_input=False, include_url=False)[0]
        if detail["type"] == "json_invalid":
            raise BadRequest(
                "invalid_json",
                f"the body is not JSON: {detail['ctx']['error']}",
                "send one JSON object, with `content-type: application/json`",
            ) from None
        raise bad_field(detail) from None


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
