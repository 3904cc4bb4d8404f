"""Bad requests to the OpenAI API of a node: each gets its status, and one envelope that helps."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fakes.node import CONTEXT, LiveNode, add_model, new_home, no_engine_left
from llmster_daemon.api.http import MAX_BODY_BYTES
from llmster_daemon.errors import Conflict
from llmster_daemon.home import require_loopback

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
HUGE = 1 << 70


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    home = new_home(tmp_path_factory.mktemp("node"))
    add_model(home, "tiny")
    add_model(home, "asleep")
    with no_engine_left(home), LiveNode(home) as node:
        node.load("tiny")
        yield node


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The inner object of the envelope, after all that must hold for every error."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-llmster-request-id"].startswith("req-")
    assert response.headers["x-llmster-route"] == "none"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    kind = "invalid_request_error" if response.status_code < 500 else "server_error"
    assert error["type"] == kind
    assert error["message"]
    assert error["hint"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return error


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 4, **changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 4, **changes}


def said(content: Any, role: Any = "user") -> dict[str, Any]:
    return chat(
        messages=[{"role": "user", "content": "before"}, {"role": role, "content": content}]
    )


def without(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


BAD: list[tuple[str, bytes | dict[str, Any], str, str | None]] = [
    (CHAT, b"", "invalid_json", None),
    (CHAT, b"{", "invalid_json", None),
    (CHAT, b"\xff\xfe", "invalid_json", None),
    (CHAT, b'{"model": "tiny", "messages": \'x\'}', "invalid_json", None),
    (CHAT, b'{"a":' * 100_000, "invalid_json", None),
    (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
     "invalid_json", None),
    (CHAT, b"[]", "invalid_value", None),
    (CHAT, b"null", "invalid_value", None),
    (CHAT, b'"hello"', "invalid_value", None),
    (CHAT, {}, "missing_field", "model"),
    (CHAT, without("model", chat()), "missing_field", "model"),
    (CHAT, without("messages", chat()), "missing_field", "messages"),
    (CHAT, chat(model=5), "invalid_value", "model"),
    (CHAT, chat(model=""), "invalid_value", "model"),
    (CHAT, chat(model=None), "invalid_value", "model"),
    (CHAT, chat(messages="hello"), "invalid_value", "messages"),
    (CHAT, chat(messages=[]), "invalid_value", "messages"),
    (CHAT, chat(messages={"role": "user"}), "invalid_value", "messages"),
    (CHAT, chat(messages=["hello"]), "invalid_value", "messages.0"),
    (CHAT, chat(messages=[{"content": "hello"}]), "missing_field", "messages.0.role"),
    (CHAT, said("hello", role="robot"), "invalid_value", "messages.1.role"),
    (CHAT, said("hello", role=None), "invalid_value", "messages.1.role"),
    (CHAT, said(5), "invalid_value", "messages.1.content"),
    (CHAT, said({"text": "hello"}), "invalid_value", "messages.1.content"),
    (CHAT, said(["hello"]), "invalid_value", "messages.1.content.0"),
    (CHAT, said([IMAGE]), "invalid_value", "messages.1.content.0.type"),
    (CHAT, said([{"type": "text", "text": "see"}, IMAGE]), "invalid_value",
     "messages.1.content.1.type"),
    (CHAT, said([{"type": "text"}]), "missing_field", "messages.1.content.0.text"),
    (CHAT, chat(max_tokens=-1), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=0), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens="5"), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=1.5), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=True), "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=HUGE), "invalid_value", "max_tokens"),
    (CHAT, chat(max_completion_tokens=-1), "invalid_value", "max_completion_tokens"),
    (CHAT, chat(temperature=9), "invalid_value", "temperature"),
    (CHAT, chat(temperature=-0.1), "invalid_value", "temperature"),
    (CHAT, chat(temperature="hot"), "invalid_value", "temperature"),
    (CHAT, chat(temperature=float("nan")), "invalid_value", "temperature"),
    (CHAT, chat(top_p=0), "invalid_value", "top_p"),
    (CHAT, chat(top_p=1.1), "invalid_value", "top_p"),
    (CHAT, chat(top_k=-1), "invalid_value", "top_k"),
    (CHAT, chat(top_k=HUGE), "invalid_value", "top_k"),
    (CHAT, chat(min_p=2), "invalid_value", "min_p"),
    (CHAT, chat(seed=HUGE), "invalid_value", "seed"),
    (CHAT, chat(seed="lucky"), "invalid_value", "seed"),
    (CHAT, chat(stop=""), "invalid_value", "stop"),
    (CHAT, chat(stop=5), "invalid_value", "stop"),
    (CHAT, chat(stop=["a", ""]), "invalid_value", "stop.1"),
    (CHAT, chat(stop=["a"] * 17), "invalid_value", "stop"),
    (CHAT, chat(stream="yes"), "invalid_value", "stream"),
    (CHAT, chat(stream=True, stream_options={"include_usage": 1}), "invalid_value",
     "stream_options.include_usage"),
    (CHAT, chat(n=2), "unsupported_parameter", "n"),
    (CHAT, chat(n="2"), "invalid_value", "n"),
    (CHAT, chat(tools=[{"type": "function"}]), "unsupported_parameter", "tools"),
    (CHAT, chat(tools="all"), "invalid_value", "tools"),
    (CHAT, chat(functions=[{"name": "f"}]), "unsupported_parameter", "functions"),
    (CHAT, chat(tool_choice="required"), "unsupported_parameter", "tool_choice"),
    (CHAT, chat(response_format={"type": "yaml"}), "bad_schema",
     "response_format"),
    (CHAT, chat(top_logprobs=50), "invalid_value", "top_logprobs"),
    (CHAT, chat(frequency_penalty=2.5), "invalid_value", "frequency_penalty"),
    (CHAT, chat(presence_penalty=-3.0), "invalid_value", "presence_penalty"),
    (CHAT, chat(logit_bias={"5": 500}), "invalid_value", "logit_bias.5"),
    (CHAT, said("x" * CONTEXT), "context_length_exceeded", "messages"),
    (TEXT, without("prompt", text()), "missing_field", "prompt"),
    (TEXT, text(prompt=None), "invalid_value", "prompt"),
    (TEXT, text(prompt=5), "invalid_value", "prompt"),
    (TEXT, text(prompt=["a", "b"]), "invalid_value", "prompt.0"),
    (TEXT, text(prompt=[1, -1]), "invalid_value", "prompt.1"),
    (TEXT, text(prompt=[1, HUGE]), "invalid_value", "prompt.1"),
    (TEXT, text(prompt=[1, 1.5]), "invalid_value", "prompt.1"),
    (TEXT, text(prompt=[]), "empty_prompt", "prompt"),
    (TEXT, text(prompt=""), "empty_prompt", "prompt"),
    (TEXT, text(prompt=[1, 257]), "bad_tokens", "prompt"),
    (TEXT, text(prompt="x" * CONTEXT), "context_length_exceeded", "prompt"),
    (TEXT, text(best_of=2), "unsupported_parameter", "best_of"),
    (TEXT, text(echo=True), "unsupported_parameter", "echo"),
    (TEXT, text(suffix="end"), "unsupported_parameter", "suffix"),
    (TEXT, text(logprobs=300), "invalid_value", "logprobs"),
    (TEXT, text(n=3), "unsupported_parameter", "n"),
]  # fmt: skip


def encoded(body: bytes | dict[str, Any]) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    BAD,
    ids=[f"{number}-{code}-{param}" for number, (_, _, code, param) in enumerate(BAD)],
)
def test_bad_requests(
    node: LiveNode, path: str, body: bytes | dict[str, Any], code: str, param: str | None
) -> None:
    variants = [body]
    if isinstance(body, dict) and "stream" not in body:
        variants.append({**body, "stream": True})
    for variant in variants:
        response = node.http.post(path, content=encoded(variant))
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_a_context_overflow_says_by_how_much(node: LiveNode) -> None:
    error = error_of(node.http.post(TEXT, json=text(prompt="x" * 3000)))
    assert error["message"] == "the prompt has 3,000 tokens; the context holds 2,048"
    assert "llmster load KEY --context" in error["hint"]
    # One token less than the context is the most that leaves room for an answer.
    longest = node.http.post(TEXT, json=text(prompt="x" * (CONTEXT - 1)))
    assert longest.json()["usage"] == {
        "prompt_tokens": CONTEXT - 1,
        "completion_tokens": 1,
        "total_tokens": CONTEXT,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_model_that_nobody_has(node: LiveNode, path: str) -> None:
    body = {"model": "gpt-9", "messages": HELLO, "prompt": "hello"}
    response = node.http.post(path, json=body)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert error["param"] == "model"
    assert error["message"] == "no node of the pool has the model 'gpt-9' (loaded: tiny)"
    assert "llmster import" in error["hint"]


def test_a_model_that_is_not_loaded(node: LiveNode) -> None:
    response = node.http.post(CHAT, json=chat(model="Asleep"))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (404, "model_not_loaded")
    assert error["hint"] == "run `llmster load Asleep`"


def test_the_list_of_models_has_what_can_be_asked(node: LiveNode) -> None:
    one = {"id": "tiny", "object": "model", "created": 0, "owned_by": "llmster"}
    assert node.http.get("/v1/models").json() == {"object": "list", "data": [one]}
    assert node.http.get("/v1/models/TINY").json() == one
    response = node.http.get("/v1/models/asleep")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_errors_never_quote_the_prompt(node: LiveNode) -> None:
    for body in (
        said([{"type": "text", "text": "my secret", "more": 1}, {"type": "my secret"}]),
        {**said("my secret"), "max_tokens": "my secret"},
        {"model": "tiny", "messages": "my secret"},
        said("my secret" * 1000),
    ):
        response = node.http.post(CHAT, json=body)
        assert response.status_code == 400
        assert "secret" not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("PUT", TEXT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
    ],
)
def test_wrong_routes(node: LiveNode, method: str, path: str, status: int, code: str) -> None:
    response = node.http.request(method, path)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert f"{method} {path}" in error["message"]
    assert ("allow" in response.headers) == (status == 405)


def test_a_body_that_is_too_large(node: LiveNode) -> None:
    response = node.http.post(CHAT, content=b" " * (MAX_BODY_BYTES + 1))
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield b" " * (1 << 20)

    response = node.http.post(CHAT, content=chunks())
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_a_body_of_the_largest_size_is_read(node: LiveNode) -> None:
    body = encoded(chat())
    response = node.http.post(CHAT, content=body + b" " * (MAX_BODY_BYTES - len(body)))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("header", "value", "code"),
    [
        ("host", "evil.example", "bad_host"),
        ("host", "evil.example:1234", "bad_host"),
        ("host", "127.evil.example", "bad_host"),
        ("host", "127.0.0.1.evil.example", "bad_host"),
        ("host", "localhost.evil.example", "bad_host"),
        ("host", "10.0.0.1", "bad_host"),
        ("host", "0.0.0.0", "bad_host"),
        ("host", "[", "bad_host"),
        ("host", "", "bad_host"),
        ("origin", "https://evil.example", "bad_origin"),
        ("origin", "http://127.evil.example", "bad_origin"),
        ("origin", "http://localhost.evil.example", "bad_origin"),
        ("origin", "http://[", "bad_origin"),
        ("origin", "null", "bad_origin"),
        ("origin", "file://", "bad_origin"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/nothing"])
def test_web_pages_of_others_are_kept_out(
    node: LiveNode, path: str, header: str, value: str, code: str
) -> None:
    response = node.http.post(path, json=chat(), headers={header: value})
    assert (response.status_code, error_of(response)["code"]) == (403, code)
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3", "[::1]:9"])
def test_this_machine_is_let_in(node: LiveNode, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert node.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "127.evil.example", "example.org"]
)
def test_nothing_is_opened_to_the_outside(host: str) -> None:
    with pytest.raises(Conflict) as caught:
        require_loopback(host)
    assert caught.value.code == "needs_tls"
    assert "--host 127.0.0.1" in caught.value.hint


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.9", "::1"])
def test_loopback_needs_no_token(host: str) -> None:
    require_loopback(host)


def test_request_ids_are_unique_and_not_the_client_s(node: LiveNode) -> None:
    """A client that chose them could cancel, or mix itself up with, the requests of others."""
    chosen = {"x-llmster-request-id": "req-mine-00000000"}
    ids = {
        node.http.get(path, headers=chosen).headers["x-llmster-request-id"]
        for path in ("/v1/models", "/v1/models", "/v1/nothing", "/node/v1/status")
    }
    assert len(ids) == 4
    assert chosen["x-llmster-request-id"] not in ids


def test_a_plan_that_makes_no_sense(node: LiveNode) -> None:
    for plan in ("{", '{"kind": "guess"}', "\xe9"):
        headers = {"x-llmster-plan": plan.encode("latin-1")}
        response = node.http.post(CHAT, json=chat(), headers=headers)
        assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")


def test_bugs_of_ours_are_one_envelope_too(
    node: LiveNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("my secret")

    monkeypatch.setattr(node.node, "render", broken)
    response = node.http.post(CHAT, json=chat())
    error = error_of(response)
    assert (response.status_code, error["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    # For whoever has to find the bug.
    assert any(record.exc_info for record in caplog.records)
    monkeypatch.undo()
    assert node.http.post(CHAT, json=chat()).status_code == 200


def test_a_client_that_hangs_up_in_the_middle_of_its_request(
    node: LiveNode, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", node.node.config.port)) as client:
        client.sendall(head.encode() + b'{"model":')
    # The next request is served after the server has seen the end of that one.
    for _ in range(3):
        assert node.http.post(CHAT, json=chat()).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
