"""Passes a request on to another process of the pool, and its answer back, byte for byte."""

from collections.abc import AsyncIterator, Callable

import httpx
from fastapi import Response

from ..errors import EngineLost, LlmsterError, Unavailable
from .http import PLAN, PREFER, REQUEST_ID, ROUTE, sse_error
from .stream import BodyStream

CONNECT_TIMEOUT_S = 3.0
TIMEOUT = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
"""An answer may take minutes to begin; whoever computes it watches that it advances."""
BACK = ("content-type", "retry-after", ROUTE, REQUEST_ID)
FORTH = (PREFER,)
STREAM = "text/event-stream"
EVENT_END = b"\n\n"


def new_client() -> httpx.AsyncClient:
    """A client for other processes of the pool; proxies of the environment are not for those."""
    return httpx.AsyncClient(
        trust_env=False,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
    )


async def forward(
    client: httpx.AsyncClient,
    url: str,
    body: bytes,
    request_id: str,
    headers: dict[str, str],
    plan: str | None = None,
) -> httpx.Response:
    """Send the request; returns when the answer begins. Close the answer, or hand it to `answer`.

    An answer that does not stream is read whole, so that it either comes whole or can be asked for
    again. Raises Unavailable (`node_unreachable`), EngineLost when the other side goes away.
    """
    out = {name: headers[name] for name in FORTH if name in headers}
    out |= {"content-type": "application/json", REQUEST_ID: request_id}
    if plan is not None:
        out[PLAN] = plan
    request = client.build_request("POST", url, content=body, headers=out)
    try:
        response = await client.send(request, stream=True)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unavailable(
            "node_unreachable",
            f"{request.url.host}:{request.url.port} can't be reached",
            "`llmster nodes` shows the state of the pool",
        ) from error
    except httpx.HTTPError as error:
        raise EngineLost("the node went away before it answered") from error
    streams = response.headers.get("content-type", "").startswith(STREAM)
    # An error is read whole whatever its type: it may be sent elsewhere instead of answered.
    if streams and response.status_code < 400:
        return response
    try:
        await response.aread()
    except httpx.HTTPError as error:
        raise EngineLost("the node went away while it answered") from error
    finally:
        await response.aclose()
    return response


def failure(response: httpx.Response) -> LlmsterError | None:
    """The error that a read answer carries, if it does."""
    if response.status_code < 400:
        return None
    try:
        return LlmsterError.from_body(response.json()["error"], response.status_code)
    except (ValueError, KeyError, TypeError, AttributeError):
        return LlmsterError("bad_answer", "the node's answer makes no sense", "", 502)


def answer(response: httpx.Response, on_end: Callable[[], None] = lambda: None) -> Response:
    """The answer for our own client. `on_end` is called after a stream, however it ends."""
    headers = {name: response.headers[name] for name in BACK if name in response.headers}
    if response.is_stream_consumed:
        return Response(response.content, response.status_code, headers)

    async def end() -> None:
        await response.aclose()
        on_end()

    return BodyStream(_relay(response), headers, end, response.status_code)


async def _relay(response: httpx.Response) -> AsyncIterator[bytes]:
    end = EVENT_END
    try:
        async for data in response.aiter_raw():
            end = (end + data[-len(EVENT_END) :])[-len(EVENT_END) :]
            yield data
    except httpx.HTTPError:
        if end != EVENT_END:
            yield EVENT_END  # or the error would be part of the event that broke off
        yield sse_error(EngineLost("the node went away in the middle of its answer"))
