"""A node's (or control plane's) home directory: made, checked, locked, and remembered in."""

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import Conflict, HomeError
from .supervisor.process import write_atomically

MIN_FREE_BYTES = 1 << 20


def prepare(home: Path, *folders: str) -> None:
    """Create the home and its folders, private to the user, and write to it once.

    Raises HomeError when that can't be done.
    """
    try:
        for folder in (home, *(home / name for name in folders)):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = home / ".write-check"
        try:
            probe.write_bytes(b"x" * 4096)
        finally:
            probe.unlink(missing_ok=True)
        free = os.statvfs(home)
    except OSError as error:
        raise HomeError(
            "home_unwritable",
            f"can't use the home {home}: {error.strerror}",
            "free some space there, or choose another with `--home DIR`",
        ) from error
    if free.f_bavail * free.f_frsize < MIN_FREE_BYTES:
        raise HomeError(
            "disk_full",
            f"the home {home} has less than 1 MiB of room",
            "free some space there, or choose another with `--home DIR`",
        )


@contextlib.contextmanager
def locked(home: Path, what: str) -> Iterator[None]:
    """Hold a home for one process. Raises Conflict when another has it."""
    descriptor = os.open(home / f"{what}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                "home_in_use",
                f"another {what} runs in {home}",
                "stop it with `llmster down`, or choose another home with `--home DIR`",
            ) from None
        yield
    finally:
        os.close(descriptor)


def identity(home: Path) -> str:
    """The id of the node that lives here; made at the first call and kept."""
    path = home / "node.json"
    try:
        found = json.loads(path.read_text())["id"]
        if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{32}", found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a new or damaged file: the node gets a new identity
    made = uuid.uuid4().hex
    write_atomically(path, json.dumps({"id": made}))
    return made


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket. Raises Conflict (`port_in_use`) before anything else is started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named, and without it every token waits
    # for the client's delayed ACK of the one before: 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(512)
    except (OSError, OverflowError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise Conflict(
            "port_in_use",
            f"can't listen on {host}:{port}: {reason}",
            f"choose another port with `{option} N`; `ss -ltnp` shows who has it",
        ) from error
    return sock


def is_loopback(host: str) -> bool:
    """True for names and addresses that only this machine can reach."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, even one like 127.example.org, may lead anywhere


def require_loopback(host: str) -> None:
    """Refuse to open anything beyond this machine without tokens and TLS."""
    if not is_loopback(host):
        raise Conflict(
            "needs_tls",
            f"{host} can be reached from outside, which needs tokens and TLS;"
            " this version has neither",
            "use `--host 127.0.0.1`, and an SSH tunnel from other machines",
        )
