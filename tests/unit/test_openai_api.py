"""The OpenAI API of a node: answers, whole and streamed, in OpenAI's own shapes."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from fakes.node import LiveNode, add_model, new_home, no_engine_left
from llmster_daemon.chat_template import render

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
PROMPT = render(None, HELLO, "", "")
ROUTE = 'colocated;node="test"'


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    """`tiny` answers until it is stopped; `brief` ends by itself after a few tokens."""
    home = new_home(tmp_path_factory.mktemp("node"))
    add_model(home, "tiny")
    add_model(home, "brief")
    add_model(home, "strict", template="{{ raise_exception('no system message') }}")
    with no_engine_left(home), LiveNode(home) as node:
        node.load("tiny", answer=1 << 40)
        node.load("brief", answer=5)
        node.load("strict")
        yield node


@contextlib.contextmanager
def openai_client(node: LiveNode, strict: bool) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{node.url}/v1",
            api_key="none",
            http_client=http,
            max_retries=0,
            _strict_response_validation=strict,
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(node: LiveNode) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, told to be strict about the shape of what it gets."""
    with openai_client(node, strict=True) as client:
        yield client


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, **changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0, **changes}


def answer(node: LiveNode, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer, after what must hold for every one."""
    response = node.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-llmster-route"] == ROUTE
    result: dict[str, Any] = response.json()
    assert result["id"].endswith(response.headers["x-llmster-request-id"])
    return result


def content(node: LiveNode, **changes: Any) -> str:
    """The text of a whole chat answer."""
    result: str = answer(node, CHAT, chat(**changes))["choices"][0]["message"]["content"]
    return result


def events(node: LiveNode, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed answer, after what must hold for every stream."""
    response = node.http.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-llmster-route"] == ROUTE
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in data)
    found = [json.loads(event.removeprefix("data: ")) for event in data]
    heads = {(event["id"], event["created"], event["object"], event["model"]) for event in found}
    assert len(heads) == 1
    assert found[0]["id"].endswith(response.headers["x-llmster-request-id"])
    return found


def test_a_whole_chat_answer(node: LiveNode) -> None:
    result = answer(node, CHAT, chat())
    words = result["choices"][0]["message"]["content"]
    assert re.fullmatch("[a-z]{12}", words)
    assert result["id"].startswith("chatcmpl-req-")
    assert 1.6e9 < result["created"] < 1e10
    assert result == {
        "id": result["id"],
        "object": "chat.completion",
        "created": result["created"],
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": words},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 12,
            "total_tokens": len(PROMPT) + 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_whole_text_answer(node: LiveNode) -> None:
    result = answer(node, TEXT, text())
    words = result["choices"][0]["text"]
    assert re.fullmatch("[a-z]{12}", words)
    assert result["id"].startswith("cmpl-req-")
    assert (result["object"], result["model"]) == ("text_completion", "tiny")
    assert result["choices"] == [
        {"index": 0, "text": words, "logprobs": None, "finish_reason": "length"}
    ]
    assert result["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_streamed_chat_answer(node: LiveNode) -> None:
    first, *middle, last = events(node, CHAT, chat())
    assert first["object"] == "chat.completion.chunk"
    assert set(first) == {"id", "object", "created", "model", "choices"}
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    for event in middle:
        (choice,) = event["choices"]
        assert set(choice["delta"]) == {"content"}
        assert (choice["index"], choice["finish_reason"]) == (0, None)
    assert "".join(e["choices"][0]["delta"]["content"] for e in middle) == content(node)
    assert last["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    ]


def test_a_streamed_text_answer(node: LiveNode) -> None:
    *middle, last = events(node, TEXT, text())
    whole = answer(node, TEXT, text())["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in middle) == whole
    assert {event["object"] for event in middle} == {"text_completion"}
    assert {event["choices"][0]["finish_reason"] for event in middle} == {None}
    assert last["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    ]


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (TEXT, text())])
def test_usage_in_a_stream(node: LiveNode, path: str, body: dict[str, Any]) -> None:
    plain = events(node, path, body)
    assert not any("usage" in event for event in plain)
    told = events(node, path, {**body, "stream_options": {"include_usage": True}})
    assert len(told) == len(plain) + 1
    assert [event["usage"] for event in told[:-1]] == [None] * len(plain)
    assert told[-1]["choices"] == []
    assert told[-1]["usage"] == answer(node, path, body)["usage"]


def test_nothing_waits_for_an_acknowledgement(node: LiveNode) -> None:
    """Without TCP_NODELAY each answer takes 40 ms, for its head and its body are two segments."""
    taken_s = [node.http.get("/v1/models").elapsed.total_seconds() for _ in range(20)]
    assert sorted(taken_s)[5] < 0.035


def test_openai_s_client_reads_a_chat(client: openai.OpenAI, node: LiveNode) -> None:
    result = client.chat.completions.create(**chat())
    assert result.choices[0].message.content == content(node)
    assert result.usage is not None
    assert result.usage.total_tokens == len(PROMPT) + 12


def test_openai_s_client_reads_a_stream(client: openai.OpenAI, node: LiveNode) -> None:
    stream = client.chat.completions.create(
        **chat(), stream=True, stream_options={"include_usage": True}
    )
    chunks = [ChatCompletionChunk.model_validate(chunk.model_dump()) for chunk in stream]
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == content(node)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_openai_s_client_reads_text(client: openai.OpenAI, node: LiveNode) -> None:
    whole = client.completions.create(**text())
    assert whole.choices[0].text == answer(node, TEXT, text())["choices"][0]["text"]
    # OpenAI's type for these has no null as `finish_reason`; its server sends it all the same.
    with openai_client(node, strict=False) as lenient:
        stream = lenient.completions.create(**text(), stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_openai_s_client_reads_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["brief", "strict", "tiny"]
    assert client.models.retrieve("tiny").owned_by == "llmster"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**chat(model="gpt-9"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**chat(n=2))
    assert (bad.value.code, bad.value.type) == ("unsupported_parameter", "invalid_request_error")


def test_the_model_ends_its_answer(node: LiveNode) -> None:
    result = answer(node, CHAT, chat(model="brief", max_tokens=None))
    (choice,) = result["choices"]
    assert choice["finish_reason"] == "stop"
    # The token that ends it has no text.
    assert result["usage"]["completion_tokens"] == len(choice["message"]["content"]) + 1
    last = events(node, CHAT, chat(model="brief", max_tokens=None))[-1]
    assert last["choices"][0]["finish_reason"] == "stop"


def test_the_context_ends_an_answer(node: LiveNode) -> None:
    result = answer(node, TEXT, text(max_tokens=None))
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["total_tokens"] == 2048
    # No number of tokens is too many to ask for.
    brief = answer(node, TEXT, text(model="brief", max_tokens=1_000_000_000))
    assert brief["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_number_of_tokens(node: LiveNode, tokens: int) -> None:
    twelve = content(node)
    assert content(node, max_tokens=tokens) == twelve[:tokens]
    # The newer name wins.
    assert content(node, max_tokens=11, max_completion_tokens=tokens) == twelve[:tokens]
    assert content(node, max_tokens=None, max_completion_tokens=tokens) == twelve[:tokens]
    usage = answer(node, TEXT, text(max_tokens=tokens))["usage"]
    assert usage["completion_tokens"] == tokens


def test_stop_strings(node: LiveNode) -> None:
    twelve = content(node)
    stop = twelve[5:8]
    kept = twelve[: twelve.index(stop)]
    for stops in (stop, [stop], ["not in it", stop], [stop] * 16):
        result = answer(node, CHAT, chat(stop=stops))
        (choice,) = result["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (kept, "stop")
        *middle, last = events(node, CHAT, chat(stop=stops))[1:]
        assert "".join(e["choices"][0]["delta"]["content"] for e in middle) == kept
        assert last["choices"][0]["finish_reason"] == "stop"
    assert content(node, stop="not in it") == twelve
    assert content(node, stop=[]) == twelve
    # What begins like a stop string is held back, not lost.
    assert content(node, stop=twelve[-3:] + "!") == twelve


def test_a_stop_string_at_the_very_beginning(node: LiveNode) -> None:
    first, last = events(node, CHAT, chat(stop=content(node)[0]))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"


def test_seeds_repeat_an_answer(node: LiveNode) -> None:
    def at(**changes: Any) -> str:
        return content(node, temperature=1, max_tokens=40, **changes)

    assert at(seed=7) == at(seed=7)
    assert at(seed=7) != at(seed=8)
    assert at(seed=-1) == at(seed=-1)
    assert at(seed=(1 << 63) - 1) == at(seed=(1 << 63) - 1)
    assert at() != at()
    assert content(node, seed=7) == content(node, seed=8)


def test_streams_and_seeds(node: LiveNode) -> None:
    body = chat(temperature=1, seed=7)
    middle = events(node, CHAT, body)[1:-1]
    streamed = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    assert streamed == content(node, temperature=1, seed=7)


def test_a_prompt_of_tokens(node: LiveNode) -> None:
    """The fake model's tokens are bytes."""
    by_text = answer(node, TEXT, text())
    by_tokens = answer(node, TEXT, text(prompt=list(b"hello")))
    assert by_tokens["choices"] == by_text["choices"]
    assert by_tokens["usage"] == by_text["usage"]


def test_a_chat_is_its_rendered_prompt(node: LiveNode) -> None:
    whole = answer(node, TEXT, text(prompt=PROMPT))
    assert whole["choices"][0]["text"] == content(node)


def test_pieces_of_content_are_one_text(node: LiveNode) -> None:
    pieces = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert content(node, messages=[{"role": "user", "content": pieces}]) == content(node)


def test_developer_messages_are_system_messages(node: LiveNode) -> None:
    answers = [
        content(node, messages=[{"role": role, "content": "be brief"}, *HELLO])
        for role in ("developer", "system", "user")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_messages_with_more_than_text_and_role(node: LiveNode) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [], "refusal": None}
    assert len(content(node, messages=[*HELLO, said, *HELLO])) == 12


def test_any_characters(node: LiveNode) -> None:
    strange = "".join(map(chr, [0, 9, 10, 34, 92, 0x2028, 0xFEFF, 0x1F600]))
    body = text(prompt=strange)
    assert answer(node, TEXT, body)["usage"]["prompt_tokens"] == len(strange.encode())


def test_what_changes_nothing_is_accepted(node: LiveNode) -> None:
    harmless = {
        "n": 1,
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": False,
        "top_p": 1,
        "stop": None,
        "seed": None,
    }
    assert content(node, **harmless) == content(node)


def test_names_of_models_in_any_case(node: LiveNode) -> None:
    result = answer(node, CHAT, chat(model="TINY"))
    assert result["model"] == "tiny"


def test_one_of_several_instances_by_its_id(node: LiveNode) -> None:
    assert node.load("tiny", answer=1 << 40).id == "tiny:2"
    try:
        result = answer(node, CHAT, chat(model="tiny:2"))
        assert result["model"] == "tiny"
        assert [m["id"] for m in node.http.get("/v1/models").json()["data"]].count("tiny") == 1
    finally:
        node.call(node.node.instances.unload("tiny:2"))


def test_a_chat_that_the_template_refuses(node: LiveNode) -> None:
    for stream in (False, True):
        response = node.http.post(CHAT, json=chat(model="strict", stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "bad_messages")
        assert "no system message" in error["message"]
    # Text needs no template.
    assert len(answer(node, TEXT, text(model="strict"))["choices"][0]["text"]) <= 12


def test_a_plan_of_the_gateway_is_carried_out(node: LiveNode) -> None:
    """A node that it names and that is not known here is done without."""
    plans = [
        {"kind": "colocated"},
        {"kind": "split", "prefill_node_id": "f" * 32, "attempt": 2},
    ]
    for plan in plans:
        headers = {"x-llmster-plan": json.dumps(plan), "x-llmster-request-id": "req-of-the-gateway"}
        response = node.http.post(CHAT, json=chat(), headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["x-llmster-request-id"] == "req-of-the-gateway"
        assert response.headers["x-llmster-route"] == ROUTE
