"""What the pool remembers over a restart, as blocking calls: run them in a thread."""

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, and_, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session
from sqlmodel import col

from llmster_control.protocol import UsageView
from llmster_daemon.protocol.base import Frozen, Role
from llmster_daemon.protocol.node import InstanceInfo, Inventory, RouteRecord

from .database import WRITES, Place, database_errors, open_engine, place_of
from .tables import NO_NODE, InstanceRow, NodeRow, RouteRow, UsageRow

KEEP_ROUTES: Final = 10_000
_IDS_PER_QUERY: Final = 500
"""Below every database's limit of bound values in one statement."""


class KnownNode(Frozen):
    """A node that has joined the pool, seen now or not. `*_at` are Unix times in seconds."""

    id: str
    name: str
    role: Role
    draining: bool = False
    url: str
    home: str
    version: str
    inventory: Inventory
    joined_at: float
    last_seen_at: float


class Store:
    """Nodes, instances, routes and usage in a database. Safe to use from several threads.

    Every method blocks for one short transaction, so call it in a thread. Each raises HomeError
    (`disk_full`, `home_read_only`, `home_unusable`, `store_corrupt`) or Unavailable (`store_busy`,
    `store_unreachable`); what it should have written is then not written at all.
    """

    def __init__(self, engine: Engine, place: Place) -> None:
        """For `open`, which migrates first."""
        self._engine = engine
        self._writer = engine.execution_options(**{WRITES: True})
        self._place = place
        self._closed = False
        # Threads queue here and not in SQLite, whose waiters sleep and poll.
        self._write_lock = threading.Lock()

    @classmethod
    def open(cls, url_or_path: str | Path) -> "Store":
        """The store in this database, created where missing and migrated.

        A path is a SQLite file (0600, missing folders 0700); text with `://` is a SQLAlchemy URL.
        Also raises LlmsterError (`store_newer`) and BadRequest (`bad_store_url`).
        """
        place = place_of(url_or_path)
        return cls(open_engine(place), place)

    def close(self) -> None:
        """Closes the database after the write in progress. Later calls raise RuntimeError."""
        with self._write_lock:
            self._closed = True
            self._engine.dispose()

    def known_nodes(self) -> list[KnownNode]:
        """Every node that has joined and was not forgotten, by name."""
        with self._reading() as session:
            rows = session.scalars(select(NodeRow).order_by(col(NodeRow.name), col(NodeRow.id)))
            return [KnownNode.model_validate(row, from_attributes=True) for row in rows]

    def save_node(self, node: KnownNode) -> None:
        """Adds the node, or replaces all that is known of it."""
        with self._writing() as session:
            session.merge(NodeRow(**node.model_dump(mode="json")))

    def forget_node(self, node_id: str) -> None:
        """Removes a node and its instances, if it is known. Its routes and usage stay."""
        with self._writing() as session:
            session.execute(delete(NodeRow).where(col(NodeRow.id) == node_id))

    def instances(self, node_id: str) -> list[InstanceInfo]:
        """The instances that the node last had, by id."""
        query = select(InstanceRow).where(col(InstanceRow.node_id) == node_id)
        with self._reading() as session:
            rows = session.scalars(query.order_by(col(InstanceRow.id)))
            return [InstanceInfo.model_validate(row, from_attributes=True) for row in rows]

    def save_instances(self, node_id: str, instances: Sequence[InstanceInfo]) -> None:
        """Replaces the node's instances; does nothing for a node that is not known."""
        with self._writing() as session:
            if session.get(NodeRow, node_id, with_for_update=True) is None:
                return
            session.execute(delete(InstanceRow).where(col(InstanceRow.node_id) == node_id))
            rows = {i.id: {"node_id": node_id, **i.model_dump(mode="json")} for i in instances}
            if rows:
                session.execute(insert(InstanceRow), list(rows.values()))

    def add_routes(self, routes: Sequence[tuple[str | None, RouteRecord]]) -> None:
        """Adds routes, each with the id of the node that reported it, and counts them in usage.

        A request that is there already is replaced, in the counts too: the last write wins. After
        `prune_routes` has removed a request, it would count again.
        """
        latest = {record.request_id: (node_id, record) for node_id, record in routes}
        if not latest:
            return
        with self._writing() as session:
            known = _known_routes(session, list(latest))
            counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
            added, changed = [], []
            for request_id, (node_id, record) in latest.items():
                values = {"node_id": node_id, **record.model_dump(mode="json")}
                counts[record.model, node_id or NO_NODE].update(_counts(record))
                if row := known.get(request_id):
                    counts[row.model, row.node_id or NO_NODE].subtract(_counts(row))
                    changed.append({"id": row.id, **values})
                else:
                    added.append(values)
            if added:
                session.execute(insert(RouteRow), added)
            if changed:
                session.execute(update(RouteRow), changed)
            # Sorted, so that two processes can't each hold a row that the other wants.
            for (model, node_id), delta in sorted(counts.items()):
                _add_usage(session, model, node_id, delta)

    def routes(self, limit: int = 50, request_id: str | None = None) -> list[RouteRecord]:
        """The `limit` newest routes, or the one of a request; newest first."""
        query = select(RouteRow).order_by(col(RouteRow.at).desc(), col(RouteRow.id).desc())
        if request_id is not None:
            query = query.where(col(RouteRow.request_id) == request_id)
        with self._reading() as session:
            rows = session.scalars(query.limit(max(0, limit)))
            return [RouteRecord.model_validate(row, from_attributes=True) for row in rows]

    def prune_routes(self, keep: int = KEEP_ROUTES) -> int:
        """Removes all but the `keep` newest routes; how many it removed. Usage stays."""
        at, row_id = col(RouteRow.at), col(RouteRow.id)
        newest_gone = select(at, row_id).order_by(at.desc(), row_id.desc()).offset(keep).limit(1)
        with self._writing() as session:
            found = session.execute(newest_gone).one_or_none()
            if found is None:
                return 0
            older = or_(at < found[0], and_(at == found[0], row_id <= found[1]))
            count = session.scalar(select(func.count()).select_from(RouteRow).where(older))
            session.execute(delete(RouteRow).where(older))
            return count or 0

    def usage(self) -> list[UsageView]:
        """What each model has done on each node, by model, then node.

        `node` is the node's name, or its id once it is forgotten; empty for no node.
        """
        node = func.coalesce(col(NodeRow.name), col(UsageRow.node_id))
        query = (
            select(UsageRow, node)
            .outerjoin(NodeRow, col(NodeRow.id) == col(UsageRow.node_id))
            # What was counted here first and then reported by another node leaves zeros.
            .where(col(UsageRow.requests) > 0)
            .order_by(col(UsageRow.model), node, col(UsageRow.node_id))
        )
        with self._reading() as session:
            return [
                UsageView(node=name, **row.model_dump(exclude={"node_id"}))
                for row, name in session.execute(query)
            ]

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        self._check_open()
        with database_errors(self._place), Session(self._engine) as session:
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._write_lock:
            self._check_open()
            with database_errors(self._place), Session(self._writer) as session, session.begin():
                yield session

    def _check_open(self) -> None:
        if self._closed:
            # The engine would connect again, and nobody would close that.
            raise RuntimeError("the store is closed")


def _known_routes(session: Session, request_ids: list[str]) -> dict[str, RouteRow]:
    """The routes among these that are stored, by request."""
    known: dict[str, RouteRow] = {}
    ids = iter(request_ids)
    while chunk := list(islice(ids, _IDS_PER_QUERY)):
        rows = session.scalars(select(RouteRow).where(col(RouteRow.request_id).in_(chunk)))
        known |= {row.request_id: row for row in rows}
    return known


def _counts(route: RouteRecord | RouteRow) -> Mapping[str, int]:
    """What one request adds to the columns of `usage`."""
    return {
        "requests": 1,
        "failed": int(route.status == "failed"),
        "prompt_tokens": route.prompt_tokens,
        "completion_tokens": route.completion_tokens,
        "kv_bytes": route.kv_bytes,
    }


def _add_usage(session: Session, model: str, node_id: str, delta: Mapping[str, int]) -> None:
    row: Any = session.get(UsageRow, (model, node_id), with_for_update=True)
    if row is None:
        row = UsageRow(model=model, node_id=node_id)
        session.add(row)
    for column, count in delta.items():
        setattr(row, column, getattr(row, column) + count)
