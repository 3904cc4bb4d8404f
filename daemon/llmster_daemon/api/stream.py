"""Responses whose body comes bit by bit, and stops costing anything when the client hangs up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .http import wait_for_disconnect


class BodyStream(Response):
    """Sends what `body` yields. `on_end` runs in any case, after the last byte or the hang-up.

    Unlike Starlette's StreamingResponse it cancels its source once, not at every await, so that
    the source can tell the engine to stop.
    """

    def __init__(
        self,
        body: AsyncIterator[bytes],
        headers: dict[str, str],
        on_end: Callable[[], Awaitable[None]],
        status_code: int = 200,
    ) -> None:
        self.status_code = status_code
        self.background = None
        self._body = body
        self._on_end = on_end
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((pump, gone), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for task in (pump, gone):
                task.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            await self._on_end()

    async def _pump(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for data in self._body:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
