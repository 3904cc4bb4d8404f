"""Files on the home's disk: names, hashing, atomic copies, and errors that name the problem."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

from ..errors import BadRequest, HomeError, NotFound

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

Stamp = tuple[int, int]
"""Size in bytes and mtime in ns: while both stay, the content is taken to be the same."""

SUFFIX: Final = ".gguf"
CHUNK_BYTES: Final = 4 << 20
MAX_NAME_BYTES: Final = 200
PARTIAL_PREFIX: Final = ".import-"
PARTIAL_SUFFIX: Final = ".partial"
PARTIAL_GRACE_S: Final = 60.0
"""Younger partial files are left alone: their writer may not have locked them yet."""

_QUANTISATION: Final = re.compile(
    r"[._-](?:ud-|i1-)?"
    r"(?:i?q\d(?:_\d|_k|_[a-z]{1,3})*|tq\d_\d|b?f16|f32|f64|fp(?:4|8|16|32)|mxfp4(?:_moe)?|nvfp4)$",
    re.IGNORECASE,
)
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def is_safe_name(name: str) -> bool:
    """True for a name that can be a file or folder of the store: visible, UTF-8, no path in it."""
    # Category C: control, format (such as text direction), surrogate and unassigned characters.
    return (
        not name.startswith(".")
        and ".." not in name
        and not any(char in "/\\" or unicodedata.category(char)[0] == "C" for char in name)
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
    )


def base_key(file_name: str) -> str:
    """The key of a model file: lower-case, without `.gguf` and the quantisation at its end."""
    stem = file_name.lower().removesuffix(SUFFIX)
    return _QUANTISATION.sub("", stem) or stem


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a regular file, or None."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if path.is_file() else None


def check_source(path: Path) -> int:
    """The size in bytes of a file to import. Raises NotFound or BadRequest."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise NotFound("file_not_found", f"there is no file '{path}'", "check the path") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not path.is_file():
        what = "folder" if path.is_dir() else "device or pipe"
        raise BadRequest("not_a_file", f"'{path}' is a {what}", "name the .gguf file itself")
    if not os.access(path, os.R_OK):
        raise _unreadable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return size


def _unreadable(path: Path, error: Exception) -> BadRequest:
    reason = getattr(error, "strerror", None) or error
    return BadRequest(
        "file_unreadable", f"'{path}' can't be read: {reason}", "check the path and its permissions"
    )


def file_sha256(path: Path, on_progress: Progress | None = None) -> str:
    """The sha256 of a file, in hex. Blocks, about a second per GB. Raises BadRequest."""
    digest = hashlib.sha256()
    with _opened(path) as fd:
        for chunk in _chunks(path, fd, on_progress):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _chunks(path: Path, fd: int, on_progress: Progress | None) -> Iterator[memoryview]:
    """The content of an open file; each chunk is overwritten by the next."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    done, total = 0, os.fstat(fd).st_size
    while True:
        try:
            count = os.preadv(fd, [buffer], done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not count:
            return
        yield buffer[:count]
        done += count
        if on_progress:
            on_progress(done, max(done, total))


def home_error(error: OSError, folder: Path, needed_bytes: int | None = None) -> HomeError:
    """The error to raise for a failure to write below `folder`."""
    if error.errno in _NO_SPACE:
        needed = "more is" if needed_bytes is None else f"{needed_bytes:,} bytes are"
        return HomeError(
            "disk_full",
            f"the disk of '{folder}' is full: {needed} needed, {_free_bytes(folder):,} are free",
            "free space on that disk, then run the command again",
        )
    if error.errno in _READ_ONLY:
        return HomeError(
            "home_read_only",
            f"'{folder}' can't be written: {error.strerror}",
            "make the folder writable for the user that runs llmster",
        )
    return HomeError("home_unusable", f"'{folder}' can't be used: {error.strerror}")


@contextmanager
def home_errors(folder: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns an OSError of the block into a HomeError about `folder`."""
    try:
        yield
    except OSError as error:
        raise home_error(error, folder, needed_bytes) from error


def _free_bytes(folder: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


@dataclass(frozen=True)
class Staged:
    """A file under a hidden name, complete and on disk, that waits to be moved to its place."""

    path: Path
    digest: str


@contextmanager
def staged(
    source: Path, folder: Path, *, link: bool = False, on_progress: Progress | None = None
) -> Iterator[Staged]:
    """The content of `source` in a temporary file in `folder`, with its sha256.

    With `link` a hard link, where the disk allows one. What the block does not move away is
    removed. Blocks. Raises BadRequest where `source` can't be read, HomeError where `folder` can't
    be written.
    """
    partial = folder / f"{PARTIAL_PREFIX}{uuid4().hex}{PARTIAL_SUFFIX}"
    try:
        with _opened(source) as fd:
            if link and _link(source, fd, partial):
                digest = file_sha256(partial, on_progress)
                yield Staged(partial, digest)
            else:
                with _copy(source, fd, partial, on_progress) as digest:
                    yield Staged(partial, digest)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _link(source: Path, fd: int, partial: Path) -> bool:
    """Whether `partial` is now a hard link to the open file."""
    try:
        # Without resolve() Linux would link to a symbolic link, not to the file.
        partial.hardlink_to(source.resolve())
        if os.path.samestat(partial.lstat(), os.fstat(fd)):
            # Tells `remove_dead_partials` that it is in use.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        partial.unlink()
    except OSError:
        # Another disk, a disk without links, someone else's file: a copy does it too.
        partial.unlink(missing_ok=True)
    return False


@contextmanager
def _copy(source: Path, fd: int, partial: Path, on_progress: Progress | None) -> Iterator[str]:
    """Copies the open file; its sha256. The copy stays locked, so alive, within the block."""
    folder, size = partial.parent, os.fstat(fd).st_size
    if size > _free_bytes(folder):
        raise home_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder, size)
    digest = hashlib.sha256()
    with home_errors(folder, size):
        target = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with home_errors(folder, size):
            fcntl.flock(target, fcntl.LOCK_EX)
        for chunk in _chunks(source, fd, on_progress):
            digest.update(chunk)
            with home_errors(folder, size):
                written = 0
                while written < len(chunk):
                    written += os.write(target, chunk[written:])
        with home_errors(folder, size):
            os.fsync(target)
        yield digest.hexdigest()
    finally:
        os.close(target)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file atomically. Raises OSError."""
    fd, name = tempfile.mkstemp(PARTIAL_SUFFIX, PARTIAL_PREFIX, path.parent)
    temporary = Path(name)
    try:
        with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(text)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_dead_partials(root: Path) -> None:
    """Deletes what imports that were killed have left below `root`."""
    partials: list[Path] = []
    with suppress(OSError):
        partials = list(root.rglob(f"{PARTIAL_PREFIX}*{PARTIAL_SUFFIX}"))
    for partial in partials:
        with suppress(OSError):
            # The change time, because a linked file keeps its modification time.
            if time.time() - partial.lstat().st_ctime < PARTIAL_GRACE_S:
                continue
            fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()
            finally:
                os.close(fd)
