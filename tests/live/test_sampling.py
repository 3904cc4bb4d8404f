"""Sampling fields, log probabilities and structured output, by the real model and client."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from fakes.local_pool import MODEL, PoolOnDisk, running_pool, text_of

pytestmark = pytest.mark.live

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/name"},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer"},
    },
    "required": ["city", "size", "count"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 12}},
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Iterator[PoolOnDisk]:
    with running_pool(tmp_path_factory.mktemp("sampling"), sample_cache) as running:
        yield running


@pytest.fixture(scope="module")
def client(pool: PoolOnDisk) -> Iterator[OpenAI]:
    http = httpx.Client(trust_env=False)
    with OpenAI(base_url=f"{pool.url(1)}/v1", api_key="none", http_client=http) as found:
        yield found


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_json_schema_is_followed_to_the_end(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a city as JSON."}],
        temperature=temperature,
        seed=5,
        max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": SCHEMA},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"city", "size", "count"}
    assert found["size"] in ("small", "large")
    assert isinstance(found["count"], int)
    assert len(found["city"]) <= 12


def test_a_grammar_is_followed(pool: PoolOnDisk) -> None:
    assert text_of(pool.capital(grammar='root ::= " Rome" | " Oslo"')) in (" Rome", " Oslo")


def test_bad_schemas_and_grammars_are_refused(pool: PoolOnDisk) -> None:
    refused = pool.capital(grammar="root ::= (((")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_grammar")
    for bad in (
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.com/x"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nothing"}}},
    ):
        refused = pool.ask("Hi", response_format=bad)
        assert refused.status_code == 400, bad
        assert refused.json()["error"]["param"] == "response_format"
    assert "Paris" in text_of(pool.capital())


def test_log_probabilities_with_alternatives(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello!"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        best = [a.logprob for a in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        # Greedy: the token is the likeliest one.
        assert math.isclose(token.logprob, best[0])
        assert sum(math.exp(x) for x in best) <= 1.0001
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello!"}],
        temperature=0,
        max_tokens=5,
        logprobs=True,
        stream=True,
    )
    told = [
        t
        for e in stream
        if e.choices and e.choices[0].logprobs
        for t in e.choices[0].logprobs.content or []
    ]
    assert [t.token for t in told] == [t.token for t in choice.logprobs.content]


def test_biases_and_penalties_change_the_answer(pool: PoolOnDisk) -> None:
    plain = pool.capital(logprobs=0, max_tokens=12).json()["choices"][0]
    assert "Paris" in plain["text"]
    tokens = {"7042": -100}  # " Paris"
    biased = text_of(pool.capital(logit_bias=tokens))
    assert "Paris" not in biased
    loop = {"prompt": "The cat sat. The cat sat. The cat sat. The cat sat.", "max_tokens": 12}
    free = text_of(pool.capital(**loop))
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repeat_penalty": 1.8}):
        assert text_of(pool.capital(**loop, **penalty)).count("cat") < free.count("cat")


@pytest.mark.parametrize("seed", [-1, 0, 4294967295, 1 << 40])
def test_any_seed_gives_the_same_answer_twice(pool: PoolOnDisk, seed: int) -> None:
    fields = {"prompt": "A story:", "temperature": 1.5, "top_k": 0, "max_tokens": 16, "seed": seed}
    assert text_of(pool.capital(**fields)) == text_of(pool.capital(**fields))


def test_fields_out_of_range_are_refused(pool: PoolOnDisk) -> None:
    for field, value in (
        ("frequency_penalty", 3),
        ("repeat_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 500}),
        ("logit_bias", {"999999": 1}),
        ("logprobs", 50),
    ):
        refused = pool.capital(**{field: value})
        assert refused.status_code == 400, field
        assert refused.json()["error"]["param"].startswith(field)


def test_prompts_that_begin_alike_share_their_kv(pool: PoolOnDisk) -> None:
    """Asked for at load: the second time, most of the prompt is there already."""
    pool.cli("unload", MODEL)
    pool.cli("load", MODEL, "--prefix-cache")
    long = "A ship left port at noon, and a storm came up from the west. " * 20
    cached = []
    for question in ("Where from?", "Where to?", "Where from?"):
        answer = pool.ask(f"{long} {question}", max_tokens=8)
        usage = answer.json()["usage"]
        assert text_of(answer)
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        total = usage["prompt_tokens"]
    assert cached[0] == 0
    assert cached[1] > 0.9 * total
    assert cached[2] == total - 1
