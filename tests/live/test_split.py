"""Prefill on one node, decode on another: the same tokens, whatever happens to the hand-over."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.local_pool import PoolOnDisk, running_pool, text_of, until

pytestmark = pytest.mark.live

SENTENCE = "A ship left port at noon, and a storm came up from the west. "


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Iterator[PoolOnDisk]:
    home = tmp_path_factory.mktemp("split")
    with running_pool(home, sample_cache, nodes=2, roles="prefill,decode") as running:
        yield running


@pytest.mark.parametrize("prompt_tokens", [10, 60, 300, 900, 2000])
def test_split_and_colocated_give_the_same_tokens(pool: PoolOnDisk, prompt_tokens: int) -> None:
    # The system message makes the shortest chat 30 tokens; a raw prompt has no such floor.
    prompt = (SENTENCE * (prompt_tokens // 14 + 1))[: int(prompt_tokens * 4.35)]
    answers = {}
    for way in ("colocated", "split"):
        answers[way] = pool.http.post(
            f"{pool.url(1)}/v1/completions",
            json={
                "model": "smollm2-135m-instruct",
                "prompt": prompt,
                "temperature": 0,
                "max_tokens": 32,
            },
            headers={"x-llmster-prefer": way},
        )
        assert answers[way].status_code == 200, answers[way].text
        assert answers[way].headers["x-llmster-route"].startswith(way)
    bodies = {way: answer.json() for way, answer in answers.items()}
    used = bodies["split"]["usage"]["prompt_tokens"]
    assert 0.6 * prompt_tokens < used < 1.4 * prompt_tokens
    assert bodies["split"]["choices"] == bodies["colocated"]["choices"]
    assert bodies["split"]["usage"] == bodies["colocated"]["usage"]
    route = pool.route(answers["split"].headers["x-llmster-request-id"])
    assert (route["prefill_node"], route["decode_node"]) == ("node-1", "node-2")
    assert route["kv_bytes"] > used * 23_040
    assert 0 <= route["handover_s"] < 5
    header = answers["split"].headers["x-llmster-route"]
    assert f"kv_bytes={route['kv_bytes']}" in header
    assert "handover_ms=" in header


def test_sampled_output_is_the_same_too(pool: PoolOnDisk) -> None:
    """The decode node samples the first token itself, from the prefill node's logits."""
    fields = {"temperature": 1.0, "seed": 11, "max_tokens": 24}
    colocated = text_of(pool.ask(SENTENCE * 5, prefer="colocated", **fields))
    assert text_of(pool.ask(SENTENCE * 5, prefer="split", **fields)) == colocated


def test_several_splits_at_once_are_all_answered(pool: PoolOnDisk) -> None:
    texts = [f"{SENTENCE * 3} Repeat the number {i}." for i in range(6)]
    found: dict[int, tuple[str, str]] = {}

    def one(i: int) -> None:
        answer = pool.ask(texts[i], prefer="split", max_tokens=12)
        found[i] = (text_of(answer), answer.headers["x-llmster-route"])

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(route.startswith("split") for _, route in found.values())


@pytest.mark.parametrize("victim", ["engine", "daemon"])
def test_when_the_prefill_node_dies_midway_the_request_still_completes(
    pool: PoolOnDisk, victim: str
) -> None:
    prompt = SENTENCE * 60
    expected = text_of(pool.ask(prompt, prefer="colocated"))
    answers: list[str] = []
    routes: list[str] = []

    def ask() -> None:
        answer = pool.ask(prompt, pool.control, prefer="split")
        answers.append(text_of(answer))
        routes.append(answer.headers["x-llmster-route"])

    thread = threading.Thread(target=ask)
    thread.start()

    def computing() -> bool:
        found = pool.http.get(f"{pool.url(1)}/node/v1/instances").json()
        return bool(found and found[0]["active"])

    until(computing, 10, "prefill begun")
    engine = pool.instance("node-1")["pid"]
    os.kill(engine if victim == "engine" else pool.pid("node-1"), signal.SIGKILL)
    thread.join(60)
    assert answers == [expected]
    if victim == "engine":
        assert routes == ['colocated;node="node-2";recomputed="handover-failed"']
    pool.until_serving()


def test_when_the_decode_engine_dies_before_the_first_token_the_request_still_completes(
    pool: PoolOnDisk,
) -> None:
    prompt = SENTENCE * 60
    expected = text_of(pool.ask(prompt, prefer="colocated"))
    answers: list[str] = []
    thread = threading.Thread(
        target=lambda: answers.append(text_of(pool.ask(prompt, pool.control, prefer="split")))
    )
    thread.start()

    def computing() -> bool:
        found = pool.http.get(f"{pool.url(1)}/node/v1/instances").json()
        return bool(found and found[0]["active"])

    until(computing, 10, "prefill begun")
    os.kill(pool.instance("node-2")["pid"], signal.SIGKILL)
    thread.join(60)
    assert answers == [expected]
    pool.until_serving()


def test_a_stopped_prefill_daemon_only_costs_time(pool: PoolOnDisk) -> None:
    prompt = SENTENCE * 4
    expected = text_of(pool.ask(prompt, prefer="colocated"))
    daemon = pool.pid("node-1")
    os.kill(daemon, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        answer = pool.ask(prompt, pool.url(2), prefer="split")
        assert text_of(answer) == expected
        assert time.monotonic() - begun < 40
    finally:
        os.kill(daemon, signal.SIGCONT)
    pool.until_serving()


def test_roles_change_without_loading_again(pool: PoolOnDisk) -> None:
    before = [pool.instance(n)["pid"] for n in ("node-1", "node-2")]
    pool.cli("role", "node-1", "decode")
    pool.cli("role", "node-2", "prefill")
    try:
        answer = pool.ask(SENTENCE)
        assert answer.headers["x-llmster-route"].startswith('split;prefill="node-2"')
    finally:
        pool.cli("role", "node-1", "prefill")
        pool.cli("role", "node-2", "decode")
    assert [pool.instance(n)["pid"] for n in ("node-1", "node-2")] == before
