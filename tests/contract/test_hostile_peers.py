"""Peers that send nonsense, to the KV port and to the daemon's socket: the engine serves on."""

import asyncio
import math
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fakes.engines import (
    EngineProcess,
    ask,
    collect,
    greedy,
    new_id,
    text_of,
    tokens_of,
    weekdays,
)
from llmster_daemon.engines.local import LocalEngine
from llmster_daemon.engines.worker.ipc import LENGTH, MAX_FRAME_BYTES, pack
from llmster_daemon.errors import LlmsterError
from llmster_daemon.kv.wire import (
    FRAME,
    MAGIC,
    MAX_TEXT_BYTES,
    VERSION,
    Frame,
    Kind,
    WireError,
    json_body,
    read_frame,
    send_frame,
    send_json,
)

TIMEOUT_S = 10.0
ANSWER = 4
MAX_BODY_BYTES = 64 << 20

Frames = list[Frame]


@dataclass(frozen=True)
class Recorded:
    """A sound hand-over, to be replayed with changes."""

    tokens: list[int]
    hello: dict[str, Any]
    range: Frame
    done: Frame


def take_one(listener: socket.socket, clock: object = None) -> tuple[dict[str, Any], Frames]:
    """Play the decode engine for one connection; what came."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(TIMEOUT_S)
        hello = json_body(read_frame(sock, MAX_TEXT_BYTES))
        send_json(sock, Kind.OK, {"clock_s": time.monotonic() if clock is None else clock})
        frames: Frames = []
        while not frames or frames[-1].kind is not Kind.DONE:
            frames.append(read_frame(sock, MAX_BODY_BYTES))
        send_frame(sock, Kind.ACK)
    return hello, [frame for frame in frames if frame.kind is not Kind.BEAT]


def replay(port: int, hello: dict[str, Any], frames: Frames) -> Frame | None:
    """Play the prefill engine; the decode engine's last word, or None if it hung up."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock:
        try:
            send_json(sock, Kind.HELLO, hello)
            answer = read_frame(sock, MAX_TEXT_BYTES)
            if answer.kind is not Kind.OK:
                return answer
            for frame in frames:
                send_frame(sock, frame.kind, frame.body, frame.start, frame.end)
            return read_frame(sock, MAX_TEXT_BYTES)
        except (OSError, WireError):
            return None


@pytest.fixture
async def recorded(prefill: LocalEngine) -> Recorded:
    tokens = await tokens_of(prefill, weekdays(1, 7), 28)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        port = listener.getsockname()[1]
        (hello, frames), _ = await asyncio.gather(
            asyncio.to_thread(take_one, listener),
            prefill.prefill(new_id(), tokens, "127.0.0.1", port, "a ticket"),
        )
    assert [frame.kind for frame in frames] == [Kind.RANGE, Kind.DONE]
    assert hello["ticket"] == "a ticket"
    return Recorded(tokens, hello, *frames)


async def pushed(
    decode: LocalEngine, recorded: Recorded, frames: Frames, **hello: Any
) -> tuple[str, str | None, Frame | None]:
    """A request whose KV comes as these frames: its text, why it was recomputed, the reply."""
    generation, reservation = await decode.expect(
        new_id(), greedy(tokens=recorded.tokens, max_tokens=ANSWER)
    )
    greeting = {**recorded.hello, "ticket": reservation.ticket, **hello}
    reply = asyncio.create_task(asyncio.to_thread(replay, reservation.kv_port, greeting, frames))
    text = text_of(await collect(generation))
    return text, generation.recomputed, await reply


def logits(count: int, value: float = 0.0) -> Callable[[Recorded], Frames]:
    """The sound KV, and logits that are `count` more than the vocabulary has."""

    def frames(recorded: Recorded) -> Frames:
        row = np.frombuffer(recorded.done.body, "<f4")
        other = np.full(len(row) + count, value, "<f4")
        return [recorded.range, replace(recorded.done, body=other.tobytes())]

    return frames


DEEP = b"[" * 60_000
WRONG: dict[str, Callable[[Recorded], Frames]] = {
    "no KV at all": lambda r: [r.done],
    "the same range twice": lambda r: [r.range, r.range, r.done],
    "a range that skips a token": lambda r: [replace(r.range, start=1), r.done],
    "a range beyond the prompt": lambda r: [replace(r.range, end=r.range.end + 1), r.done],
    "a range far beyond the cache": lambda r: [replace(r.range, end=(1 << 32) - 1), r.done],
    "an empty range": lambda r: [replace(r.range, end=0), r.done],
    "a reversed range": lambda r: [replace(r.range, start=5, end=2), r.done],
    "KV of too few bytes": lambda r: [replace(r.range, body=r.range.body[:-1]), r.done],
    "KV of too many bytes": lambda r: [replace(r.range, body=r.range.body + b"\0"), r.done],
    "KV of no bytes": lambda r: [replace(r.range, body=b""), r.done],
    "KV for another count of tokens": lambda r: [replace(r.range, end=r.range.end - 1), r.done],
    "one logit too few": logits(-1),
    "one logit too many": logits(1),
    "no logits": lambda r: [r.range, replace(r.done, body=b"")],
    "half a logit": lambda r: [r.range, replace(r.done, body=r.done.body[:-2])],
    "logits that are no numbers": logits(0, math.nan),
    "a second greeting": lambda r: [r.range, Frame(Kind.HELLO, body=b"{}")],
    "an acknowledgement": lambda r: [Frame(Kind.ACK)],
    "a refusal": lambda r: [r.range, Frame(Kind.REFUSE, body=b'{"reason": "tired"}')],
    "a refusal without JSON": lambda r: [r.range, Frame(Kind.REFUSE, body=b"\xff")],
    "a refusal of endless depth": lambda r: [r.range, Frame(Kind.REFUSE, body=DEEP)],
}


async def test_a_replayed_hand_over_is_as_good_as_the_first(
    decode: LocalEngine, recorded: Recorded
) -> None:
    """Shows that the replays below fail for what is wrong with them, and nothing else."""
    expected = await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER)
    text, recomputed, reply = await pushed(decode, recorded, [recorded.range, recorded.done])
    assert (text, recomputed) == (expected, None)
    assert reply is not None
    assert reply.kind is Kind.ACK


async def test_a_hand_over_that_is_wrong_is_computed_here(
    decode: LocalEngine, recorded: Recorded
) -> None:
    expected = await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER)
    for name, frames in WRONG.items():
        text, recomputed, reply = await pushed(decode, recorded, frames(recorded))
        assert text == expected, name
        assert recomputed, name
        assert reply is None or reply.kind is Kind.REFUSE, name


OTHERS: list[dict[str, Any]] = [
    {"digest": "f" * 64},
    {"digest": None},
    {"layout": "llamacpp;0x0;k=();v=()"},
    {"layout": ["list"]},
    {"tokens": 27},
    {"tokens": "28"},
]


async def test_a_greeting_that_does_not_match_is_refused_and_the_prompt_computed_here(
    decode: LocalEngine, recorded: Recorded
) -> None:
    expected = await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER)
    for hello in OTHERS:
        text, recomputed, reply = await pushed(decode, recorded, [], **hello)
        assert (text, bool(recomputed)) == (expected, True), hello
        assert reply is not None
        assert json_body(reply)["reason"] == recomputed, hello


async def test_kv_that_is_no_numbers_harms_only_its_own_request(
    decode: LocalEngine, recorded: Recorded
) -> None:
    """Right in form, so nothing can tell: the answer is nonsense, the engine and others are not."""
    expected = await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER)
    noise = [replace(recorded.range, body=b"\xff" * len(recorded.range.body)), recorded.done]
    text, *others = await asyncio.gather(
        pushed(decode, recorded, noise),
        *[ask(decode, tokens=recorded.tokens, max_tokens=ANSWER) for _ in range(3)],
    )
    assert others == [expected] * 3
    assert text[1] is None


def frame(kind: int = Kind.HELLO, length: int = 0, version: int = VERSION) -> bytes:
    return FRAME.pack(MAGIC, version, kind, 0, 0, length, 0)


KV_GARBAGE = [
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
    frame(),
    frame(version=VERSION + 1),
    frame(kind=77),
    frame(length=(1 << 64) - 1),
    frame(length=MAX_TEXT_BYTES) + b"[" * MAX_TEXT_BYTES,
    frame(kind=Kind.RANGE, length=MAX_BODY_BYTES),
    frame(kind=Kind.DONE),
    *(random.Random(seed).randbytes(seed * 7) for seed in range(1, 30)),
    *(frame(length=40) + random.Random(seed).randbytes(40) for seed in range(10)),
]


def send_and_wait(sock: socket.socket, data: bytes) -> None:
    """Send, and read until the other side hangs up."""
    with sock:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except TimeoutError:
            raise AssertionError("it does not hang up") from None
        except OSError:  # it has hung up already
            return


async def test_garbage_on_the_kv_port_harms_nobody(decode: LocalEngine, recorded: Recorded) -> None:
    for data in KV_GARBAGE:
        sock = socket.create_connection(("127.0.0.1", decode.status.kv_port))
        await asyncio.to_thread(send_and_wait, sock, data)
    _, recomputed, _ = await pushed(decode, recorded, [recorded.range, recorded.done])
    assert recomputed is None


OPERATIONS: list[dict[str, Any]] = [
    {},
    {"op": None},
    {"op": "explode"},
    {"op": ["generate"]},
    {"op": "generate"},
    {"op": "generate", "id": "x", "tokens": "abc"},
    {"op": "generate", "id": "x", **greedy().model_dump(), "tokens": [1.5]},
    {"op": "generate", "id": "x", **greedy().model_dump(), "stop": "abc"},
    {"op": "generate", "id": ["x"], **greedy(tokens=[]).model_dump()},
    {"op": "generate", "id": None, **greedy(tokens=[1 << 62]).model_dump()},
    {"op": "prefill", "id": "x"},
    {"op": "prefill", "id": "x", "tokens": [40], "host": "\0", "port": 1, "ticket": "t"},
    {"op": "prefill", "id": "x", "tokens": [40], "host": ".", "port": -1, "ticket": "t"},
    {"op": "prefill", "id": "x", "tokens": [], "host": "a", "port": 1, "ticket": "t"},
    {"op": "tokenize", "id": "x"},
    {"op": "tokenize", "id": "x", "text": b"\xff\xfe"},
    {"op": "tokenize", "id": "x", "text": {"a": [None]}},
    {"op": "cancel"},
    {"op": "cancel", "id": {"a": 1}},
    {"op": "recompute", "id": "x", "reason": [b"\xff"]},
]
IPC_GARBAGE = [
    b"\0",
    LENGTH.pack(0),
    LENGTH.pack(MAX_FRAME_BYTES + 1),
    LENGTH.pack(5) + b"\xc1\xc1\xc1\xc1\xc1",
    LENGTH.pack(100_000) + b"\x91" * 100_000,
    LENGTH.pack(1000) + b"abc",
    b"GET / HTTP/1.1\r\n\r\n",
    *(pack(operation) for operation in OPERATIONS),
    b"".join(pack(operation) for operation in OPERATIONS),
    *(random.Random(seed).randbytes(seed * 7) for seed in range(1, 30)),
    *(struct.pack(">I", 20) + random.Random(seed).randbytes(20) for seed in range(30)),
]


async def test_garbage_on_the_daemons_socket_harms_nobody(
    decode: LocalEngine, decode_process: EngineProcess, recorded: Recorded
) -> None:
    expected = await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER)
    for data in IPC_GARBAGE:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(decode_process.spec.socket_path)
        await asyncio.to_thread(send_and_wait, sock, data)
    assert await ask(decode, tokens=recorded.tokens, max_tokens=ANSWER) == expected
    assert "Traceback" not in decode_process.log


def answer_with(listener: socket.socket, answer: bytes | dict[str, Any]) -> None:
    """Play a decode engine that greets like this, and then listens for ever."""
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(TIMEOUT_S)
        try:
            read_frame(sock, MAX_TEXT_BYTES)
            if isinstance(answer, bytes):
                sock.sendall(answer)
                return
            send_json(sock, Kind.OK, answer)
            while True:
                read_frame(sock, MAX_BODY_BYTES)
        except (OSError, WireError):
            return


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"\0" * 40,
        frame(kind=Kind.REFUSE, length=60_000) + DEEP,
        frame(kind=Kind.ACK),
        {},
        {"clock_s": "noon"},
        {"clock_s": [1]},
        {"clock_s": math.nan},
        {"clock_s": math.inf},
        {"clock_s": 1e300},
    ],
    ids=lambda answer: str(answer)[:30],
)
async def test_a_decode_engine_that_answers_nonsense_fails_the_prefill_and_frees_it(
    prefill: LocalEngine, answer: bytes | dict[str, Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        port = listener.getsockname()[1]
        playing = asyncio.create_task(asyncio.to_thread(answer_with, listener, answer))
        with pytest.raises(LlmsterError) as caught:
            async with asyncio.timeout(TIMEOUT_S):
                await prefill.prefill(new_id(), [40, 41, 42], "127.0.0.1", port, "ticket")
        await playing
    assert (caught.value.code, caught.value.status) == ("handover_failed", 502)


async def test_connections_that_say_nothing_do_not_keep_others_out(
    decode: LocalEngine, decode_process: EngineProcess, recorded: Recorded
) -> None:
    silent = [socket.create_connection(("127.0.0.1", decode.status.kv_port)) for _ in range(50)] + [
        socket.socket(socket.AF_UNIX) for _ in range(5)
    ]
    for sock in silent[50:]:
        sock.connect(decode_process.spec.socket_path)
    _, recomputed, _ = await pushed(decode, recorded, [recorded.range, recorded.done])
    assert recomputed is None
    for sock in silent:
        sock.close()
