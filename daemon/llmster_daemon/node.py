"""A node: its models, its instances, what it measures, and its place in a pool."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx

from . import __version__, chat_template
from .config import NodeConfig
from .errors import LlmsterError, unknown_model
from .models.gguf import GgufInfo
from .models.store import ModelStore
from .pool_link import PoolLink
from .protocol.base import Role
from .protocol.node import (
    Command,
    LoadOptions,
    ModelInfo,
    NodeHello,
    NodeReport,
    Peer,
    RouteRecord,
    Telemetry,
)
from .serving import Serving
from .supervisor.manager import InstanceManager
from .telemetry.sampler import Sampler

log = logging.getLogger(__name__)

STORE_INTERVAL_S = 5.0
"""How often the model folder is looked at for files that a person put there."""
SAMPLE_INTERVAL_S = 1.0


class Node:
    """Everything a node is, for the APIs above it. `run` drives what happens by itself."""

    def __init__(
        self,
        config: NodeConfig,
        node_id: str,
        store: ModelStore,
        sampler: Sampler,
        client: httpx.AsyncClient,
        group: asyncio.TaskGroup,
    ) -> None:
        self.config = config
        self.id = node_id
        self.role: Role = config.role
        self.client = client
        self._store = store
        self._sampler = sampler
        self._telemetry: Telemetry | None = None
        self._models: tuple[ModelInfo, ...] = ()
        self._details: dict[str, GgufInfo] = {}
        self._link = PoolLink(self) if config.control_url else None
        self._name = config.name
        self.instances = InstanceManager(
            config.home,
            store,
            config.threads,
            group,
            self._changed,
            config.hang_limit_s,
            config.orphan_timeout_s,
        )
        self.serving = Serving(self, client, node_id)

    # The pool, as serving sees it

    @property
    def name(self) -> str:
        """Its name in the pool; the control plane may have changed it to keep names unique."""
        feed = self._link.feed if self._link else None
        return (feed.your_name if feed else None) or self._name

    @property
    def gateway_url(self) -> str | None:
        """Where the pool's gateway answers, while this node is connected to it."""
        link = self._link
        return link.feed.gateway_url if link and link.connected and link.feed else None

    def peer(self, node_id: str) -> Peer | None:
        """Another member of the pool."""
        feed = self._link.feed if self._link else None
        return next((p for p in feed.peers if p.node_id == node_id), None) if feed else None

    def record(self, route: RouteRecord) -> None:
        """Report a route with the next report."""
        if self._link:
            self._link.add_route(route)

    # What the APIs ask

    def models(self) -> tuple[ModelInfo, ...]:
        """The models on this node's disk, as last seen."""
        return self._models

    def model_names(self) -> list[str]:
        """The models that a request can name here: the pool's, or this node's own."""
        own = {i.model for i in self.instances.infos() if i.state == "ready"}
        feed = self._link.feed if self._link and self._link.connected else None
        return sorted(own | set(feed.models if feed else ()))

    def serves_alone(self, model: str, prefer: str | None) -> bool:
        """True if a request that came here should not go through the gateway.

        It should not if this node can do all of it at once; it must not if there is no gateway.
        """
        instance = self.instances.find(model)
        if instance is None:
            return False
        if self.gateway_url is None:
            return True
        info = instance.info()
        draining = bool(self._link and self._link.feed and self._link.feed.draining)
        free = info.active < info.slots and not draining
        return prefer is None and self.role == "mixed" and free

    async def why_not(self, model: str) -> LlmsterError:
        """The error for a model that nothing here serves."""
        known = await asyncio.to_thread(self._store.get, model)
        loading = [i for i in self.instances.infos() if model.lower() in (i.id, i.model)]
        if loading:
            state = loading[0]
            return LlmsterError(
                "model_not_ready",
                f"'{model}' is {state.state}" + (f": {state.reason}" if state.reason else ""),
                "wait, or run `llmster ps` to see its state",
                503,
            )
        return unknown_model(model, self.model_names(), on_disk=known is not None)

    async def render(
        self, model: str, digest: str, messages: list[dict[str, Any]]
    ) -> tuple[str, bool]:
        """The prompt of a chat, and whether the engine must put the BOS token before it."""
        details = self._details.get(digest)
        if details is None:
            details = await asyncio.to_thread(self._store.details, model)
            self._details[digest] = details
        bos = details.bos_token or ""
        prompt = chat_template.render(details.chat_template, messages, bos, details.eos_token or "")
        return prompt, not (bos and prompt.startswith(bos))

    async def import_model(self, path: str) -> ModelInfo:
        """Take a file on this machine into the store."""
        model = await asyncio.to_thread(self._store.import_file, Path(path))
        await self._look_at_store()
        return model

    async def status(self) -> dict[str, Any]:
        """A summary for people and for `llmster up`."""
        return {
            "id": self.id,
            "name": self.name,
            "role": self.role,
            "version": __version__,
            "url": self.config.url,
            "home": str(self.config.home),
            "control_url": self.config.control_url,
            "connected": bool(self._link and self._link.connected),
            "instances": [info.model_dump() for info in self.instances.infos()],
        }

    # What the control plane asks

    def hello(self) -> NodeHello:
        """The first message to the control plane. Blocks on hardware."""
        return NodeHello(
            version=__version__,
            node_id=self.id,
            name=self._name,
            role=self.role,
            url=self.config.url,
            home=str(self.config.home),
            inventory=self._sampler.inventory(),
        )

    def report(self, routes: tuple[RouteRecord, ...]) -> NodeReport | None:
        """The state of this node; None before the first measurement."""
        if self._telemetry is None:
            return None
        return NodeReport(
            telemetry=self._telemetry,
            role=self.role,
            models=self._models,
            instances=self.instances.infos(),
            routes=routes,
        )

    async def obey(self, command: Command) -> dict[str, Any]:
        """Carry out an order of the control plane. Raises LlmsterError."""
        args = command.args

        def text(name: str) -> str:
            if not isinstance(args[name], str):
                raise TypeError(f"{name} must be a text")
            return str(args[name])

        if command.name == "load":
            options = LoadOptions.model_validate(args.get("options") or {})
            return {"instance": (await self.instances.load(text("model"), options)).model_dump()}
        if command.name == "unload":
            return {"unloaded": await self.instances.unload(text("target"))}
        if command.name == "import":
            return {"model": (await self.import_model(text("path"))).model_dump()}
        role = args["role"]
        if role not in ("prefill", "decode", "mixed"):
            raise LlmsterError("bad_role", f"there is no role '{role}'", "", 400)
        self.role = role
        self._changed()
        return {"role": role}

    # What happens by itself

    async def run(self) -> None:
        """Measure, watch the store and keep the link to the pool, until cancelled."""
        await self._look_at_store()
        self.instances.restore()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._measure(), name="telemetry")
            group.create_task(self._watch_store(), name="store")
            if self._link and self.config.control_url:
                group.create_task(self._link.run(self.config.control_url), name="pool-link")

    async def _measure(self) -> None:
        while True:
            try:
                self._telemetry = await self._sampler.sample()
            except Exception:
                # A probe that breaks must not take the node out of service.
                log.exception("telemetry could not be read")
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def _watch_store(self) -> None:
        while True:
            await asyncio.sleep(STORE_INTERVAL_S)
            await self._look_at_store()

    async def _look_at_store(self) -> None:
        try:
            models = await asyncio.to_thread(self._store.list)
        except (LlmsterError, OSError) as error:
            log.warning("the model store can't be read: %s", error)
            return
        if models != self._models:
            self._models = models
            self._changed()

    def _changed(self) -> None:
        if self._link:
            self._link.report_soon()
