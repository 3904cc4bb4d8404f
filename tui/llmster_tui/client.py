"""The console's way to the control plane: `/pool/v1` over HTTP."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from llmster_control.protocol import (
    ImportRequest,
    LoadRequest,
    NodePatch,
    NodeView,
    PoolState,
    UnloadRequest,
    UsageView,
)
from llmster_daemon.errors import LlmsterError, Unavailable
from llmster_daemon.protocol.base import Frozen
from llmster_daemon.protocol.node import RouteRecord

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
UNLOAD_TIMEOUT_S = 60.0
"""An engine may finish what it is working on first."""
LOAD_TIMEOUT_S = 600.0
"""A large model is read from a slow disk."""
IMPORT_TIMEOUT_S = 600.0
"""A large file is copied and hashed."""

_Answer = TypeVar("_Answer")
_ROUTES = TypeAdapter(list[RouteRecord])
_USAGE = TypeAdapter(list[UsageView])
_OBJECT = TypeAdapter(dict[str, Any])


class PoolClient:
    """Asks one control plane. Every method raises `LlmsterError` and nothing else.

    `transport` replaces the network in tests.
    """

    def __init__(self, url: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        # A proxy from the environment would take loopback and pool addresses out of the pool.
        self._http = httpx.AsyncClient(base_url=self.url, transport=transport, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def state(self) -> PoolState:
        """The whole pool at this moment."""
        return await self._ask("GET", "state", PoolState.model_validate_json)

    async def routes(self, limit: int = 50) -> list[RouteRecord]:
        """The last requests, newest first."""
        return await self._ask("GET", f"routes?limit={limit}", _ROUTES.validate_json)

    async def usage(self) -> list[UsageView]:
        """What each model on each node has done since the pool began."""
        return await self._ask("GET", "usage", _USAGE.validate_json)

    async def load(self, request: LoadRequest) -> dict[str, Any]:
        """Loads a model and returns its instance. Takes minutes for a large one."""
        return await self._order("load", request, LOAD_TIMEOUT_S)

    async def unload(self, request: UnloadRequest) -> dict[str, Any]:
        """Unloads an instance, or every instance of a model."""
        return await self._order("unload", request, UNLOAD_TIMEOUT_S)

    async def import_file(self, request: ImportRequest) -> dict[str, Any]:
        """Takes a GGUF file into the store of the nodes that can read it."""
        return await self._order("import", request, IMPORT_TIMEOUT_S)

    async def patch_node(self, name: str, patch: NodePatch) -> NodeView:
        """Changes a node and returns it as it is now."""
        path = f"nodes/{quote(name, safe='')}"
        return await self._ask("PATCH", path, NodeView.model_validate_json, patch)

    async def _order(self, verb: str, request: Frozen, timeout_s: float) -> dict[str, Any]:
        return await self._ask("POST", verb, _OBJECT.validate_json, request, timeout_s)

    async def _ask(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], _Answer],
        body: Frozen | None = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> _Answer:
        try:
            answer = await self._http.request(
                method,
                f"/pool/v1/{path}",
                json=None if body is None else body.model_dump(mode="json", exclude_none=True),
                timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            )
        except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise self._unreachable() from error
        except httpx.TimeoutException as error:
            raise Unavailable(
                "control_timeout",
                f"the control plane at {self.url} did not answer `{path}` in {timeout_s:.0f} s",
                "ask again; what was asked may still be under way",
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LlmsterError(
                "bad_control_url",
                f"'{self.url}' can't be asked: {error}",
                "give the control plane's address as http://HOST:PORT",
                status=400,
            ) from error
        if not answer.is_success:
            raise _error_of(answer)
        try:
            return read(answer.content)
        except ValidationError as error:
            raise LlmsterError(
                "bad_answer",
                f"the control plane's answer to `{path}` can't be read",
                "run the same version of llmster here and on the control plane",
                status=502,
            ) from error

    def _unreachable(self) -> Unavailable:
        return Unavailable(
            "control_unreachable",
            f"no control plane answers at {self.url}",
            "run `llmster up`",
        )


def _error_of(answer: httpx.Response) -> LlmsterError:
    """The error in the envelope; a made one where something else answered (a proxy, a 404)."""
    try:
        body = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        body = None
    if isinstance(body, dict):
        return LlmsterError.from_body(body, answer.status_code)
    return LlmsterError(
        "unexpected_answer",
        f"{answer.request.url} answered {answer.status_code} without saying why",
        "check that this address is a llmster control plane",
        status=answer.status_code,
    )
