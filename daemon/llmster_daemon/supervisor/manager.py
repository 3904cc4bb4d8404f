"""The instances of a node: loaded on request, found again after a restart."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from ..errors import BadModel, BadRequest, Conflict, LlmsterError, NotFound, unknown_model
from ..models.store import ModelStore
from ..protocol.node import InstanceInfo, LoadOptions
from .instance import HANG_LIMIT_S, ORPHAN_TIMEOUT_S, Instance, InstancePaths
from .process import Handle, read_handles

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 8192
LOAD_LIMIT_S = 600.0
UNLOAD_LIMIT_S = 30.0


class InstanceManager:
    """Loads and unloads. Every instance is a task of `group`."""

    def __init__(
        self,
        home: Path,
        store: ModelStore,
        threads: int,
        group: asyncio.TaskGroup,
        on_change: Callable[[], None],
        hang_limit_s: float = HANG_LIMIT_S,
        orphan_timeout_s: float = ORPHAN_TIMEOUT_S,
    ) -> None:
        self._home = home
        self._store = store
        self._threads = threads
        self._group = group
        self._on_change = on_change
        self._hang_limit_s = hang_limit_s
        self._orphan_timeout_s = orphan_timeout_s
        self._instances: dict[str, Instance] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def restore(self) -> None:
        """Take up every instance that a handle on disk names, running or not."""
        for handle in read_handles(self._home / "run"):
            self._begin(handle)

    def infos(self) -> tuple[InstanceInfo, ...]:
        """All instances, by id."""
        return tuple(self._instances[key].info() for key in sorted(self._instances))

    def find(self, name: str) -> Instance | None:
        """A ready instance by its id, or the least busy one of a model; any case."""
        wanted = name.lower()
        exact = self._instances.get(wanted)
        if exact is not None and exact.ready:
            return exact
        ready = [i for i in self._instances.values() if i.ready and i.handle.model == wanted]
        return min(ready, key=lambda i: i.info().active + i.info().waiting, default=None)

    def of_digest(self, digest: str) -> Instance | None:
        """The least busy ready instance of exactly this model file."""
        ready = [i for i in self._instances.values() if i.ready and i.handle.digest == digest]
        return min(ready, key=lambda i: i.info().active + i.info().waiting, default=None)

    async def load(
        self,
        key: str,
        options: LoadOptions,
        engine: str = "llamacpp",
        extra: dict[str, object] | None = None,
    ) -> InstanceInfo:
        """Load a model and wait until it can serve.

        Raises NotFound, BadRequest (a context the model does not have), BadModel (it can't be
        loaded, with the engine's reason), HomeError.
        """
        model = await asyncio.to_thread(self._store.get, key)
        if model is None:
            raise unknown_model(key, sorted({i.handle.model for i in self._instances.values()}))
        context = options.context_length or min(model.context_length, DEFAULT_CONTEXT)
        if context > model.context_length:
            raise BadRequest(
                "context_too_long",
                f"'{model.key}' was made for a context of {model.context_length:,} tokens,"
                f" {context:,} were asked for",
                f"load it with `--context {model.context_length}` or less",
                param="context_length",
            )
        handle = Handle(
            instance_id=self._free_id(model.key),
            model=model.key,
            digest=model.digest,
            model_path=str(self._store.root / model.path),
            engine=engine,
            options=options.model_copy(update={"context_length": context}),
            extra=extra or {},
            socket_path="",
        )
        instance = self._begin(handle)
        try:
            async with asyncio.timeout(LOAD_LIMIT_S):
                await instance.settled()
        except TimeoutError:
            await self._discard(instance)
            raise BadModel(
                "load_timeout", f"'{key}' did not load within {LOAD_LIMIT_S:g} s", "see the log"
            ) from None
        if instance.life.state != "ready":
            reason = instance.life.reason or "it was unloaded meanwhile"
            await self._discard(instance)
            if instance.home_error is not None:
                raise instance.home_error
            raise BadModel(
                "load_failed",
                f"'{key}' can't be loaded: {reason}",
                f"see {self._home / 'logs'}; a smaller `--context` needs less memory",
            )
        return instance.info()

    async def unload(self, target: str) -> list[str]:
        """Unload an instance by id, or all of a model; returns the ids. Raises NotFound."""
        wanted = target.lower()
        ids = [wanted] if wanted in self._instances else []
        ids = ids or [k for k, i in self._instances.items() if i.handle.model == wanted]
        if not ids:
            raise NotFound(
                "instance_not_found",
                f"nothing called '{target}' is loaded here",
                "run `llmster ps` to see what is loaded",
            )
        tasks = []
        for instance_id in ids:
            self._instances[instance_id].unload()
            tasks.append(self._tasks[instance_id])
        await asyncio.wait(tasks, timeout=UNLOAD_LIMIT_S)
        return ids

    async def detach(self, stop_engines: bool) -> None:
        """End all tasks; the engines run on, unless they are to stop. Handles stay either way."""
        instances = list(self._instances.values())
        if stop_engines:
            await asyncio.gather(*(i.halt() for i in instances))
        for task in self._tasks.values():
            task.cancel()

    async def _discard(self, instance: Instance) -> None:
        """Unload an instance, unless somebody else has; its id may be another's by then."""
        instance_id = instance.handle.instance_id
        if self._instances.get(instance_id) is instance:
            await self.unload(instance_id)

    def _free_id(self, key: str) -> str:
        if key not in self._instances:
            return key
        number = 2
        while f"{key}:{number}" in self._instances:
            number += 1
        if number > 64:
            raise Conflict("too_many_instances", f"'{key}' is loaded {number} times already", "")
        return f"{key}:{number}"

    def _begin(self, handle: Handle) -> Instance:
        paths = InstancePaths.under(self._home, handle.instance_id)
        handle = handle.model_copy(update={"socket_path": str(paths.socket)})
        instance = Instance(
            handle,
            paths,
            self._threads,
            self._on_change,
            self._hang_limit_s,
            self._orphan_timeout_s,
        )
        self._instances[handle.instance_id] = instance
        task = self._group.create_task(self._own(instance), name=f"instance-{handle.instance_id}")
        self._tasks[handle.instance_id] = task
        return instance

    async def _own(self, instance: Instance) -> None:
        instance_id = instance.handle.instance_id
        try:
            await instance.run()
        except LlmsterError:
            log.exception("instance %s ended", instance_id)
        finally:
            if self._instances.get(instance_id) is instance:
                del self._instances[instance_id]
                del self._tasks[instance_id]
            self._on_change()
