"""Requests that end before their time: engines that die under them, clients that go away."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from fakes.node import ENDLESS, LIMIT_S, POLL_S, LiveNode, add_model, new_home, no_engine_left
from llmster_daemon.protocol.node import RouteRecord

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveNode]:
    home = new_home(tmp_path_factory.mktemp("node"))
    add_model(home)
    with no_engine_left(home), LiveNode(home) as node:
        yield node


@pytest.fixture
def load(node: LiveNode) -> Iterator[Callable[..., None]]:
    """Loads the model with options, for one test."""

    def load(slots: int = 8, **options: object) -> None:
        node.load("tiny", slots, **options)

    yield load
    node.call(node.node.instances.unload("tiny"))


@pytest.fixture
def routes(node: LiveNode, monkeypatch: pytest.MonkeyPatch) -> list[RouteRecord]:
    """What the node would report of its requests."""
    found: list[RouteRecord] = []
    monkeypatch.setattr(node.node, "record", found.append)
    return found


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "temperature": 0, **changes}


def wait_for(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(POLL_S)


def error_in(data: dict[str, Any]) -> dict[str, Any]:
    assert set(data) == {"error"}
    error: dict[str, Any] = data["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["message"]
    assert error["hint"]
    return error


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {}), (TEXT, {"prompt": "hello"})])
def test_an_engine_dies_in_the_middle_of_a_stream(
    node: LiveNode,
    load: Callable[..., None],
    routes: list[RouteRecord],
    path: str,
    prompt: dict[str, str],
) -> None:
    load(die_after_steps=5, answer=1 << 40)
    response = node.http.post(path, json=chat(stream=True, **prompt))
    assert response.status_code == 200
    *events, last, rest = response.text.split("\n\n")
    assert rest == ""
    assert len(events) == 4 + (path == CHAT)
    assert not any("error" in event for event in events)
    error = error_in(json.loads(last.removeprefix("data: ")))
    assert (error["code"], error["type"]) == ("engine_lost", "server_error")
    assert "[DONE]" not in response.text
    wait_for(lambda: routes, "it is reported")
    (route,) = routes
    assert (route.status, route.error_code) == ("failed", "engine_lost")
    assert (route.completion_tokens, route.model) == (4, "tiny")


def test_openai_s_client_sees_the_error_in_a_stream(
    node: LiveNode, load: Callable[..., None]
) -> None:
    load(die_after_steps=5, answer=1 << 40)
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", http_client=http) as client,
    ):
        said = ""
        with pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(**chat(), stream=True):
                said += chunk.choices[0].delta.content or ""
    assert len(said) == 4
    assert caught.value.code == "engine_lost"


def test_an_engine_dies_in_the_middle_of_a_whole_answer(
    node: LiveNode, load: Callable[..., None], routes: list[RouteRecord]
) -> None:
    load(die_after_steps=5, answer=1 << 40)
    response = node.http.post(CHAT, json=chat())
    assert (response.status_code, error_in(response.json())["code"]) == (503, "engine_lost")
    assert response.headers["x-llmster-route"] == 'colocated;node="test"'
    assert response.headers["x-llmster-request-id"] == routes[0].request_id
    assert response.headers["retry-after"] == "1"
    assert routes[0].status == "failed"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_dies_before_the_first_token(
    node: LiveNode, load: Callable[..., None], stream: bool
) -> None:
    load(die_after_steps=1)
    response = node.http.post(CHAT, json=chat(stream=stream))
    assert (response.status_code, error_in(response.json())["code"]) == (503, "engine_lost")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-llmster-route"] == "none"
    # It is being started again: not the client's fault, and not for long.
    for name in ("tiny", "TINY"):
        response = node.http.post(CHAT, json=chat(model=name, stream=stream))
        assert response.status_code == 503
        error = error_in(response.json())
        if error["code"] != "engine_lost":
            assert error["code"] == "model_not_ready"
            assert "exit code 70" in error["message"] or "loading" in error["message"]
    wait_for(lambda: node.instance().state == "ready", "it is back")
    assert node.instance().restarts == 1


def test_an_instance_that_is_restarted_is_not_unknown(
    node: LiveNode, load: Callable[..., None]
) -> None:
    load()
    node.load("tiny", die_after_steps=1)
    try:
        assert node.http.post(CHAT, json=chat(model="tiny:2")).status_code == 503
        response = node.http.post(CHAT, json=chat(model="tiny:2"))
        assert (response.status_code, response.json()["error"]["code"]) in (
            (503, "model_not_ready"),
            (503, "engine_lost"),
        )
        # The other one serves whoever asks for the model.
        assert node.http.post(CHAT, json=chat(max_tokens=2)).status_code == 200
    finally:
        node.call(node.node.instances.unload("tiny:2"))


class RawClient:
    """A connection that can be dropped at any moment."""

    def __init__(self, node: LiveNode, body: dict[str, Any]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", node.node.config.port), LIMIT_S)
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
        self._socket.sendall(head.encode() + data)

    def read_until(self, mark: bytes) -> None:
        got = b""
        while mark not in got:
            more = self._socket.recv(4096)
            assert more, f"it ended before {mark!r}: {got!r}"
            got += more

    def hang_up(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_hangs_up_costs_nothing_more(
    node: LiveNode, load: Callable[..., None], routes: list[RouteRecord], stream: bool
) -> None:
    load(**ENDLESS)
    # One that stays, so that the engine tells with every step how many it works on.
    stays = RawClient(node, chat(stream=True))
    stays.read_until(b'"content":')
    goes = RawClient(node, chat(stream=stream))
    if stream:
        goes.read_until(b'"delta":{"content":')
    wait_for(lambda: node.instance().active == 2, "both are worked on")
    goes.hang_up()
    wait_for(lambda: node.instance().active == 1, "one is cancelled", limit_s=1)
    wait_for(lambda: routes, "it is reported")
    assert (routes[0].status, routes[0].error_code) == ("cancelled", None)
    assert routes[0].completion_tokens < 500
    stays.hang_up()
    wait_for(lambda: (node.instance().active, node.instance().kv_used_cells) == (0, 0), "all end")
    wait_for(lambda: len(routes) == 2, "both are reported")
    assert node.http.post(CHAT, json=chat(max_tokens=2)).status_code == 200


def test_a_client_that_hangs_up_while_it_waits_for_its_turn(
    node: LiveNode, load: Callable[..., None]
) -> None:
    load(slots=1, **ENDLESS)
    first = RawClient(node, chat(stream=True))
    first.read_until(b'"delta":{"content":')
    for stream in (False, True):
        second = RawClient(node, chat(stream=stream))
        wait_for(lambda: node.instance().waiting == 1, "the second one waits")
        second.hang_up()
        wait_for(lambda: node.instance().waiting == 0, "nobody waits", limit_s=1)
    assert node.instance().active == 1
    first.hang_up()
    wait_for(lambda: node.instance().active == 0, "all end")


def test_many_clients_hang_up_at_once(node: LiveNode, load: Callable[..., None]) -> None:
    load(**ENDLESS)
    clients = [RawClient(node, chat(stream=bool(number % 2))) for number in range(12)]
    wait_for(lambda: node.instance().active + node.instance().waiting == 12, "all are there")
    for client in clients:
        client.hang_up()
    wait_for(lambda: node.instance().active + node.instance().waiting == 0, "all are gone")
    assert node.instance().kv_used_cells == 0


def test_requests_are_served_together(
    node: LiveNode, load: Callable[..., None], routes: list[RouteRecord]
) -> None:
    load(slots=8, step_s=0.01, answer=1 << 40)
    prompts = [f"prompt {number}" for number in range(8)]

    def ask(prompt: str) -> str:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 0}
        response = node.http.post(TEXT, json=body)
        assert response.status_code == 200
        text: str = response.json()["choices"][0]["text"]
        return text

    alone = ask(prompts[0])
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, prompt) for prompt in prompts]
        wait_for(lambda: node.instance().active == 8, "all eight are worked on at once")
        together = [future.result() for future in asking]
    assert together[0] == alone
    assert len(set(together)) == 8
    assert len({route.request_id for route in routes}) == 9
    assert {route.status for route in routes} == {"ok"}
    for route in routes:
        assert (route.prompt_tokens, route.completion_tokens) == (8, 30)
        assert route.ttft_s is not None
        assert route.tpot_s is not None
        assert 0 < route.ttft_s < route.duration_s
        assert route.tpot_s >= 0.009


def test_more_requests_than_slots_are_all_served(node: LiveNode, load: Callable[..., None]) -> None:
    load(slots=2, answer=1 << 40)
    with ThreadPoolExecutor(10) as pool:
        asking = [pool.submit(node.http.post, CHAT, json=chat(max_tokens=20)) for _ in range(10)]
        answers = [future.result().json() for future in asking]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert len({answer["id"] for answer in answers}) == 10


def test_unloading_ends_requests_with_an_error(node: LiveNode, load: Callable[..., None]) -> None:
    load(**ENDLESS)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(node.http.post, CHAT, json=chat(stream=True))
        wait_for(lambda: node.instance().active == 1, "it is worked on")
        node.call(node.node.instances.unload("tiny"))
        *_, last, _ = asking.result().text.split("\n\n")
    assert error_in(json.loads(last.removeprefix("data: ")))["code"] == "engine_lost"
    response = node.http.post(CHAT, json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_loaded")
    load()
