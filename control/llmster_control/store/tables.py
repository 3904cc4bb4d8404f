"""The tables. A change here needs a new file in `migrations/versions`; a test compares the two.

Columns mirror the wire types' fields, so their words and units are those of `RouteRecord`,
`InstanceInfo` and `KnownNode`. Times are Unix time in seconds.
"""

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Integer, MetaData, Text
from sqlmodel import Field, SQLModel

NO_NODE = ""
"""The `usage.node_id` of requests that no node took: a key can't be NULL."""


class Base(SQLModel):
    """The root of our tables, apart from any other SQLModel table in the process."""

    metadata: ClassVar[MetaData] = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class NodeRow(Base, table=True):
    """A node that has joined the pool. `inventory` is an `Inventory` as JSON."""

    __tablename__ = "node"

    id: str = Field(primary_key=True, max_length=255)
    name: str = Field(max_length=255)
    role: str = Field(max_length=32)
    draining: bool
    url: str = Field(sa_type=Text)
    home: str = Field(sa_type=Text)
    version: str = Field(max_length=255)
    inventory: dict[str, Any] = Field(sa_type=JSON)
    joined_at: float = Field(sa_type=Double)
    last_seen_at: float = Field(sa_type=Double)


class InstanceRow(Base, table=True):
    """An instance of a node, as last reported."""

    __tablename__ = "instance"

    node_id: str = Field(
        sa_column_args=(ForeignKey("node.id", ondelete="CASCADE"),),
        primary_key=True,
        max_length=255,
    )
    id: str = Field(primary_key=True, max_length=255)
    model: str = Field(max_length=255)
    digest: str = Field(max_length=255)
    state: str = Field(max_length=32)
    progress: float | None = Field(sa_type=Double)
    pid: int | None
    context_length: int
    slots: int
    active: int
    waiting: int
    kv_used_cells: int = Field(sa_type=BigInteger)
    restarts: int
    reason: str | None = Field(sa_type=Text)


class RouteRow(Base, table=True):
    """How one request was served. `node_id`: who reported it, under which usage counts it."""

    __tablename__ = "route"

    # SQLite numbers rows by itself only where the key's type is exactly INTEGER.
    id: int | None = Field(
        default=None,
        sa_column=Column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    )
    node_id: str | None = Field(max_length=255)
    request_id: str = Field(max_length=255, unique=True, index=True)
    at: float = Field(sa_type=Double, index=True)
    model: str = Field(max_length=255)
    kind: str = Field(max_length=32)
    prefill_node: str | None = Field(max_length=255)
    decode_node: str | None = Field(max_length=255)
    reason: str = Field(sa_type=Text)
    attempts: int
    prompt_tokens: int = Field(sa_type=BigInteger)
    completion_tokens: int = Field(sa_type=BigInteger)
    ttft_s: float | None = Field(sa_type=Double)
    tpot_s: float | None = Field(sa_type=Double)
    duration_s: float = Field(sa_type=Double)
    kv_bytes: int = Field(sa_type=BigInteger)
    handover_s: float | None = Field(sa_type=Double)
    status: str = Field(max_length=32)
    error_code: str | None = Field(max_length=255)


class UsageRow(Base, table=True):
    """What a model on a node has done since the pool began; outlives the node and its routes."""

    __tablename__ = "usage"

    model: str = Field(primary_key=True, max_length=255)
    node_id: str = Field(primary_key=True, max_length=255)
    requests: int = Field(default=0, sa_type=BigInteger)
    failed: int = Field(default=0, sa_type=BigInteger)
    prompt_tokens: int = Field(default=0, sa_type=BigInteger)
    completion_tokens: int = Field(default=0, sa_type=BigInteger)
    kv_bytes: int = Field(default=0, sa_type=BigInteger)
