"""The hand-over between two engine processes, and everything that can go wrong with it.

Whatever happens to the KV, the request ends with the text that one engine alone gives, and both
engines give back what they held (the fixtures see to that).
"""

import asyncio
import contextlib
import math
from typing import Any

import pytest

from fakes.engines import (
    HandOver,
    KvProxy,
    ask,
    collect,
    greedy,
    idle,
    new_id,
    text_of,
    tokens_of,
    until,
    weekdays,
)
from llmster_daemon.engines.base import Prefilled
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.errors import ContextOverflow, LlmsterError

ANSWER = 8
ANSWER_LIMIT_S = 10.0


@pytest.fixture
async def prompt(backend: str, decode: LocalEngine) -> list[int]:
    """Long enough for several ranges where that costs little."""
    return await tokens_of(decode, weekdays(2, 7), 200 if backend == "fake" else 36)


@pytest.fixture
def kv_port(decode: LocalEngine) -> int:
    """Where the decode engine listens for KV."""
    return decode.status.kv_port


@pytest.fixture
async def expected(decode: LocalEngine, prompt: list[int]) -> str:
    """What one engine alone answers."""
    return await ask(decode, tokens=prompt, max_tokens=ANSWER)


async def failed(hand_over: HandOver, code: str = "handover_failed") -> LlmsterError:
    """The prefill engine's error."""
    error = await hand_over.prefilled()
    assert isinstance(error, LlmsterError), "it was delivered"
    assert error.code == code
    return error


@pytest.mark.parametrize("length", [1, 10, 65, 600])
async def test_a_handed_over_prompt_gives_the_same_answer(
    prefill: LocalEngine, decode: LocalEngine, length: int
) -> None:
    tokens = await tokens_of(decode, weekdays(0, 7), length)
    alone = await ask(decode, tokens=tokens, max_tokens=ANSWER)
    hand_over = HandOver(prefill, decode)
    await hand_over.start(tokens=tokens, max_tokens=ANSWER)
    assert await hand_over.text() == alone
    prefilled = await hand_over.prefilled()
    assert isinstance(prefilled, Prefilled)
    generation = hand_over.generation
    assert generation.prompt_tokens == length
    assert generation.completion_tokens == ANSWER
    assert generation.kv_bytes == prefilled.kv_bytes >= 64 * length
    assert generation.handover_s is not None
    assert 0 <= generation.handover_s < 30
    assert generation.recomputed is None
    assert prefilled.prefill_s > 0


async def test_a_handed_over_prompt_gives_the_same_answer_with_a_seed(
    prefill: LocalEngine, decode: LocalEngine, prompt: list[int]
) -> None:
    fields: dict[str, Any] = {"tokens": prompt, "max_tokens": 6, "temperature": 1.2, "seed": 5}
    alone = await ask(decode, **fields)
    hand_over = HandOver(prefill, decode)
    await hand_over.start(**fields)
    assert await hand_over.text() == alone
    assert isinstance(await hand_over.prefilled(), Prefilled)


async def test_hand_overs_and_other_requests_are_served_side_by_side(
    backend: str, prefill: LocalEngine, decode: LocalEngine
) -> None:
    length = 150 if backend == "fake" else 42
    prompts = [await tokens_of(decode, weekdays(n, 7), length) for n in range(3)]
    alone = [await ask(decode, tokens=tokens, max_tokens=ANSWER) for tokens in prompts]
    busy = [
        await engine.generate(new_id(), greedy(tokens=prompts[0], max_tokens=30))
        for engine in (prefill, decode)
    ]
    hand_overs = [HandOver(prefill, decode) for _ in prompts]
    for hand_over, tokens in zip(hand_overs, prompts, strict=True):
        await hand_over.start(tokens=tokens, max_tokens=ANSWER)
    assert await asyncio.gather(*[hand_over.text() for hand_over in hand_overs]) == alone
    assert [hand_over.generation.recomputed for hand_over in hand_overs] == [None] * 3
    for generation in busy:
        assert (await collect(generation))[-1].finish == "length"
    for hand_over in hand_overs:
        assert isinstance(await hand_over.prefilled(), Prefilled)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
async def test_a_connection_that_is_cut_costs_only_the_rest(
    prefill: LocalEngine,
    decode: LocalEngine,
    kv_port: int,
    prompt: list[int],
    expected: str,
    share: float,
) -> None:
    async with KvProxy(kv_port, cut_at=share) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        assert await hand_over.text() == expected
        await failed(hand_over)
    assert hand_over.generation.recomputed
    assert hand_over.generation.handover_s is None
    if share == 1.0:  # all of the KV came, only the logits did not
        assert hand_over.generation.kv_bytes >= 64 * len(prompt)


async def test_a_damaged_byte_is_noticed_and_the_rest_computed(
    prefill: LocalEngine, decode: LocalEngine, kv_port: int, prompt: list[int], expected: str
) -> None:
    async with KvProxy(kv_port, corrupt=True) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        assert await hand_over.text() == expected
        await failed(hand_over)
    assert hand_over.generation.recomputed == "bytes were damaged on the way (CRC-32 differs)"


async def test_calling_off_after_all_ranges_computes_the_last_token_here(
    prefill: LocalEngine, decode: LocalEngine, kv_port: int, prompt: list[int], expected: str
) -> None:
    async with KvProxy(kv_port, hold_after=math.inf) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        await proxy.held.wait()
        await decode.recompute(hand_over.id, "too slow")
        assert await hand_over.text() == expected
        await failed(hand_over)
    assert hand_over.generation.recomputed == "too slow"


async def test_calling_off_midway_computes_what_is_missing_here(
    prefill: LocalEngine, decode: LocalEngine, kv_port: int, prompt: list[int], expected: str
) -> None:
    async with KvProxy(kv_port, hold_after=1) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        await proxy.held.wait()
        await decode.recompute(hand_over.id, "too slow")
        assert await hand_over.text() == expected
        await failed(hand_over)
    assert hand_over.generation.recomputed == "too slow"


async def test_a_prefill_that_never_comes_is_computed_here_when_it_is_called_off(
    decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    generation, _ = await decode.expect(new_id(), greedy(tokens=prompt, max_tokens=ANSWER))
    await decode.recompute(generation.id, "nobody prefills")
    assert text_of(await collect(generation)) == expected
    assert (generation.recomputed, generation.kv_bytes) == ("nobody prefills", 0)


async def test_calling_off_what_is_not_awaited_changes_nothing(
    decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    await decode.recompute("nobody", "no reason")
    generation = await decode.generate(new_id(), greedy(tokens=prompt, max_tokens=ANSWER))
    await decode.recompute(generation.id, "no reason")
    assert text_of(await collect(generation)) == expected
    assert generation.recomputed is None


async def test_a_wrong_ticket_is_refused_and_the_reservation_stays(
    prefill: LocalEngine, decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    generation, reservation = await decode.expect(
        new_id(), greedy(tokens=prompt, max_tokens=ANSWER)
    )
    port = reservation.kv_port
    with pytest.raises(LlmsterError, match="unknown ticket") as caught:
        await prefill.prefill(new_id(), prompt, "127.0.0.1", port, "wrong")
    assert (caught.value.code, caught.value.status) == ("handover_failed", 502)
    await prefill.prefill(new_id(), prompt, "127.0.0.1", port, reservation.ticket)
    assert text_of(await collect(generation)) == expected
    assert generation.recomputed is None


async def test_a_ticket_is_good_for_one_hand_over(
    prefill: LocalEngine, decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    generation, reservation = await decode.expect(
        new_id(), greedy(tokens=prompt, max_tokens=ANSWER)
    )
    to = ("127.0.0.1", reservation.kv_port, reservation.ticket)
    await prefill.prefill(new_id(), prompt, *to)
    with pytest.raises(LlmsterError, match="unknown ticket"):
        await prefill.prefill(new_id(), prompt, *to)
    assert text_of(await collect(generation)) == expected


async def test_a_prompt_of_another_length_is_refused(
    prefill: LocalEngine, decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    generation, reservation = await decode.expect(
        new_id(), greedy(tokens=prompt, max_tokens=ANSWER)
    )
    with pytest.raises(LlmsterError, match=f"{len(prompt)} were announced"):
        await prefill.prefill(
            new_id(), prompt[:-1], "127.0.0.1", reservation.kv_port, reservation.ticket
        )
    assert text_of(await collect(generation)) == expected
    assert generation.recomputed


async def test_an_engine_with_another_model_file_is_refused(
    new_process: Any, decode: LocalEngine, prompt: list[int], expected: str
) -> None:
    async with new_process(digest="f" * 64) as other:
        hand_over = HandOver(other.engine, decode)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        assert await hand_over.text() == expected
        assert "the model files differ" in (await failed(hand_over)).message
        await idle(other.engine)
    assert hand_over.generation.recomputed == "the model files differ"


@pytest.mark.parametrize("ranges", [0, 1])
async def test_a_prefill_engine_that_is_killed_midway_costs_only_the_rest(
    new_process: Any,
    decode: LocalEngine,
    kv_port: int,
    prompt: list[int],
    expected: str,
    ranges: int,
) -> None:
    async with new_process() as other, KvProxy(kv_port, hold_after=ranges) as proxy:
        hand_over = HandOver(other.engine, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        await proxy.held.wait()
        other.kill()
        assert await hand_over.text() == expected
        await failed(hand_over, "engine_lost")
    assert hand_over.generation.recomputed
    assert (hand_over.generation.kv_bytes > 0) == (ranges > 0)


async def test_a_decode_engine_that_is_killed_frees_the_prefill_engine(
    new_process: Any, prefill: LocalEngine, prompt: list[int]
) -> None:
    async with new_process() as other:
        _, reservation = await other.engine.expect(new_id(), greedy(tokens=prompt))
        async with KvProxy(reservation.kv_port, hold_after=1) as proxy:
            prefilling = asyncio.create_task(
                prefill.prefill(new_id(), prompt, "127.0.0.1", proxy.port, reservation.ticket)
            )
            await proxy.held.wait()
            other.kill()
            with pytest.raises(LlmsterError) as caught:
                await prefilling
    assert caught.value.code == "handover_failed"
    await idle(prefill)


async def test_cancelling_during_a_hand_over_frees_both_engines(
    prefill: LocalEngine, decode: LocalEngine, kv_port: int, prompt: list[int]
) -> None:
    async with KvProxy(kv_port, hold_after=1) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        await proxy.held.wait()
        await decode.cancel(hand_over.id)
        await failed(hand_over)
        await idle(prefill, decode)


async def test_cancelling_a_reservation_before_anyone_connects_frees_it(
    prefill: LocalEngine, decode: LocalEngine, prompt: list[int]
) -> None:
    generation, reservation = await decode.expect(new_id(), greedy(tokens=prompt))
    await until(lambda: decode.status.kv_used_cells == len(prompt), "the cells are reserved")
    await decode.cancel(generation.id)
    await idle(decode)
    with pytest.raises(LlmsterError, match="unknown ticket"):
        await prefill.prefill(
            new_id(), prompt, "127.0.0.1", reservation.kv_port, reservation.ticket
        )


async def test_cancelling_the_prefill_computes_the_rest_here(
    prefill: LocalEngine, decode: LocalEngine, kv_port: int, prompt: list[int], expected: str
) -> None:
    async with KvProxy(kv_port, hold_after=1) as proxy:
        hand_over = HandOver(prefill, decode, proxy.port)
        await hand_over.start(tokens=prompt, max_tokens=ANSWER)
        await proxy.held.wait()
        assert hand_over.prefilling is not None
        hand_over.prefilling.cancel()
        assert await hand_over.text() == expected
        with contextlib.suppress(asyncio.CancelledError):
            await hand_over.prefilling
        await idle(prefill)
    assert hand_over.generation.recomputed


async def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_reserved(
    decode: LocalEngine,
) -> None:
    with pytest.raises(ContextOverflow):
        await decode.expect(new_id(), greedy(tokens=[40] * 5000))


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 1), ("127.0.0.1", 99_999), ("x" * 300, 80), ("", 0)]
)
async def test_an_address_where_nobody_listens_is_told_and_frees_the_prefill_engine(
    prefill: LocalEngine, host: str, port: int
) -> None:
    with pytest.raises(LlmsterError) as caught:
        async with asyncio.timeout(ANSWER_LIMIT_S):
            await prefill.prefill(new_id(), [40, 41, 42], host, port, "ticket")
    assert caught.value.code == "handover_failed"
