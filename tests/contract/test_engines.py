"""What every engine does: one suite, run with the model of arithmetic and with a real one."""

import asyncio
import math
from typing import Any

import pytest

from fakes.engines import (
    EngineProcess,
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
from llmster_daemon.engines.base import Generation
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.errors import BadRequest, Conflict, ContextOverflow, LlmsterError

PROMPT = "one two three one two three one two three one"
PROMPTS = [weekdays(first, 14) for first in range(5)]


async def refused(engine: LocalEngine, **fields: Any) -> LlmsterError:
    """The error that a request ends with."""
    with pytest.raises(LlmsterError) as caught:
        await ask(engine, **fields)
    return caught.value


async def test_greedy_answers_are_repeatable(decode: LocalEngine) -> None:
    first, second = [await ask(decode, prompt=PROMPT, max_tokens=12) for _ in range(2)]
    assert first == second != ""


async def test_sampling_is_repeatable_with_a_seed_and_varies_with_it(decode: LocalEngine) -> None:
    fields: dict[str, Any] = {"prompt": "My name is", "max_tokens": 12, "temperature": 1.0}
    texts = [await ask(decode, **fields, seed=seed) for seed in (7, 7, 8, -9, -9)]
    assert texts[0] == texts[1]
    assert texts[3] == texts[4]
    assert len(set(texts)) == 3


async def test_sampling_is_repeatable_while_others_are_served(decode: LocalEngine) -> None:
    """A sampler belongs to its request: what others draw does not disturb it."""
    fields: dict[str, Any] = {"tokens": [40, 50, 60], "max_tokens": 6, "temperature": 1.5}
    same = await asyncio.gather(*[ask(decode, **fields, seed=3) for _ in range(4)])
    assert len(set(same)) == 1


async def test_an_answer_ends_at_max_tokens(decode: LocalEngine) -> None:
    generation = await decode.generate(new_id(), greedy(prompt=PROMPT, max_tokens=5))
    chunks = await collect(generation)
    assert [chunk.finish for chunk in chunks] == [None] * 4 + ["length"]
    assert generation.completion_tokens == sum(chunk.tokens for chunk in chunks) == 5
    assert generation.prompt_tokens == len(await decode.tokenize(PROMPT, True))
    assert (generation.kv_bytes, generation.handover_s, generation.recomputed) == (0, None, None)


async def test_nothing_is_generated_for_max_tokens_of_zero(decode: LocalEngine) -> None:
    generation = await decode.generate(new_id(), greedy(prompt=PROMPT, max_tokens=0))
    chunks = await collect(generation)
    assert [(chunk.text, chunk.finish) for chunk in chunks] == [("", "length")]


async def test_an_answer_ends_where_the_model_ends_it(
    backend: str, decode: LocalEngine, new_process: Any
) -> None:
    if backend == "fake":
        async with new_process(answer=8) as process:
            chunks = await collect(await process.engine.generate(new_id(), greedy(prompt=PROMPT)))
    else:
        chat = "<|im_start|>user\nSay: yes<|im_end|>\n<|im_start|>assistant\n"
        chunks = await collect(await decode.generate(new_id(), greedy(prompt=chat)))
    assert chunks[-1].finish == "stop"
    assert "<|im_end|>" not in text_of(chunks)


async def test_a_stop_string_ends_the_answer_before_it(decode: LocalEngine) -> None:
    whole = await ask(decode, prompt=PROMPT, max_tokens=12)
    stop = whole[3:8]
    chunks = await collect(
        await decode.generate(new_id(), greedy(prompt=PROMPT, max_tokens=12, stop=("\0", stop)))
    )
    assert text_of(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish == "stop"
    assert sum(chunk.tokens for chunk in chunks) < 12


async def test_a_prompt_may_be_given_as_tokens(decode: LocalEngine) -> None:
    tokens = await decode.tokenize(PROMPT, True)
    assert await ask(decode, tokens=tokens, max_tokens=6) == await ask(
        decode, prompt=PROMPT, max_tokens=6
    )


async def test_requests_that_are_computed_together_do_not_disturb_each_other(
    decode: LocalEngine,
) -> None:
    alone = [await ask(decode, prompt=prompt, max_tokens=8) for prompt in PROMPTS]
    together = await asyncio.gather(*[ask(decode, prompt=p, max_tokens=8) for p in PROMPTS])
    assert together == alone
    assert len(set(alone)) == len(PROMPTS)


async def begin(engine: LocalEngine, count: int) -> list[Generation]:
    """Requests that take long, each of which has begun to answer."""
    params = greedy(tokens=[40, 41], max_tokens=900)
    generations = [await engine.generate(new_id(), params) for _ in range(count)]
    for generation in generations:
        await anext(generation.chunks)
    return generations


async def test_as_many_requests_as_there_are_slots_are_answered_at_once(
    decode: LocalEngine,
) -> None:
    generations = await begin(decode, 8)
    assert (decode.status.active, decode.status.waiting) == (8, 0)
    # In turns: nobody has to wait for another one's end.
    for _ in range(3):
        for generation in generations:
            assert (await anext(generation.chunks)).finish is None
    for generation in generations:
        await decode.cancel(generation.id)


async def test_a_request_beyond_the_slots_waits_until_one_is_free(decode: LocalEngine) -> None:
    generations = await begin(decode, 8)
    late = await decode.generate(new_id(), greedy(tokens=[40, 41], max_tokens=3))
    later = await decode.generate(new_id(), greedy(tokens=[40, 41], max_tokens=3))
    await until(lambda: decode.status.waiting == 2, "they wait")
    await decode.cancel(late.id)
    await until(lambda: decode.status.waiting == 1, "one of them is gone")
    assert decode.status.active == 8
    await decode.cancel(generations[3].id)
    assert len(await collect(later)) == 3
    for generation in generations:
        await decode.cancel(generation.id)


async def test_cancelling_frees_slot_and_cells(decode: LocalEngine) -> None:
    generation = await decode.generate(new_id(), greedy(prompt=PROMPT, max_tokens=900))
    await anext(generation.chunks)
    assert (decode.status.active, decode.status.waiting) == (1, 0)
    assert decode.status.kv_used_cells >= generation.prompt_tokens
    await decode.cancel(generation.id)
    await idle(decode)


async def test_cancelling_what_is_not_there_changes_nothing(decode: LocalEngine) -> None:
    await decode.cancel("nobody")
    assert await ask(decode, prompt=PROMPT, max_tokens=2)


async def test_an_id_may_be_used_again_once_its_request_has_ended(decode: LocalEngine) -> None:
    request_id = new_id()
    for _ in range(20):
        generation = await decode.generate(request_id, greedy(tokens=[40, 41], max_tokens=1))
        assert len(await collect(generation)) == 1


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    decode: LocalEngine,
) -> None:
    error = await refused(decode, tokens=[40] * 4096)
    assert isinstance(error, ContextOverflow)
    assert error.message == "the prompt has 4,096 tokens; the context holds 4,096"
    assert (error.code, error.status) == ("context_length_exceeded", 400)


async def test_an_answer_ends_where_the_context_is_full(small: LocalEngine) -> None:
    tokens = await tokens_of(small, "one two three ", 250)
    generation = await small.generate(new_id(), greedy(tokens=tokens))
    chunks = await collect(generation)
    assert chunks[-1].finish == "length"
    assert generation.completion_tokens == 6


async def test_an_empty_prompt_is_refused(decode: LocalEngine) -> None:
    error = await refused(decode, tokens=[])
    assert (error.code, error.status) == ("empty_prompt", 400)


@pytest.mark.parametrize("token", [-1, 1 << 30, 1 << 40])
async def test_a_token_that_the_model_does_not_have_is_refused(
    decode: LocalEngine, token: int
) -> None:
    error = await refused(decode, tokens=[40, token])
    assert (error.code, error.status) == ("bad_tokens", 400)


async def test_a_second_request_of_the_same_id_is_refused_and_the_first_goes_on(
    decode: LocalEngine, decode_process: EngineProcess
) -> None:
    """Whether the same daemon asks or another one, which has to hear of it, too."""
    expected = await ask(decode, prompt=PROMPT, max_tokens=10)
    first = await decode.generate(new_id(), greedy(prompt=PROMPT, max_tokens=900))
    chunks = [await anext(first.chunks)]
    with pytest.raises(Conflict, match="under way"):
        await decode.generate(first.id, greedy(prompt="other"))
    async with decode_process.connection() as other:
        second = await other.generate(first.id, greedy(prompt="other"))
        with pytest.raises(LlmsterError) as caught:
            await collect(second)
    assert (caught.value.code, caught.value.status) == ("duplicate_id", 409)
    chunks += [await anext(first.chunks) for _ in range(9)]
    assert text_of(chunks) == expected
    await decode.cancel(first.id)


async def test_refused_requests_leave_nothing_behind(decode: LocalEngine) -> None:
    for _ in range(20):
        await refused(decode, tokens=[])
        await refused(decode, tokens=[1 << 30])
        await refused(decode, tokens=[40] * 5000)
    await idle(decode)
    assert not decode._queues


async def test_a_request_that_cannot_be_sent_is_refused_and_the_next_one_served(
    decode: LocalEngine,
) -> None:
    for fields in ({"prompt": "x" * (65 << 20)}, {"prompt": PROMPT, "seed": 1 << 64}):
        request_id = new_id()
        with pytest.raises(BadRequest, match="can't be sent to the engine"):
            await decode.generate(request_id, greedy(**fields))
        generation = await decode.generate(request_id, greedy(prompt=PROMPT, max_tokens=2))
        assert len(await collect(generation)) == 2


ABSURD: list[dict[str, Any]] = [
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": -1.0},
    {"temperature": 1e-30},
    {"top_p": math.nan},
    {"top_p": -1.0},
    {"top_k": -5},
    {"top_k": 1 << 40},
    {"min_p": math.nan},
    {"min_p": 9.0},
    {"typical_p": -1.0},
    {"seed": -(1 << 63)},
    {"repeat_penalty": math.nan},
    {"repeat_penalty": 1.1, "repeat_last_n": -1},
    {"repeat_penalty": 1.1, "repeat_last_n": 1 << 40},
    {"dry_multiplier": 1.0, "dry_breakers": ("\0", "")},
    {"dry_multiplier": math.nan},
    {"dry_multiplier": 1.0, "dry_allowed_length": -5, "dry_last_n": 1 << 40},
    {"xtc_probability": 1.0, "xtc_threshold": math.nan},
    {"mirostat": 7},
    {"mirostat": 1, "mirostat_tau": math.nan},
    {"mirostat": 2, "mirostat_eta": math.nan},
    {"logit_bias": ((1 << 40, 1.0), (-5, math.nan))},
    {"logit_bias": ((5, math.nan), (6, math.inf))},
    {"logprobs": 1 << 30},
    {"logprobs": -3},
    {"grammar": "\0"},
    {"grammar": "root ::= root"},
    {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
]


@pytest.mark.parametrize("fields", ABSURD, ids=lambda fields: str(fields)[:50])
async def test_an_absurd_sampling_field_harms_nobody(
    decode: LocalEngine, fields: dict[str, Any]
) -> None:
    fields = {"tokens": [40, 41], "max_tokens": 3, "temperature": 1.0, **fields}
    try:
        await ask(decode, **fields)
    except LlmsterError as error:
        assert error.status == 400
    assert await ask(decode, tokens=[40, 41], max_tokens=3)


async def test_requests_that_together_outgrow_the_cache_all_end_as_if_alone(
    small: LocalEngine,
) -> None:
    """One has to be swapped out and in again, for 3 x (60 + 30) cells are not there."""
    length = 30
    prompts = [await tokens_of(small, weekdays(first, 7), 60) for first in range(3)]
    alone = [await ask(small, tokens=prompt, max_tokens=length) for prompt in prompts]
    waited = 0

    async def follow(generation: Generation) -> str:
        nonlocal waited
        text = ""
        async for chunk in generation.chunks:
            waited = max(waited, small.status.waiting)
            assert small.status.kv_used_cells <= small.status.context_length
            text += chunk.text
        assert generation.completion_tokens == length
        return text

    generations = [
        await small.generate(new_id(), greedy(tokens=prompt, max_tokens=length))
        for prompt in prompts
    ]
    assert await asyncio.gather(*map(follow, generations)) == alone
    assert waited > 0, "the cache was never full"


async def test_texts_are_tokenised_side_by_side(decode: LocalEngine) -> None:
    texts = [f"text number {number} " * (number + 1) for number in range(20)]
    one_by_one = [await decode.tokenize(text, False) for text in texts]
    at_once = await asyncio.gather(*[decode.tokenize(text, False) for text in texts])
    assert list(at_once) == one_by_one
    assert len(set(map(len, at_once))) == len(texts)
