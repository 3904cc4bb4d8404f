"""The members of the pool: what they report, and the orders they are given.

Kept in memory for the request path; what must survive a restart goes to the store behind it.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llmster_control.protocol import Liveness, NodeView
from llmster_control.registry.liveness import judge
from llmster_control.routing.snapshot import Candidate, Snapshot
from llmster_control.store.store import KnownNode
from llmster_control.store.writer import StoreWriter
from llmster_daemon.errors import BadRequest, NotFound, Unavailable
from llmster_daemon.pool_link import result_error
from llmster_daemon.protocol.base import Role
from llmster_daemon.protocol.node import (
    Command,
    CommandName,
    CommandResult,
    InstanceInfo,
    NodeHello,
    NodeReport,
    Peer,
    PoolFeed,
    RouteRecord,
)

log = logging.getLogger(__name__)

COMMAND_LIMIT_S = 630.0
"""Longer than a node's own limit for a load, so that the node's reason is the one seen."""
ROUTES_IN_MEMORY = 500
SAVE_SEEN_S = 30.0
"""How often 'last seen' is written while nothing else changes."""
COMING_UP = ("starting", "loading", "backoff")

Send = Callable[[PoolFeed | Command], Awaitable[None]]


@dataclass(eq=False)
class Member:
    """A node that has joined, connected now or not."""

    known: KnownNode
    reported_s: float
    """Monotonic; minus infinity for one that has not reported since this process began."""
    report: NodeReport | None = None
    send: Send | None = None
    """None while it is not connected."""
    pending: dict[str, asyncio.Future[CommandResult]] = field(default_factory=dict)
    saved_s: float = 0.0

    def liveness(self, now_s: float) -> Liveness:
        """Its liveness now."""
        return judge(now_s - self.reported_s, self.send is not None)


class Members:
    """All members. One event loop; nothing here blocks."""

    def __init__(
        self,
        writer: StoreWriter,
        gateway_url: str,
        known: Iterable[KnownNode] = (),
        routes: Iterable[RouteRecord] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gateway_url = gateway_url
        self.routes: deque[RouteRecord] = deque(routes, maxlen=ROUTES_IN_MEMORY)
        """Oldest first."""
        self._writer = writer
        self._clock = clock
        self._members = {node.id: Member(node, float("-inf")) for node in known}
        self._changed = asyncio.Event()
        self._snapshot: Snapshot | None = None
        self._snapshot_until_s = 0.0
        self._fed: dict[str, PoolFeed] = {}

    # Nodes come, report and go

    async def join(self, hello: NodeHello, send: Send) -> Member:
        """A node has connected; what it had before is replaced."""
        member = self._members.get(hello.node_id)
        joined_at = member.known.joined_at if member else time.time()
        known = KnownNode(
            id=hello.node_id,
            name=self._free_name(hello),
            role=hello.role,
            draining=member.known.draining if member else False,
            url=hello.url,
            home=hello.home,
            version=hello.version,
            inventory=hello.inventory,
            joined_at=joined_at,
            last_seen_at=time.time(),
        )
        if member is None:
            member = Member(known, float("-inf"))
            self._members[hello.node_id] = member
        self._drop_pending(member)
        member.known, member.send = known, send
        # What an earlier connection was told, this one was not.
        self._fed.pop(hello.node_id, None)
        self._writer.put_node(known)
        log.info("node %s joined (%s)", known.name, known.url)
        await self._feed(member)
        return member

    async def take_report(self, member: Member, report: NodeReport) -> None:
        """A node has reported."""
        before = member.report
        member.report = report
        member.reported_s = self._clock()
        if report.routes:
            self.add_routes(member.known.id, report.routes)
        self._refresh(member, report)
        if before is None or _essence(before.instances) != _essence(report.instances):
            self._writer.put_instances(member.known.id, report.instances)
        self._snapshot = None
        self._changed.set()
        self._changed = asyncio.Event()
        await self.feed_all()

    def leave(self, member: Member, send: Send) -> None:
        """A connection has ended. Ignored if the node has connected again meanwhile."""
        if member.send is send:
            member.send = None
            self._snapshot = None
            self._drop_pending(member)
            log.info("node %s: connection ended", member.known.name)

    def take_result(self, member: Member, result: CommandResult) -> None:
        """A command has been carried out."""
        future = member.pending.pop(result.id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def add_routes(self, node_id: str | None, routes: Iterable[RouteRecord]) -> None:
        """Remember how requests were served; of one that was tried again, the last attempt."""
        news = []
        for route in routes:
            told = next((r for r in self.routes if r.request_id == route.request_id), None)
            if told is not None:
                # The node that failed may report later than the one that served.
                if told.attempts > route.attempts:
                    continue
                self.routes.remove(told)
            self.routes.append(route)
            news.append((node_id, route))
        self._writer.put_routes(news)

    # What others ask

    async def command(self, member: Member, name: CommandName, **args: Any) -> dict[str, Any]:
        """Give an order and wait for its result. Raises what the node answers, or Unavailable."""
        send = member.send
        if send is None:
            raise Unavailable(
                "node_not_connected",
                f"the node {member.known.name} is not connected",
                "`llmster nodes` shows its state; start it with `llmster daemon`",
            )
        command = Command(id=uuid.uuid4().hex, name=name, args=args)
        future: asyncio.Future[CommandResult] = asyncio.get_running_loop().create_future()
        member.pending[command.id] = future
        try:
            await send(command)
            async with asyncio.timeout(COMMAND_LIMIT_S):
                result = await future
        except TimeoutError:
            raise Unavailable(
                "node_timeout", f"{member.known.name} did not carry out '{name}' in time", ""
            ) from None
        finally:
            member.pending.pop(command.id, None)
        error = result_error(result)
        if error is not None:
            raise error
        return result.value or {}

    def find(self, name: str) -> Member:
        """A node by name or id. Raises NotFound."""
        for member in self._members.values():
            if name in (member.known.id, member.known.name):
                return member
        names = ", ".join(sorted(m.known.name for m in self._members.values())) or "none"
        raise NotFound(
            "node_not_found", f"there is no node '{name}' (nodes: {names})", "run `llmster nodes`"
        )

    def all(self) -> list[Member]:
        """All members, by name."""
        return sorted(self._members.values(), key=lambda m: (m.known.name, m.known.id))

    def online(self) -> list[Member]:
        """Those that can be given orders."""
        now = self._clock()
        return [m for m in self.all() if m.send and m.report and m.liveness(now) == "online"]

    def set_draining(self, member: Member, draining: bool) -> None:
        """Give a node no new requests, or give it some again."""
        member.known = member.known.model_copy(update={"draining": draining})
        self._writer.put_node(member.known)
        self._snapshot = None

    def set_role(self, member: Member, role: Role) -> None:
        """Note a role that the node has taken, before its next report says so."""
        member.known = member.known.model_copy(update={"role": role})
        self._writer.put_node(member.known)
        self._snapshot = None

    def views(self) -> tuple[NodeView, ...]:
        """All nodes, as people see them."""
        now = self._clock()
        return tuple(self._view(member, now) for member in self.all())

    def view(self, member: Member) -> NodeView:
        """One node, as people see it."""
        return self._view(member, self._clock())

    def snapshot(self) -> Snapshot:
        """What routing decides from. Rebuilt after a change, and once a second for liveness."""
        now = self._clock()
        if self._snapshot is None or now >= self._snapshot_until_s:
            self._snapshot = self._build_snapshot(now)
            self._snapshot_until_s = now + 1.0
        return self._snapshot

    async def change(self) -> None:
        """Until the next report."""
        await self._changed.wait()

    def models(self) -> tuple[str, ...]:
        """The models that can be asked for."""
        return tuple(sorted(self.snapshot().candidates))

    def on_disk(self, model: str) -> bool:
        """True if some node that is here has the model in its store."""
        wanted = model.lower()
        return any(
            wanted == info.key for m in self.online() if m.report for info in m.report.models
        )

    # Inside

    def _build_snapshot(self, now: float) -> Snapshot:
        candidates: dict[str, list[Candidate]] = {}
        reviving = set()
        for member in self._members.values():
            liveness = member.liveness(now)
            if member.report is None or liveness == "lost":
                continue
            for info in member.report.instances:
                if info.state in COMING_UP:
                    reviving.add(info.model)
                if info.state != "ready":
                    continue
                candidate = Candidate(
                    node_id=member.known.id,
                    node=member.known.name,
                    url=member.known.url,
                    instance=info.id,
                    digest=info.digest,
                    role=member.known.role,
                    liveness=liveness,
                    draining=member.known.draining,
                    slots=max(1, info.slots),
                    busy=info.active + info.waiting,
                )
                candidates.setdefault(info.model, []).append(candidate)
                if info.id != info.model:
                    candidates.setdefault(info.id, []).append(candidate)
        return Snapshot({k: tuple(v) for k, v in candidates.items()}, frozenset(reviving))

    def _view(self, member: Member, now: float) -> NodeView:
        known, report = member.known, member.report
        silent_s = now - member.reported_s
        if member.reported_s == float("-inf"):
            silent_s = max(0.0, time.time() - known.last_seen_at)
        return NodeView(
            id=known.id,
            name=known.name,
            role=known.role,
            liveness=member.liveness(now),
            draining=known.draining,
            url=known.url,
            home=known.home,
            version=known.version,
            inventory=known.inventory,
            telemetry=report.telemetry if report else None,
            last_report_s=silent_s,
            models=report.models if report else (),
            instances=report.instances if report else (),
        )

    def _refresh(self, member: Member, report: NodeReport) -> None:
        """Keep what is known of the node up to date, and save it now and then."""
        now = self._clock()
        if report.role != member.known.role or now - member.saved_s > SAVE_SEEN_S:
            update = {"role": report.role, "last_seen_at": time.time()}
            member.known = member.known.model_copy(update=update)
            member.saved_s = now
            self._writer.put_node(member.known)

    def _free_name(self, hello: NodeHello) -> str:
        if not hello.name or len(hello.name) > 64 or not hello.name.isprintable():
            raise BadRequest("bad_name", "a node's name has 1 to 64 printable characters", "")
        taken = {m.known.name for m in self._members.values() if m.known.id != hello.node_id}
        names = (hello.name, f"{hello.name}-{hello.node_id[:6]}", f"{hello.name}-{hello.node_id}")
        return next((name for name in names if name not in taken), hello.node_id)

    def _drop_pending(self, member: Member) -> None:
        for command_id, future in member.pending.items():
            if not future.done():
                error = Unavailable(
                    "node_lost",
                    f"{member.known.name} went away before it had carried out the command",
                    "run `llmster nodes`, then try again",
                )
                body = {**error.body(), "status": error.status}
                future.set_result(CommandResult(id=command_id, error=body))
        member.pending.clear()

    async def feed_all(self) -> None:
        """Tell every connected node what has changed for it."""
        for member in list(self._members.values()):
            await self._feed(member)

    async def _feed(self, member: Member) -> None:
        send = member.send
        if send is None:
            self._fed.pop(member.known.id, None)
            return
        peers = tuple(
            Peer(node_id=m.known.id, name=m.known.name, url=m.known.url)
            for m in self._members.values()
            if m is not member and m.send is not None
        )
        feed = PoolFeed(
            gateway_url=self.gateway_url,
            your_name=member.known.name,
            draining=member.known.draining,
            peers=peers,
            models=self.models(),
        )
        if self._fed.get(member.known.id) != feed:
            self._fed[member.known.id] = feed
            await send(feed)


def _essence(instances: tuple[InstanceInfo, ...]) -> tuple[tuple[object, ...], ...]:
    """What of the instances is worth a write: not the counters that change every second."""
    return tuple((i.id, i.state, i.pid, i.restarts, i.reason) for i in instances)
