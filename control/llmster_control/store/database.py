"""The database under the store: opening it, migrating it, and naming what goes wrong with it."""

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from llmster_daemon.errors import BadRequest, HomeError, LlmsterError, Unavailable
from llmster_daemon.models.files import home_error

from .migrations import REVISIONS
from .tables import Base

BUSY_TIMEOUT_S: Final = 5.0
"""How long a statement waits for another process's lock on a SQLite file."""

WRITES: Final = "llmster_writes"
"""Execution option of a connection whose transactions take SQLite's write lock at their start.

One that read first and wrote later would fail at once, whatever the timeout, after another wrote.
"""

FULL_BELOW_BYTES: Final = 64 << 10
"""With less free, an I/O error is put down to the full disk: SQLite can't always tell."""

_WAL_RETRY_S: Final = 0.01
_migrating: Final = threading.Lock()
"""Alembic keeps its context in a module: one migration at a time in a process."""

_READ_ONLY: Final = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
)
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@dataclass(frozen=True)
class Place:
    """Where a database is: its URL and, for a SQLite file, the file."""

    url: URL
    path: Path | None

    def __str__(self) -> str:
        return str(self.path or self.url.render_as_string(hide_password=True))


def place_of(url_or_path: str | Path) -> Place:
    """Where a URL (anything with `://`) or the path of a SQLite file points. Raises BadRequest."""
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        path = Path(url_or_path).absolute()
        return Place(URL.create("sqlite", database=str(path)), path)
    try:
        url = make_url(url_or_path)
    except ArgumentError as error:
        raise _bad_url(error) from error
    named = url.get_backend_name() == "sqlite" and url.database and "uri" not in url.query
    if not named or url.database == ":memory:":
        return Place(url, None)
    path = Path(str(url.database)).absolute()
    return Place(url.set(database=str(path)), path)


def open_engine(place: Place) -> Engine:
    """An engine on the database at `place`, created where missing and migrated.

    Blocks, for `BUSY_TIMEOUT_S` where another process writes. Raises BadRequest (`bad_store_url`),
    LlmsterError (`store_newer`) and what `database_errors` names.
    """
    if place.path:
        _create_file(place.path)
    try:
        engine = _engine(place)
    except (ArgumentError, ImportError) as error:
        raise _bad_url(error) from error
    try:
        with database_errors(place):
            if place.path:
                _set_wal(engine)
            # In a write transaction: it fails now on a file that can only be read, and of two
            # processes that open a new database the second finds it migrated.
            with engine.execution_options(**{WRITES: True}).begin() as connection:
                _migrate(connection, place)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def database_errors(place: Place) -> Iterator[None]:
    """Turns what the block's database calls raise into an LlmsterError, where a person can help.

    HomeError: `disk_full`, `home_read_only`, `home_unusable`, `store_corrupt`.
    Unavailable: `store_busy`, `store_unreachable`.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        named = _named(error, place)
        if named is None:
            raise
        raise named from error
    except ValidationError as error:
        raise _corrupt(place, "it holds values that llmster never writes") from error


def _engine(place: Place) -> Engine:
    # Parameters may name users' models: they stay out of error messages.
    options: dict[str, Any] = {"hide_parameters": True}
    is_sqlite = place.url.get_backend_name() == "sqlite"
    if is_sqlite:
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
        if place.path is None:
            # Every connection to a database in memory would open another, empty one.
            options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    else:
        options["pool_pre_ping"] = True
    engine = create_engine(place.url, **options)
    if is_sqlite:
        event.listen(engine, "connect", _on_connect)
        event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    # Python's sqlite3 would begin transactions too late (not for SELECT, not for CREATE TABLE).
    connection.isolation_level = None
    try:
        connection.execute("PRAGMA foreign_keys=ON")
        # Safe with WAL: a power cut can undo the last commits, never damage the file.
        connection.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        connection.close()
        raise


def _on_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_wal(engine: Engine) -> None:
    """Lets readers and a writer work at once. Kept in the file, so one connection sets it."""
    pooled = engine.raw_connection()
    try:
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                pooled.cursor().execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                # The switch of a new file does not wait for another's lock as statements do.
                if error.sqlite_errorcode & 0xFF not in _BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_WAL_RETRY_S)
    finally:
        pooled.close()


def _migrate(connection: Connection, place: Place) -> None:
    """Brings the tables up to date, in the connection's transaction."""
    inspector = inspect(connection)
    revision = None
    if inspector.has_table("alembic_version"):
        revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if revision == REVISIONS[-1]:
        return
    if revision is None and not Base.metadata.tables.keys().isdisjoint(inspector.get_table_names()):
        raise _corrupt(place, "it has tables of these names, but not from llmster")
    if revision is not None and revision not in REVISIONS:
        raise LlmsterError(
            "store_newer",
            f"'{place}' was written by a newer llmster (revision {revision};"
            f" this one knows {REVISIONS[-1]})",
            "upgrade llmster on this machine, or start it with another home",
        )
    # Imported here because it costs 0.1 s and most starts don't need it.
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    folder = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))
    with _migrating:
        command.upgrade(config, "head")


def _create_file(path: Path) -> None:
    """Creates the file and its folders for our user only; SQLite would let others read them.

    An existing file is not opened: closing it would drop the locks this process has on it.
    """
    try:
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            with suppress(FileExistsError):
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(path, flags, 0o600))
    except OSError as error:
        named = home_error(error, path.parent)
        if named.code == "disk_full":
            raise named from error
        raise _read_only(path, error.strerror) from error


def _named(error: DBAPIError | sqlite3.Error, place: Place) -> LlmsterError | None:
    """The error to raise in place of a driver's; None for one that is our own mistake.

    SQLAlchemy wraps most of sqlite3's errors, but not those of its `connect` event.
    """
    reason = error.orig if isinstance(error, DBAPIError) else error
    full_code = getattr(reason, "sqlite_errorcode", None)
    if full_code is None:
        if not isinstance(error, OperationalError | InterfaceError):
            return None
        return Unavailable(
            "store_unreachable",
            f"the database {place} does not answer: {reason}",
            "check that it runs and that the URL is right",
        )
    code = full_code & 0xFF
    if code == sqlite3.SQLITE_FULL or (
        code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _is_full(place)
    ):
        return HomeError(
            "disk_full",
            f"the disk of '{place}' is full",
            "free space on that disk; llmster goes on by itself if it runs",
        )
    if code in _READ_ONLY:
        return _read_only(place, reason)
    if code in _CORRUPT:
        return _corrupt(place, str(reason))
    if code in _BUSY:
        return Unavailable(
            "store_busy",
            f"another process has locked '{place}' for more than {BUSY_TIMEOUT_S:g} s",
            f"stop the other program that has it open; `fuser {place}` names it",
        )
    if code == sqlite3.SQLITE_IOERR:
        return HomeError(
            "home_unusable",
            f"'{place}' can't be used: {reason}",
            "check the disk, `dmesg` shows its errors",
        )
    return None


def _is_full(place: Place) -> bool:
    if place.path is None:
        return False
    with suppress(OSError):
        return shutil.disk_usage(place.path.parent).free < FULL_BELOW_BYTES
    return False


def _bad_url(error: Exception) -> BadRequest:
    return BadRequest(
        "bad_store_url",
        f"the database URL can't be used: {error}",
        "write it as SQLAlchemy does, such as sqlite:////var/lib/llmster/pool.db, and install the"
        " database's driver",
    )


def _read_only(place: Place | Path, reason: object) -> HomeError:
    return HomeError(
        "home_read_only",
        f"'{place}' can't be written: {reason}",
        "make the file and its folder writable for the user that runs llmster",
    )


def _corrupt(place: Place, reason: str) -> HomeError:
    hint = "restore it from a backup, or start again with an empty one"
    if place.path:
        hint += f": `mkdir {place}.bad && mv {place} {place}-wal {place}-shm {place}.bad`"
    return HomeError(
        "store_corrupt",
        f"'{place}' is not a sound llmster database: {reason}",
        hint + "; nodes join by themselves, usage starts at zero",
    )
