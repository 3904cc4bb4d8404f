"""OpenAI's API on a node: models, chat completions, completions."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ..engines.base import GenerateParams, TokenLogprob
from ..errors import BadRequest, LlmsterError, unknown_model
from ..node import Node
from ..protocol.node import ServePlan
from ..protocol.openai import ChatRequest, CompletionRequest, GenerationRequest
from ..serving import Answer, Job
from ..structured import grammar_of
from . import relay
from .http import PLAN, PREFER, ROUTE, error_response, parse, read_body, sse_error, until_gone
from .stream import BodyStream

PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repeat_penalty",
    "grammar",
)
"""Fields that engines take under the same name."""
BLAMED = {"bad_grammar": "grammar", "bad_bias": "logit_bias"}
"""What is wrong with a request, by the engine's code."""


def router(node: Node) -> APIRouter:
    """The routes below `/v1`."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_object(name) for name in node.model_names()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name.lower() not in node.model_names():
            raise unknown_model(name, node.model_names())
        return model_object(name.lower())

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return await _handle(node, request, ChatRequest, "/v1/chat/completions")

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        return await _handle(node, request, CompletionRequest, "/v1/completions")

    return routes


def model_object(name: str) -> dict[str, Any]:
    """A model as OpenAI lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmster"}


def check(asked: GenerationRequest) -> None:
    """Raises BadRequest for a field that is understood but not served."""
    field = asked.unsupported()
    if field:
        raise BadRequest(
            "unsupported_parameter",
            f"{field}: this is not served yet",
            "leave it out; docs/api.md lists what is served",
            param=field,
        )


async def _handle(
    node: Node, request: Request, kind: type[ChatRequest] | type[CompletionRequest], path: str
) -> Response:
    received_s = time.monotonic()
    body = await read_body(request)
    asked = parse(kind, body)
    check(asked)
    request_id: str = request.state.request_id
    plan = request.headers.get(PLAN)
    gateway = node.gateway_url
    if plan is not None:
        return await _serve(node, request, asked, parse(ServePlan, plan.encode()), received_s)
    if node.serves_alone(asked.model, request.headers.get(PREFER)):
        try:
            own = ServePlan(kind="colocated", reason="on the node that was asked")
            return await _serve(node, request, asked, own, received_s)
        except LlmsterError as error:
            if error.status != 503 or gateway is None:
                raise
    if gateway is None:
        raise await node.why_not(asked.model)
    headers = dict(request.headers)
    upstream = await until_gone(
        request, relay.forward(node.client, gateway + path, body, request_id, headers)
    )
    return relay.answer(upstream)


async def _serve(
    node: Node,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    plan: ServePlan,
    received_s: float,
) -> Response:
    instance = node.instances.find(asked.model)
    if instance is None:
        raise await node.why_not(asked.model)
    params = await _params(node, asked, instance.handle.model, instance.handle.digest)
    job = Job(request.state.request_id, instance.handle.model, params, plan, received_s)
    chat = isinstance(asked, ChatRequest)
    try:
        answer = await until_gone(request, node.serving.start(job, instance))
    except LlmsterError as error:
        if error.status == 400:
            # What else an engine can find wrong with a request is its prompt.
            error.param = BLAMED.get(error.code, "messages" if chat else "prompt")
            error.hint = error.hint or "docs/api.md says what a prompt can be"
        raise
    headers = {ROUTE: answer.route_header(), "cache-control": "no-store"}
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        headers["content-type"] = relay.STREAM
        return BodyStream(_events(answer, chat, usage), headers, answer.close)
    try:
        return await until_gone(request, _whole(answer, chat, headers))
    except LlmsterError as error:
        response = error_response(error)
        response.headers[ROUTE] = answer.route_header()
        return response
    finally:
        await answer.close()


async def _params(
    node: Node, asked: ChatRequest | CompletionRequest, model: str, digest: str
) -> GenerateParams:
    fields: dict[str, Any] = {
        name: value for name in PASSED_ON if (value := getattr(asked, name)) is not None
    }
    fields["stop"] = asked.stops()
    fields["logprobs"] = asked.alternatives()
    fields["logit_bias"] = asked.biases()
    fields["seed"] = asked.seed if asked.seed is not None else secrets.randbits(32)
    if isinstance(asked, CompletionRequest):
        if isinstance(asked.prompt, str):
            fields["prompt"] = asked.prompt
        else:
            fields["tokens"] = asked.prompt
        return GenerateParams(**fields)
    if asked.max_completion_tokens is not None:
        fields["max_tokens"] = asked.max_completion_tokens
    if asked.response_format is not None:
        grammar = await asyncio.to_thread(grammar_of, asked.response_format)
        fields["grammar"] = grammar or asked.grammar
    prompt, add_bos = await node.render(model, digest, [m.plain() for m in asked.messages])
    return GenerateParams(prompt=prompt, add_bos=add_bos, **fields)


def _names(answer: Answer, chat: bool) -> tuple[str, str, int]:
    prefix = "chatcmpl" if chat else "cmpl"
    object_name = "chat.completion" if chat else "text_completion"
    return f"{prefix}-{answer.job.request_id}", object_name, int(time.time())


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.generation.prompt_tokens, answer.generation.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answer.generation.cached_tokens},
    }


def _logprobs(found: list[TokenLogprob], chat: bool) -> dict[str, Any] | None:
    """Log probabilities in OpenAI's two shapes; None where none were asked for."""
    if not found:
        return None

    def entry(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}

    if chat:
        return {
            "content": [
                {**entry(t.piece, t.logprob), "top_logprobs": [entry(*a) for a in t.alternatives]}
                for t in found
            ],
            "refusal": None,
        }
    return {
        "tokens": [_text(t.piece) for t in found],
        "token_logprobs": [t.logprob for t in found],
        "top_logprobs": [{_text(piece): lp for piece, lp in t.alternatives} for t in found],
        "text_offset": None,
    }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


async def _whole(answer: Answer, chat: bool, headers: dict[str, str]) -> Response:
    texts = []
    finish = None
    found: list[TokenLogprob] = []
    async for chunk in answer.chunks():
        texts.append(chunk.text)
        finish = chunk.finish
        if chunk.logprob is not None:
            found.append(chunk.logprob)
    text = "".join(texts)
    completion_id, object_name, created = _names(answer, chat)
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {
        "id": completion_id,
        "object": object_name,
        "created": created,
        "model": answer.job.model,
        "choices": [
            {"index": 0, **content, "logprobs": _logprobs(found, chat), "finish_reason": finish}
        ],
        "usage": _usage(answer),
    }
    headers["content-type"] = "application/json"
    return Response(json.dumps(body), headers=headers)


async def _events(answer: Answer, chat: bool, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events. Everything that does not change from token to token is made once."""
    completion_id, object_name, created = _names(answer, chat)
    if chat:
        object_name += ".chunk"
    head = (
        f'data: {{"id":"{completion_id}","object":"{object_name}","created":{created},'
        f'"model":{json.dumps(answer.job.model)},"choices":['
    )
    usage_null = ',"usage":null' if with_usage else ""
    before = head + '{"index":0,' + ('"delta":{"content":' if chat else '"text":')
    after = ("}" if chat else "") + ',"logprobs":null,"finish_reason":null}]' + usage_null + "}\n\n"
    if chat:
        role = '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        yield f'{head}{role}"finish_reason":null}}]{usage_null}}}\n\n'.encode()
    try:
        async for chunk in answer.chunks():
            if chunk.logprob is not None:
                logprobs = json.dumps(_logprobs([chunk.logprob], chat))
                with_logprobs = after.replace('"logprobs":null', f'"logprobs":{logprobs}')
                yield (before + json.dumps(chunk.text) + with_logprobs).encode()
            elif chunk.text:
                yield (before + json.dumps(chunk.text) + after).encode()
            if chunk.finish is not None:
                empty = '"delta":{}' if chat else '"text":""'
                last = f'{{"index":0,{empty},"logprobs":null,"finish_reason":"{chunk.finish}"}}]'
                yield f"{head}{last}{usage_null}}}\n\n".encode()
    except LlmsterError as error:
        yield sse_error(error)
        return
    if with_usage:
        yield f'{head}],"usage":{json.dumps(_usage(answer))}}}\n\n'.encode()
    yield b"data: [DONE]\n\n"
