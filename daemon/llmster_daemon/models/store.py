"""The models on a node's disk.

Layout, as LM Studio has it: `<root>/<publisher>/<repo>/<file>.gguf`. A file that a person drops
below the root, up to two folders deep, is found as well. Contents are hashed and parsed once and
remembered in `<root>/.index.json`.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..errors import BadModel, BadRequest, Conflict, HomeError, LlmsterError, NotFound
from ..protocol.node import ModelInfo
from .files import (
    SUFFIX,
    Progress,
    Stamp,
    base_key,
    check_source,
    file_sha256,
    home_errors,
    is_safe_name,
    remove_dead_partials,
    staged,
    stamp_of,
    sync_folder,
)
from .gguf import GgufInfo, read_gguf
from .index import INDEX_NAME, Entry, load_index, save_index

log = logging.getLogger(__name__)

MAX_DEPTH: Final = 2
_PUBLISHER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*")


class ModelStore:
    """Finds, describes and imports model files below `root`. Safe to use from several threads.

    Every method reads the disk, so call it in a thread. Only a file's first sight is slow (about
    a second per GB, for its hash); other callers do not wait for that, they don't see it yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._index = self.root / INDEX_NAME
        self._index_stamp: Stamp | None = None
        self._entries: dict[str, Entry] = {}
        self._bad: dict[str, Stamp] = {}
        self._busy: set[str] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._import_lock = threading.Lock()

    def list(self) -> tuple[ModelInfo, ...]:
        """All sound models, by key. A bad file is left out and logged once."""
        self._refresh()
        with self._lock:
            models = [self._model(path, entry) for path, entry in self._entries.items()]
        return tuple(sorted(models, key=lambda model: model.key))

    def get(self, key: str) -> ModelInfo | None:
        """The model with this key, in any case, or None."""
        found = self._find(key)
        return self._model(*found) if found else None

    def details(self, key: str) -> GgufInfo:
        """What the model's file says about itself. Raises NotFound."""
        found = self._find(key)
        if found is None:
            raise NotFound(
                "model_not_found",
                f"there is no model '{key}' in the store",
                "run `llmster ls` to see the models, `llmster import FILE` to add one",
                param="model",
            )
        return found[1].info

    def import_file(
        self,
        source: Path,
        *,
        publisher: str = "local",
        link: bool = False,
        on_progress: Progress | None = None,
    ) -> ModelInfo:
        """Adds a copy of the file (with `link` a hard link, where possible); the model it is now.

        A content that the store has already is not added again. Blocks for the copy; one import at
        a time. Raises NotFound (`file_not_found`), BadRequest (not a readable file, an unsafe
        name), BadModel (not a sound GGUF), Conflict (`model_exists`), HomeError (`disk_full`,
        `home_read_only`).
        """
        size = check_source(source)
        name = source.name if source.name.lower().endswith(SUFFIX) else source.name + SUFFIX
        if not is_safe_name(name):
            raise BadRequest(
                "bad_file_name",
                f"{source.name!a} can't be the name of a model file",
                "rename the file: no '..', no control characters, at most 200 bytes",
            )
        if not _PUBLISHER.fullmatch(publisher) or len(publisher) > 64:
            raise BadRequest(
                "bad_publisher",
                f"{publisher!a} can't be a publisher",
                "use letters, digits, '-', '_' and '.'",
            )
        info = read_gguf(source)
        with self._import_lock:
            self._refresh()
            existing = self._same_content(source, size)
            if existing:
                return existing
            folder = self.root / publisher / base_key(name)
            with self._lock:
                self._free_key(name, info, folder / name)
            try:
                self._check_inside(folder)
                with home_errors(self.root, size):
                    folder.mkdir(parents=True, exist_ok=True)
                remove_dead_partials(self.root)
                return self._place(source, folder / name, link, on_progress)
            finally:
                # Succeeds only for folders that are empty, so after a failure.
                with suppress(OSError):
                    folder.rmdir()
                    folder.parent.rmdir()

    def _place(
        self, source: Path, path: Path, link: bool, on_progress: Progress | None
    ) -> ModelInfo:
        with staged(source, path.parent, link=link, on_progress=on_progress) as file:
            # Again, for what counts is what was copied.
            info = read_gguf(file.path)
            with self._lock:
                key = self._free_key(path.name, info, path)
                with home_errors(self.root):
                    file.path.replace(path)
                    sync_folder(path.parent)
                    status = path.stat()
                entry = Entry(
                    size=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                    digest=file.digest,
                    key=key,
                    info=info,
                )
                relative = self._relative(path)
                self._entries[relative] = entry
                self._save()
                return self._model(relative, entry)

    def _same_content(self, source: Path, size: int) -> ModelInfo | None:
        with self._lock:
            alike = [(path, entry) for path, entry in self._entries.items() if entry.size == size]
        if not alike:
            return None
        digest = file_sha256(source)
        return next((self._model(*item) for item in alike if item[1].digest == digest), None)

    def _free_key(self, name: str, info: GgufInfo, path: Path) -> str:
        """The key that a new file gets. Raises Conflict. The lock is held."""
        base = base_key(name)
        holders = {entry.key: entry for entry in self._entries.values()}
        key = base
        if base in holders and holders[base].info.quantisation != info.quantisation:
            key = f"{base}@{info.quantisation.lower()}"
        # An unsound file in its place is what this import repairs.
        in_the_way = os.path.lexists(path) and self._relative(path) not in self._bad
        if key in holders or in_the_way:
            raise Conflict(
                "model_exists",
                f"the store has another file for the model '{key}'",
                "rename the file and import it again; `llmster ls` shows what is there",
            )
        return key

    def _found_key(self, name: str, info: GgufInfo) -> str:
        """The key of a file that was dropped into the folder; never refused. The lock is held."""
        base = base_key(name)
        taken = {entry.key for entry in self._entries.values()}
        qualified = f"{base}@{info.quantisation.lower()}"
        candidates = [base, qualified, *(f"{qualified}-{n}" for n in range(2, len(taken) + 3))]
        return next(key for key in candidates if key not in taken)

    def _find(self, key: str) -> tuple[str, Entry] | None:
        wanted = key.lower()

        def known() -> tuple[str, Entry] | None:
            with self._lock:
                items = self._entries.items()
                return next((item for item in items if item[1].key == wanted), None)

        found = known()
        if found and stamp_of(self.root / found[0]) == found[1].stamp:
            return found
        self._refresh()
        return known()

    def _refresh(self) -> None:
        """Makes the entries what the disk holds now."""
        with self._lock:
            changed = self._load()
            found = dict(self._scan())
            kept = {p: e for p, e in self._entries.items() if found.get(p) == e.stamp}
            changed |= len(kept) < len(self._entries)
            self._entries = kept
            self._bad = {p: stamp for p, stamp in self._bad.items() if found.get(p) == stamp}
            fresh = found.keys() - kept.keys() - self._bad.keys() - self._busy
            self._busy |= fresh
        examined: dict[str, tuple[Stamp, GgufInfo, str]] = {}
        try:
            for path in fresh:
                result = self._examine(path, found[path])
                if result:
                    examined[path] = result
        finally:
            with self._lock:
                self._busy -= fresh
                # The oldest first, so that keys come out the same when the index is rebuilt.
                for path in sorted(examined, key=lambda p: (examined[p][0][1], p)):
                    (size, mtime_ns), info, digest = examined[path]
                    if path in self._entries:
                        continue
                    self._told.discard(path)
                    key = self._found_key(Path(path).name, info)
                    self._entries[path] = Entry(
                        size=size, mtime_ns=mtime_ns, digest=digest, key=key, info=info
                    )
                if changed or examined:
                    self._save()

    def _examine(self, relative: str, stamp: Stamp) -> tuple[Stamp, GgufInfo, str] | None:
        path = self.root / relative
        try:
            info = read_gguf(path)
            digest = file_sha256(path)
        except LlmsterError as error:
            # What permissions hide may be shown later without a new stamp.
            if isinstance(error, BadModel) and os.access(path, os.R_OK):
                with self._lock:
                    self._bad[relative] = stamp
            self._tell(relative, error.message)
            return None
        # Someone is still writing it: not yet.
        return (stamp, info, digest) if stamp_of(path) == stamp else None

    def _scan(self) -> Iterator[tuple[str, Stamp]]:
        """Every model file below the root, with its stamp. The lock is held."""
        links: dict[Path, Path] = {}
        real: set[Path] = set()
        root = self.root.resolve()
        for path in self._walk(root, root, MAX_DEPTH):
            if path.is_symlink():
                links[path] = _target(path)
                continue
            real.add(path)
            stamp = stamp_of(path)
            if stamp:
                yield str(path.relative_to(root)), stamp
        for path, target in links.items():
            stamp = stamp_of(target)
            if stamp and target not in real:
                real.add(target)
                yield str(path.relative_to(root)), stamp

    def _walk(self, root: Path, folder: Path, depth: int) -> Iterator[Path]:
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            if folder != root:
                self._tell(str(folder.relative_to(root)), f"it can't be read ({error.strerror})")
            return
        for child in children:
            try:
                is_folder, is_link = child.is_dir(), child.is_symlink()
            except OSError:
                continue
            if child.name.startswith(".") or not (is_folder or child.suffix.lower() == SUFFIX):
                continue
            if not is_safe_name(child.name):
                self._tell(str(child.relative_to(root)), "its name is not safe")
            elif is_link and not _target(child).is_relative_to(root):
                self._tell(str(child.relative_to(root)), "it leads out of the store")
            elif not is_folder:
                yield child
            elif depth and not is_link:
                yield from self._walk(root, child, depth - 1)

    def _check_inside(self, folder: Path) -> None:
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise HomeError(
                "path_outside_home",
                f"'{folder}' leads out of the store",
                "remove the symbolic link",
            )

    def _load(self) -> bool:
        """Takes over the index if another process, or an earlier one, has written it.

        True if it has to be written again. The lock is held.
        """
        stamp = stamp_of(self._index)
        if stamp == self._index_stamp:
            return False
        self._index_stamp = stamp
        entries = load_index(self._index)
        if entries is None:
            return stamp is not None or bool(self._entries)
        self._entries = entries
        return False

    def _save(self) -> None:
        try:
            save_index(self._index, self._entries)
        except OSError as error:
            # The index only saves time, so the store works on without it.
            self._tell(INDEX_NAME, f"it can't be written ({error.strerror})")
        self._index_stamp = stamp_of(self._index)

    def _tell(self, relative: str, reason: str) -> None:
        if relative not in self._told:
            self._told.add(relative)
            log.warning("a file of the model store is not used: %s: %s", ascii(relative), reason)

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _model(self, relative: str, entry: Entry) -> ModelInfo:
        return ModelInfo(
            key=entry.key,
            path=str(self.root / relative),
            size_bytes=entry.size,
            digest=entry.digest,
            architecture=entry.info.architecture,
            quantisation=entry.info.quantisation,
            context_length=entry.info.context_length,
            parameters=entry.info.parameters,
        )


def _target(link: Path) -> Path:
    """Where a link leads. Unlike `Path.resolve`, no error for a loop."""
    return Path(os.path.realpath(link))
