"""OpenAI's API on the control plane: the gateway, and the models of the pool."""

from typing import Any

from fastapi import APIRouter, Request, Response

from llmster_control.gateway.gateway import Gateway
from llmster_control.registry.members import Members
from llmster_daemon.api.openai import model_object
from llmster_daemon.errors import unknown_model


def router(members: Members, gateway: Gateway) -> APIRouter:
    """The routes below `/v1`."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name) for name in members.models()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name.lower() not in members.models():
            raise unknown_model(name, list(members.models()), members.on_disk(name))
        return model_object(name.lower())

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await gateway.handle(request)

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        return await gateway.handle(request)

    return routes
