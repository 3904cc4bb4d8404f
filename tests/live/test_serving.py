"""A pool of two mixed nodes serves the sample model to real clients."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import NotFoundError, OpenAI

from fakes.local_pool import MODEL, PoolOnDisk, running_pool, text_of, until

pytestmark = pytest.mark.live

QUESTION = "Write one sentence about the sea."


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Iterator[PoolOnDisk]:
    with running_pool(tmp_path_factory.mktemp("serving"), sample_cache, nodes=2) as running:
        yield running


def client_of(url: str) -> OpenAI:
    http = httpx.Client(trust_env=False)
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)


def test_the_openai_client_gets_an_answer_with_usage_and_headers(pool: PoolOnDisk) -> None:
    with client_of(pool.url(1)) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=200,
        )
        answer = raw.parse()
    assert "sea" in (answer.choices[0].message.content or "").lower()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert raw.headers["x-llmster-route"] == 'colocated;node="node-1"'
    assert raw.headers["x-llmster-request-id"].startswith("req-")


def test_the_openai_client_streams_the_same_text(pool: PoolOnDisk) -> None:
    with client_of(pool.url(1)) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
        events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == text_of(pool.ask(QUESTION, max_tokens=100))
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens > 3


def test_text_completions_stop_strings_seed_and_length(pool: PoolOnDisk) -> None:
    with client_of(pool.url(2)) as client:
        greedy = client.completions.create(
            model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=16
        )
        stopped = client.completions.create(
            model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=16, stop=" six"
        )
        seeded = [
            client.completions.create(
                model=MODEL, prompt="A story:", temperature=1.2, top_p=0.9, seed=7, max_tokens=12
            )
            .choices[0]
            .text
            for _ in range(2)
        ]
    assert greedy.choices[0].finish_reason == "length"
    assert " six" in greedy.choices[0].text
    assert stopped.choices[0].text == greedy.choices[0].text.split(" six")[0]
    assert stopped.choices[0].finish_reason == "stop"
    assert seeded[0] == seeded[1]


def test_models_are_listed_on_every_node_and_unknown_ones_are_refused(pool: PoolOnDisk) -> None:
    for url in (pool.url(1), pool.url(2), pool.control):
        with client_of(url) as client:
            assert [m.id for m in client.models.list()] == [MODEL]
            with pytest.raises(NotFoundError) as refused:
                client.chat.completions.create(
                    model="gpt-none", messages=[{"role": "user", "content": "x"}]
                )
        assert refused.value.code == "model_not_found"
        assert "llmster" in refused.value.body["hint"]  # type: ignore[index,call-overload]


def test_any_node_answers_for_a_model_that_only_another_has_loaded(pool: PoolOnDisk) -> None:
    pool.cli("unload", MODEL, "--node", "node-1")
    try:
        until(lambda: pool.instance("node-1") is None, 10, "unloaded")
        answer = pool.capital(pool.url(1))
        assert "Paris" in text_of(answer)
        assert answer.headers["x-llmster-route"] == 'colocated;node="node-2"'
    finally:
        pool.cli("load", MODEL, "--node", "node-1")
        pool.until_serving()


def test_many_requests_at_once_are_served_together(pool: PoolOnDisk) -> None:
    """All are in the engine's batch at the same time, and all are answered."""

    def one(_: int) -> str:
        return text_of(pool.ask(QUESTION + " Explain.", pool.url(1), max_tokens=48))

    active: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(trust_env=False) as http:
            while not stop.is_set():
                found = http.get(f"{pool.url(1)}/node/v1/instances").json()
                active.append(found[0]["active"])
                time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(one, range(8)))
    finally:
        stop.set()
        watcher.join()
    assert all(len(answer) > 20 for answer in answers)
    assert max(active) >= 4


def test_a_client_that_hangs_up_stops_the_generation_within_a_second(pool: PoolOnDisk) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count from one to a thousand."}],
        "max_tokens": 4000,
        "stream": True,
        "temperature": 0,
    }
    for base in (pool.url(1), pool.control):
        with httpx.Client(trust_env=False, timeout=60) as http:
            with http.stream("POST", f"{base}/v1/chat/completions", json=body) as response:
                request_id = response.headers["x-llmster-request-id"]
                next(response.iter_lines())
            left_at = time.monotonic()

        def idle() -> bool:
            with httpx.Client(trust_env=False) as http:
                found = [http.get(f"{pool.url(n)}/node/v1/instances").json()[0] for n in (1, 2)]
            return all(i["active"] == 0 and i["kv_used_cells"] == 0 for i in found)

        until(idle, 2, "generation stopped")
        # The counters are told once a second, so allow for that on top of the second.
        assert time.monotonic() - left_at < 2.0
        assert pool.route(request_id)["status"] == "cancelled"


def test_the_commands_show_the_pool_as_json_and_as_tables(pool: PoolOnDisk) -> None:
    answer = pool.ask("Hello.")
    request_id = answer.headers["x-llmster-request-id"]
    route = pool.route(request_id)
    assert route["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert route["ttft_s"] > 0
    assert [n["name"] for n in pool.json("nodes")] == ["node-1", "node-2"]
    assert {i["state"] for i in pool.json("ps")} == {"ready"}
    assert pool.json("ls")[0]["nodes"] == ["node-1", "node-2"]
    assert request_id in {r["request_id"] for r in pool.json("routes", "-n", "50")}
    assert sum(u["requests"] for u in pool.json("usage")) > 0
    for command in ("nodes", "ps", "ls", "routes", "usage"):
        text = pool.cli(command).stdout
        assert "smollm2" in text or "node-1" in text


def test_a_draining_node_gets_no_new_requests(pool: PoolOnDisk) -> None:
    pool.cli("drain", "node-1")
    try:
        for url in (pool.control, pool.url(1)):
            answer = pool.capital(url)
            assert answer.headers["x-llmster-route"] == 'colocated;node="node-2"'
    finally:
        pool.cli("drain", "node-1", "--undo")


def test_another_gguf_is_imported_and_loaded_and_a_truncated_one_refused(
    pool: PoolOnDisk, sample_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "my-model.gguf"
    data = bytearray(sample_model.read_bytes())
    # The same model with another name in its metadata: other content, other digest.
    at = data.index(b"Smollm2 135M 8k")
    data[at : at + 7] = b"Another"
    other.write_bytes(data)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[: len(data) // 2])

    refused = pool.cli("import", str(broken), "--json", check=False)
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["code"] == "bad_gguf"
    missing = pool.cli("import", str(tmp_path / "nothing.gguf"), check=False)
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr

    pool.cli("import", str(other))
    unloaded = pool.capital(pool.control, model="my-model")
    assert unloaded.status_code == 404
    assert "llmster load my-model" in unloaded.json()["error"]["hint"]
    pool.cli("load", "my-model", "--node", "node-2", "--context", "512")
    try:
        assert "Paris" in text_of(pool.capital(pool.url(1), model="my-model"))
        overflow = pool.ask("word " * 600, pool.url(1), model="my-model")
        assert overflow.status_code == 400
        assert overflow.json()["error"]["code"] == "context_length_exceeded"
        assert "512" in overflow.json()["error"]["message"]
    finally:
        pool.cli("unload", "my-model")
