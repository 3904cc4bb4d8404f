"""The node's own API: its state, its models and instances, and prefill for other nodes."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from ..errors import unknown_model
from ..node import Node
from ..protocol.base import Frozen
from ..protocol.node import InstanceInfo, LoadOptions, ModelInfo, PrefillRequest, PrefillResult
from .http import parse, read_body, until_gone


class LoadBody(Frozen):
    """Load a model of this node's store."""

    model: str = Field(min_length=1)
    options: LoadOptions = LoadOptions()


class TargetBody(Frozen):
    """An instance by its id, or all of a model."""

    target: str = Field(min_length=1)


class ImportBody(Frozen):
    """A file on this node's disk."""

    path: str = Field(min_length=1)


def router(node: Node) -> APIRouter:
    """The routes below `/node/v1`."""
    routes = APIRouter(prefix="/node/v1")

    @routes.get("/status")
    async def status() -> dict[str, Any]:
        return await node.status()

    @routes.get("/models")
    async def models() -> list[ModelInfo]:
        return list(node.models())

    @routes.get("/instances")
    async def instances() -> list[InstanceInfo]:
        return list(node.instances.infos())

    @routes.post("/load")
    async def load(request: Request) -> InstanceInfo:
        body = parse(LoadBody, await read_body(request))
        return await node.instances.load(body.model, body.options)

    @routes.post("/unload")
    async def unload(request: Request) -> dict[str, list[str]]:
        body = parse(TargetBody, await read_body(request))
        return {"unloaded": await node.instances.unload(body.target)}

    @routes.post("/import")
    async def import_model(request: Request) -> ModelInfo:
        body = parse(ImportBody, await read_body(request))
        return await node.import_model(body.path)

    @routes.post("/prefill")
    async def prefill(request: Request) -> PrefillResult:
        body = parse(PrefillRequest, await read_body(request))
        instance = node.instances.of_digest(body.digest)
        if instance is None:
            raise unknown_model(body.model, node.model_names())
        done = await until_gone(request, node.serving.prefill(instance, body))
        return PrefillResult(kv_bytes=done.kv_bytes, queue_s=done.queue_s, prefill_s=done.prefill_s)

    return routes
