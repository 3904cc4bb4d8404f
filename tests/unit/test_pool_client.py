"""The console's client: what it asks, and how every failure becomes one kind of error."""

import asyncio
import json
import socket
from collections.abc import Callable

import httpx
import pytest

from llmster_control.protocol import (
    ImportRequest,
    LoadRequest,
    NodePatch,
    NodeView,
    PoolState,
    UnloadRequest,
    UsageView,
)
from llmster_daemon.errors import Conflict, LlmsterError, Unavailable
from llmster_daemon.protocol.node import Inventory, RouteRecord
from llmster_tui.client import LOAD_TIMEOUT_S, PoolClient

NODE = NodeView(
    id="n1",
    name="ws/1",
    role="mixed",
    liveness="online",
    url="http://ws-1",
    home="/h",
    version="0.1.0",
    last_report_s=0.5,
    inventory=Inventory(hostname="ws-1", cpu_name="CPU", cpu_cores=8, mem_total_bytes=1),
)
STATE = PoolState(at=1.0, version="0.1.0", gateway_url="http://gw", nodes=(NODE,))
ROUTE = RouteRecord(request_id="r", at=1.0, model="m", kind="colocated")
USAGE = UsageView(
    model="m",
    node="n",
    requests=3,
    failed=1,
    prompt_tokens=1,
    completion_tokens=1,
    kv_bytes=0,
)


def client(handler: Callable[[httpx.Request], httpx.Response]) -> PoolClient:
    return PoolClient("http://pool:8080/", httpx.MockTransport(handler))


class Recorder:
    """Answers everything with one body and keeps what it was asked."""

    def __init__(self, body: str, status: int = 200) -> None:
        self._body = body
        self._status = status
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self._status, text=self._body)


async def test_it_reads_the_state_the_routes_and_the_usage() -> None:
    async with client(Recorder(STATE.model_dump_json())) as pool:
        assert await pool.state() == STATE
    routes = Recorder(f"[{ROUTE.model_dump_json()}]")
    async with client(routes) as pool:
        assert await pool.routes(7) == [ROUTE]
    assert str(routes.requests[0].url) == "http://pool:8080/pool/v1/routes?limit=7"
    async with client(Recorder(f"[{USAGE.model_dump_json()}]")) as pool:
        assert await pool.usage() == [USAGE]


async def test_orders_go_to_their_own_address_and_may_take_minutes() -> None:
    recorder = Recorder('{"id": "i-1"}')
    async with client(recorder) as pool:
        assert await pool.load(LoadRequest(model="m", node="ws-1")) == {"id": "i-1"}
        await pool.unload(UnloadRequest(target="i-1"))
        await pool.import_file(ImportRequest(path="/m.gguf"))
    load, unload, import_ = recorder.requests
    assert [request.method for request in recorder.requests] == ["POST"] * 3
    assert load.url.path == "/pool/v1/load"
    assert json.loads(load.content)["node"] == "ws-1"
    assert load.extensions["timeout"]["read"] == LOAD_TIMEOUT_S
    assert json.loads(unload.content) == {"target": "i-1"}
    assert import_.url.path == "/pool/v1/import"


async def test_a_patch_carries_only_what_changes() -> None:
    recorder = Recorder(NODE.model_dump_json())
    async with client(recorder) as pool:
        assert await pool.patch_node("ws/1", NodePatch(draining=False)) == NODE
    (request,) = recorder.requests
    assert (request.method, request.url.raw_path) == ("PATCH", b"/pool/v1/nodes/ws%2F1")
    assert json.loads(request.content) == {"draining": False}


async def test_a_refused_connection_says_how_to_start_the_pool() -> None:
    with socket.socket() as taken:
        # Bound but not listening: nobody else can take the port meanwhile, and it refuses.
        taken.bind(("127.0.0.1", 0))
        async with PoolClient(f"http://127.0.0.1:{taken.getsockname()[1]}") as pool:
            with pytest.raises(Unavailable) as caught:
                await pool.state()
    assert caught.value.code == "control_unreachable"
    assert caught.value.hint == "run `llmster up`"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (httpx.ReadError("reset"), "control_unreachable"),
        (httpx.RemoteProtocolError("closed"), "control_unreachable"),
        (httpx.ConnectTimeout("no route"), "control_unreachable"),
        (httpx.ReadTimeout("slow"), "control_timeout"),
        (httpx.UnsupportedProtocol("no scheme"), "bad_control_url"),
    ],
)
async def test_a_broken_transport_becomes_an_error_of_ours(
    error: httpx.HTTPError, code: str
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    async with client(fail) as pool:
        with pytest.raises(LlmsterError) as caught:
            await pool.state()
    assert (caught.value.code, bool(caught.value.hint)) == (code, True)


async def test_an_envelope_comes_back_as_the_error_that_was_raised() -> None:
    said = Conflict("already_loaded", "m is loaded", "run `llmster ps`")
    recorder = Recorder(json.dumps(said.envelope()), said.status)
    async with client(recorder) as pool:
        with pytest.raises(LlmsterError) as caught:
            await pool.load(LoadRequest(model="m"))
    error = caught.value
    assert (error.code, error.message, error.hint) == (said.code, said.message, said.hint)
    assert error.status == 409


@pytest.mark.parametrize("body", ["<h1>Bad Gateway</h1>", '{"detail": "x"}', "[]", '{"error": 1}'])
async def test_an_error_without_an_envelope_names_its_status(body: str) -> None:
    async with client(Recorder(body, 502)) as pool:
        with pytest.raises(LlmsterError) as caught:
            await pool.state()
    assert (caught.value.code, caught.value.status) == ("unexpected_answer", 502)


@pytest.mark.parametrize("body", ["", "<html>", "{}", '{"at": "x"}'])
async def test_an_answer_of_another_version_is_an_error_of_ours(body: str) -> None:
    async with client(Recorder(body)) as pool:
        with pytest.raises(LlmsterError) as caught:
            await pool.state()
    assert caught.value.code == "bad_answer"


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = STATE.model_dump_json().encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with PoolClient(f"http://127.0.0.1:{port}") as pool:
            assert await pool.state() == STATE
