"""The owner of the context, with what processes can't be made to do: lost KV, and time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmster_daemon.engines.base import GenerateParams
from llmster_daemon.engines.fake import BYTES_PER_TOKEN, FakeBackend
from llmster_daemon.engines.worker import loop as module
from llmster_daemon.engines.worker.backend import BackendError, Batch, EngineSpec
from llmster_daemon.engines.worker.loop import EngineLoop

LIMIT_S = 20.0
CELLS = 100


class Backend(FakeBackend):
    """Small, and it may refuse to take KV back."""

    def __init__(self) -> None:
        spec = EngineSpec(
            instance_id="i",
            backend="fake",
            model_path="",
            digest="d",
            socket_path="",
            fatal_path="",
            context_length=CELLS,
            slots=3,
            options={"answer": 1 << 30},
        )
        super().__init__(spec, lambda _: None)
        self.batch_tokens = 16
        self.refuses = False
        self.refused = 0
        self.rows: list[int] = []
        self.permits: threading.Semaphore | None = None

    def import_range(self, slot: int, start: int, end: int, blob: bytearray) -> None:
        if self.refuses:
            self.refused += 1
            raise BackendError("no contiguous room")
        super().import_range(slot, start, end, blob)

    def decode(self, batch: Batch) -> None:
        self.rows.append(len(batch.tokens))
        super().decode(batch)


class Receiver:
    """Takes no connections; the tests post what it would."""

    port = 4711

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def expect(self, request_id: str, prompt_tokens: int) -> str:
        return f"{request_id}:{prompt_tokens}"

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def close(self) -> None:
        pass


class Sender:
    """Sends nowhere; keeps what was to be sent."""

    def __init__(self, request_id: str, post: Callable[..., None]) -> None:
        self.request_id = request_id
        self.post = post
        self.ranges: list[tuple[int, int, bytes]] = []
        self.done = threading.Event()
        self.congested = False
        self.congest_after: int | None = None

    def start(self) -> None:
        self.post("prefill_connected", self.request_id)

    def push_range(self, start: int, end: int, blob: bytearray) -> None:
        self.ranges.append((start, end, bytes(blob)))
        if len(self.ranges) == self.congest_after:
            self.congested = True

    def push_done(self, logits: bytes, computed_at_s: float) -> None:
        self.done.set()
        self.post("prefill_delivered", self.request_id, sum(len(r[2]) for r in self.ranges))

    def abort(self) -> None:
        pass


class Harness:
    """A loop that runs in a thread, and what it said."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.receiver = Receiver()
        self.senders: dict[str, Sender] = {}
        self.congest_after: int | None = None
        self.events: list[dict[str, Any]] = []
        self.now_s = 1000.0
        self.error: BaseException | None = None
        self.loop = EngineLoop(
            self.backend,
            self.events.append,
            lambda post: self.receiver,  # type: ignore[arg-type,return-value]
            self._sender,
            clock=lambda: self.now_s,
        )
        self._thread = threading.Thread(target=self._run)

    def _sender(self, request_id: str, _: Any, __: Any, post: Callable[..., None]) -> Sender:
        sender = Sender(request_id, post)
        sender.congest_after = self.congest_after
        self.senders[request_id] = sender
        return sender

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # shown by `until`
            self.error = error

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.loop.post("stop")
        self._thread.join(LIMIT_S)
        assert self.error is None
        assert not self._thread.is_alive()
        assert self.loop.stats() == [0, 0, 0, 0]
        assert not any(self.backend._kv), "KV of nobody"

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.error is None, f"the loop died: {self.error!r}"
            assert time.monotonic() < deadline, what
            time.sleep(0.002)

    def generate(
        self, request_id: str, tokens: list[int], count: int, await_kv: bool = False
    ) -> None:
        params = GenerateParams(temperature=0, max_tokens=count)
        self.loop.post("generate", request_id, params, await_kv, tokens)

    def items(self, request_id: str) -> list[list[Any]]:
        steps = [event for event in list(self.events) if event["ev"] == "step"]
        return [item for step in steps for item in step["out"] if item[0] == request_id]

    def text(self, request_id: str) -> str:
        """The answer, once it is whole."""
        self.until(lambda: any(i[3] for i in self.items(request_id)), f"{request_id} never ends")
        return "".join(item[1] for item in self.items(request_id))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in list(self.events) if event["ev"] == kind]

    def wake(self) -> None:
        """Have the loop turn at once instead of after its idle wait."""
        self.loop.post("cancel", "nobody")


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    harness.start()
    yield harness
    harness.stop()


def kv_of(tokens: list[int]) -> bytearray:
    """What the fake model's cache holds of these tokens."""
    return bytearray(b"".join(bytes([token, 0]) * (BYTES_PER_TOKEN // 2) for token in tokens))


def push(harness: Harness, request_id: str, tokens: list[int], start: int, end: int) -> None:
    blob = kv_of(tokens[start:end])
    harness.loop.post("kv_range", request_id, start, end, blob, lambda: None)


ONE, TWO = list(b"the first prompt....."), list(b"another prompt that is longer")


def test_a_sequence_whose_kv_cannot_be_brought_back_is_computed_again(harness: Harness) -> None:
    """Its rows were planned already from where it had been: that killed the engine."""
    harness.generate("alone", TWO, 60)
    alone = harness.text("alone")
    harness.backend.refuses = True
    harness.generate("one", ONE, 60)
    harness.generate("two", TWO, 60)
    assert harness.text("two") == alone
    assert harness.text("one")
    assert harness.backend.refused > 0


def test_a_prompt_whose_kv_cannot_be_brought_back_is_still_handed_over_once(
    harness: Harness,
) -> None:
    """What had left before is computed again, but not sent again."""
    prompt = list(b"a prompt that is handed over in several parts")
    harness.congest_after = 2
    harness.generate("old", ONE, 76)
    harness.until(lambda: harness.items("old"), "it begins")
    fields = {"tokens": prompt, "host": "h", "port": 1, "ticket": "t"}
    harness.backend.refuses = True
    harness.loop.post("prefill", "p", fields)
    harness.until(lambda: harness.senders.get("p") and harness.senders["p"].congested, "a range")
    # Meanwhile the older one fills the cache, so that the prompt has to give way.
    harness.text("old")
    sender = harness.senders["p"]
    sender.congested = False
    assert sender.done.wait(LIMIT_S)
    harness.until(lambda: harness.of("prefilled"), "it is delivered")
    assert harness.backend.refused == 1
    borders = [(start, end) for start, end, _ in sender.ranges]
    assert borders[0][0] == 0
    assert [end for _, end in borders[:-1]] == [start for start, _ in borders[1:]]
    assert borders[-1][1] == len(prompt)
    assert b"".join(blob for _, _, blob in sender.ranges) == kv_of(prompt)


def test_only_the_last_token_is_computed_when_the_kv_came_but_not_the_logits(
    harness: Harness,
) -> None:
    harness.generate("alone", TWO, 10)
    alone = harness.text("alone")
    harness.generate("r", TWO, 10, await_kv=True)
    harness.until(lambda: harness.of("reserved"), "a slot")
    harness.backend.rows.clear()
    push(harness, "r", TWO, 0, 10)
    push(harness, "r", TWO, 10, len(TWO))
    harness.loop.post("kv_failed", "r", "the peer closed the connection")
    assert harness.text("r") == alone
    assert harness.backend.rows == [1] * 10
    kv_bytes = BYTES_PER_TOKEN * len(TWO)
    first = harness.items("r")[0][5]
    assert first == [len(TWO), kv_bytes, None, "the peer closed the connection", 0]
    assert harness.receiver.forgotten == ["r"]


def test_only_what_is_missing_is_computed_when_the_kv_ends_midway(harness: Harness) -> None:
    harness.generate("r", TWO, 1, await_kv=True)
    harness.until(lambda: harness.of("reserved"), "a slot")
    push(harness, "r", TWO, 0, 20)
    harness.loop.post("kv_failed", "r", "gone")
    harness.text("r")
    assert harness.backend.rows == [len(TWO) - 20]


def test_kv_that_comes_after_it_was_called_off_is_ignored(harness: Harness) -> None:
    harness.generate("alone", TWO, 10)
    alone = harness.text("alone")
    harness.generate("r", TWO, 10, await_kv=True)
    harness.until(lambda: harness.of("reserved"), "a slot")
    released: list[bool] = []
    replies: list[str] = []
    harness.loop.post("recompute", "r", "too slow")
    harness.loop.post("kv_range", "r", 0, 10, kv_of(TWO[:10]), lambda: released.append(True))
    harness.loop.post("kv_done", "r", bytearray(257 * 4), 0.0, replies.append)
    harness.loop.post("kv_failed", "r", "cut")
    assert harness.text("r") == alone
    assert harness.items("r")[0][5][3] == "too slow"
    assert released == [True]
    assert replies == ["the request is gone"]


def test_a_reservation_to_which_nobody_comes_is_computed_here_after_a_while(
    harness: Harness,
) -> None:
    harness.generate("r", ONE, 3, await_kv=True)
    harness.until(lambda: harness.of("reserved"), "a slot")
    harness.now_s += module.RESERVATION_TIMEOUT_S - 0.1
    harness.wake()
    harness.until(lambda: harness.of("beat")[-1]["stats"] == [1, 0, len(ONE), 0], "it is held")
    assert not harness.items("r")
    harness.now_s += 0.2
    harness.wake()
    harness.text("r")
    assert harness.items("r")[0][5][3] == "the prefill node sent nothing"


def test_a_reservation_to_which_someone_came_is_kept(harness: Harness) -> None:
    """From then on the receiver watches the connection."""
    harness.generate("r", ONE, 3, await_kv=True)
    harness.until(lambda: harness.of("reserved"), "a slot")
    harness.loop.post("kv_connected", "r")
    harness.wake()
    beats = len(harness.of("beat"))
    harness.now_s += module.RESERVATION_TIMEOUT_S * 10
    harness.wake()
    harness.until(lambda: len(harness.of("beat")) > beats, "it turns")
    harness.loop.post("cancel", "r")
    harness.until(lambda: harness.loop.stats() == [0, 0, 0, 0], "it is freed")
    assert not harness.items("r")


def test_the_loop_shows_once_a_second_that_it_turns(harness: Harness) -> None:
    harness.until(lambda: harness.of("beat"), "a first beat")
    harness.generate("r", ONE, 50)
    harness.text("r")
    assert len(harness.of("beat")) == 1
    harness.now_s += module.BEAT_S
    harness.wake()
    harness.until(lambda: len(harness.of("beat")) == 2, "a second beat")
    assert harness.of("beat")[-1]["stats"] == [0, 0, 0, 0]


def test_a_prompt_waits_while_its_kv_leaves_more_slowly_than_it_is_computed(
    harness: Harness,
) -> None:
    harness.congest_after = 1
    prompt = list(b"a prompt that is handed over in several parts")
    harness.loop.post("prefill", "p", {"tokens": prompt, "host": "h", "port": 1, "ticket": "t"})
    harness.until(lambda: harness.senders.get("p") and harness.senders["p"].congested, "a range")
    steps = len(harness.backend.rows)
    harness.generate("other", ONE, 5)
    harness.text("other")
    assert harness.senders["p"].ranges[-1][1] == 16
    assert len(harness.backend.rows) > steps
    harness.senders["p"].congested = False
    assert harness.senders["p"].done.wait(LIMIT_S)
    harness.until(lambda: harness.of("prefilled"), "it is delivered")
    assert harness.of("prefilled")[0]["kv_bytes"] == BYTES_PER_TOKEN * len(prompt)
