"""`/pool/v1`: the pool's state, orders to its nodes, and the nodes' own connection."""

import asyncio
import contextlib
import time
from typing import Any

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from pydantic import TypeAdapter, ValidationError

from llmster_control import __version__
from llmster_control.protocol import (
    ImportRequest,
    LoadRequest,
    NodePatch,
    NodeView,
    PoolState,
    UnloadRequest,
    UsageView,
)
from llmster_control.registry.members import Member, Members
from llmster_control.store.store import Store
from llmster_control.store.writer import StoreWriter
from llmster_daemon.api.http import parse, read_body
from llmster_daemon.errors import BadRequest, LlmsterError, NotFound, Unavailable, unknown_model
from llmster_daemon.protocol.node import (
    PROTOCOL_VERSION,
    Command,
    CommandResult,
    NodeHello,
    NodeReport,
    PoolFeed,
    RouteRecord,
    Upward,
)

HELLO_LIMIT_S = 10.0
MAX_ROUTES = 500
_upward: TypeAdapter[Upward] = TypeAdapter(Upward)


def router(members: Members, store: Store, writer: StoreWriter) -> APIRouter:
    """The routes below `/pool/v1`."""
    routes = APIRouter(prefix="/pool/v1")

    @routes.get("/state")
    async def state() -> PoolState:
        return PoolState(
            at=time.time(),
            version=__version__,
            gateway_url=members.gateway_url,
            nodes=members.views(),
            routes=tuple(list(members.routes)[:-51:-1]),
        )

    @routes.get("/routes")
    async def recent_routes(limit: int = 20, request_id: str | None = None) -> list[RouteRecord]:
        if not 1 <= limit <= MAX_ROUTES:
            raise BadRequest("invalid_value", f"limit: 1 to {MAX_ROUTES}", "", param="limit")
        if request_id is None:
            return list(members.routes)[: -limit - 1 : -1]
        found = [route for route in members.routes if route.request_id == request_id]
        found = found or await asyncio.to_thread(store.routes, 1, request_id)
        if not found:
            raise NotFound(
                "route_not_found", f"no request '{request_id}' is known", "run `llmster routes`"
            )
        return found

    @routes.get("/usage")
    async def usage() -> list[UsageView]:
        await writer.flush()
        return await asyncio.to_thread(store.usage)

    @routes.post("/load")
    async def load(request: Request) -> dict[str, Any]:
        body = parse(LoadRequest, await read_body(request))
        member = members.find(body.node) if body.node else _place(members, body.model)
        result = await members.command(
            member, "load", model=body.model, options=body.options.model_dump()
        )
        return {"node": member.known.name, **result}

    @routes.post("/unload")
    async def unload(request: Request) -> dict[str, Any]:
        body = parse(UnloadRequest, await read_body(request))
        chosen = [members.find(body.node)] if body.node else _holders(members, body.target)
        if not chosen:
            raise NotFound(
                "instance_not_found",
                f"nothing called '{body.target}' is loaded in the pool",
                "run `llmster ps` to see what is loaded",
            )
        unloaded = []
        for member in chosen:
            result = await members.command(member, "unload", target=body.target)
            unloaded += [{"node": member.known.name, "instance": i} for i in result["unloaded"]]
        return {"unloaded": unloaded}

    @routes.post("/import")
    async def import_model(request: Request) -> dict[str, Any]:
        body = parse(ImportRequest, await read_body(request))
        chosen = [members.find(body.node)] if body.node else _on_machine(members, body.hostname)
        imported = []
        for member in chosen:
            result = await members.command(member, "import", path=body.path)
            imported.append({"node": member.known.name, "model": result["model"]})
        return {"imported": imported}

    @routes.patch("/nodes/{name}")
    async def patch_node(name: str, request: Request) -> NodeView:
        body = parse(NodePatch, await read_body(request))
        member = members.find(name)
        if body.role is not None and body.role != member.known.role:
            await members.command(member, "role", role=body.role)
            members.set_role(member, body.role)
        if body.draining is not None:
            members.set_draining(member, body.draining)
            await members.feed_all()
        return members.view(member)

    @routes.websocket("/connect")
    async def connect(socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await _serve_node(members, socket)

    return routes


async def _serve_node(members: Members, socket: WebSocket) -> None:
    lock = asyncio.Lock()

    async def send(message: PoolFeed | Command) -> None:
        # A node that is gone shows up in the receiving loop below.
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            async with lock:
                await socket.send_text(message.model_dump_json())

    try:
        async with asyncio.timeout(HELLO_LIMIT_S):
            hello = _upward.validate_json(await _receive(socket))
        if not isinstance(hello, NodeHello):
            raise BadRequest("no_hello", "the first message must be a hello", "")
        if hello.protocol != PROTOCOL_VERSION:
            raise BadRequest(
                "other_version",
                f"the node speaks protocol {hello.protocol}, this is {PROTOCOL_VERSION}",
                "install the same version of llmster on both",
            )
        member = await members.join(hello, send)
    except (ValidationError, LlmsterError, TimeoutError) as error:
        reason = error.message if isinstance(error, LlmsterError) else type(error).__name__
        await socket.close(4400, reason[:120])
        return
    try:
        while True:
            message = _upward.validate_json(await _receive(socket))
            # A connection that was replaced may live on: a copied home gives two nodes one id.
            if isinstance(message, NodeReport) and member.send is send:
                await members.take_report(member, message)
            elif isinstance(message, CommandResult):
                members.take_result(member, message)
    except ValidationError:
        await socket.close(4400, "a message that makes no sense")
    finally:
        members.leave(member, send)


async def _receive(socket: WebSocket) -> str | bytes:
    """The next message, text or not. Raises WebSocketDisconnect."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message["code"], message.get("reason"))
    text: str | None = message.get("text")
    data: bytes = message.get("bytes") or b""
    return data if text is None else text


def _place(members: Members, model: str) -> Member:
    """The node on which a model is loaded where the caller names none."""
    wanted = model.lower()
    online = members.online()
    if not online:
        raise Unavailable("pool_empty", "no node is connected to the pool", "run `llmster nodes`")
    able = [m for m in online if m.report and any(info.key == wanted for info in m.report.models)]
    able = [m for m in able if not m.known.draining] or able
    if not able:
        raise unknown_model(model, list(members.models()))
    return min(able, key=lambda m: (len(m.report.instances) if m.report else 0, m.known.name))


def _holders(members: Members, target: str) -> list[Member]:
    wanted = target.lower()
    return [
        m
        for m in members.online()
        if m.report and any(wanted in (i.id, i.model) for i in m.report.instances)
    ]


def _on_machine(members: Members, hostname: str | None) -> list[Member]:
    online = members.online()
    chosen = [m for m in online if hostname in (None, m.known.inventory.hostname)]
    if not chosen:
        raise Unavailable(
            "no_local_node",
            "no node of the pool runs on this machine, so none can read the file",
            "start one with `llmster daemon`, or name a node with `--node NAME`",
        )
    return chosen
