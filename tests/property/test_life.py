"""The life of a supervised process, under any sequence of events."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmster_daemon.supervisor.state import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    MAX_FAILED_STARTS,
    STABLE_AFTER_S,
    Life,
    delay_s,
)

TIMES = st.floats(0, 1e6)
DONE = ("gone", "failed", "backoff")
"""States without a process."""
LIVES = st.builds(
    Life,
    state=st.sampled_from(
        ["starting", "loading", "ready", "backoff", "failed", "stopping", "gone"]
    ),
    progress=st.none() | st.floats(0, 1),
    restarts=st.integers(0, 100),
    failures=st.integers(0, 100),
    failed_starts=st.integers(0, MAX_FAILED_STARTS - 1),
    ready_since_s=st.none() | TIMES,
    retry_at_s=st.none() | TIMES,
    reason=st.none() | st.just("before"),
)


class AnyLife(RuleBasedStateMachine):
    """Events in any order, at times that never go back."""

    @initialize(start_s=TIMES)
    def begin(self, start_s: float) -> None:
        self.now_s = start_s
        self.life = Life()
        self.before = self.life

    def become(self, life: Life) -> None:
        self.before, self.life = self.life, life

    @rule(seconds=st.sampled_from([0.0, 0.1, FIRST_DELAY_S, MAX_DELAY_S, STABLE_AFTER_S]))
    def wait(self, seconds: float) -> None:
        self.become(self.life)
        self.now_s += seconds

    @rule()
    def spawned(self) -> None:
        self.become(self.life.spawned())

    @rule(value=st.floats(0, 1))
    def progressed(self, value: float) -> None:
        self.become(self.life.progressed(value))

    @rule()
    def became_ready(self) -> None:
        self.become(self.life.became_ready(self.now_s))

    @rule(permanent=st.booleans())
    def exited(self, permanent: bool) -> None:
        self.become(self.life.exited(self.now_s, "it died", permanent))

    @rule()
    def ticked(self) -> None:
        self.become(self.life.ticked(self.now_s))

    @rule()
    def unloaded(self) -> None:
        self.become(self.life.unloaded())

    @precondition(lambda self: self.life.state == "backoff")
    @rule()
    def retry_when_due(self) -> None:
        due_s = self.life.retry_at_s
        assert due_s is not None
        if due_s > self.now_s:
            assert self.life.ticked(self.now_s) == self.life
        self.now_s = max(self.now_s, due_s)
        self.become(self.life.ticked(self.now_s))
        assert self.life.state == "starting"
        assert self.life.restarts == self.before.restarts + 1

    @precondition(lambda self: self.life.state == "starting")
    @rule()
    def run_until_stable(self) -> None:
        """Long sequences reach `ready` by luck alone too rarely."""
        self.become(self.life.spawned().became_ready(self.now_s))
        self.now_s += STABLE_AFTER_S

    @invariant()
    def gone_is_the_end(self) -> None:
        if self.before.state == "gone":
            assert self.life.state == "gone"

    @invariant()
    def stopping_only_ends(self) -> None:
        if self.before.state == "stopping":
            assert self.life.state in ("stopping", "gone")

    @invariant()
    def restarts_only_grow_and_only_by_ticking(self) -> None:
        grown = self.life.restarts - self.before.restarts
        assert grown in (0, 1)
        if grown:
            assert (self.before.state, self.life.state) == ("backoff", "starting")

    @invariant()
    def only_backoff_has_a_time_to_retry(self) -> None:
        assert (self.life.retry_at_s is not None) == (self.life.state == "backoff")

    @invariant()
    def backoff_is_bounded(self) -> None:
        if self.life.state == "backoff" and self.life != self.before:
            wait_s = (self.life.retry_at_s or 0) - self.now_s
            assert FIRST_DELAY_S * 0.99 <= wait_s <= MAX_DELAY_S * 1.01

    @invariant()
    def only_a_loading_process_has_progress(self) -> None:
        assert (self.life.progress is not None) == (self.life.state == "loading")

    @invariant()
    def ready_since_is_known_while_ready(self) -> None:
        if self.life.state == "ready":
            assert self.life.ready_since_s is not None
            assert self.life.reason is None

    @invariant()
    def states_without_a_process_say_why(self) -> None:
        if self.life.state in ("backoff", "failed"):
            assert self.life.reason
            assert self.life.ready_since_s is None

    @invariant()
    def it_gives_up_in_time(self) -> None:
        assert self.life.failed_starts <= MAX_FAILED_STARTS
        if self.life.failed_starts == MAX_FAILED_STARTS:
            assert self.life.state in ("failed", "gone")


TestAnyLife = AnyLife.TestCase


@given(LIVES, TIMES, st.booleans())
def test_unload_leads_to_gone_after_one_exit_at_most(
    life: Life, now_s: float, permanent: bool
) -> None:
    unloaded = life.unloaded()
    if life.state in (*DONE, "starting"):
        assert unloaded.state == "gone"
    assert unloaded.exited(now_s, "stopped", permanent).state == "gone"


@given(LIVES, st.data())
def test_nothing_brings_a_gone_one_back(life: Life, data: st.DataObject) -> None:
    life = replace(life, state="gone")
    events: list[Any] = [
        life.spawned(),
        life.progressed(0.5),
        life.became_ready(data.draw(TIMES)),
        life.exited(data.draw(TIMES), "late", data.draw(st.booleans())),
        life.ticked(data.draw(TIMES)),
        life.unloaded(),
    ]
    assert {after.state for after in events} == {"gone"}


@given(st.integers(-5, 10_000), st.integers(0, 10_000))
def test_the_delay_grows_and_is_bounded(failures: int, more: int) -> None:
    assert FIRST_DELAY_S <= delay_s(failures) <= delay_s(failures + more) <= MAX_DELAY_S


def test_the_delay_doubles() -> None:
    assert [delay_s(n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


@given(LIVES, TIMES)
def test_a_permanent_failure_is_final(life: Life, now_s: float) -> None:
    after = life.exited(now_s, "bad file", permanent=True)
    if life.state in ("starting", "loading", "ready"):
        assert (after.state, after.reason) == ("failed", "bad file")
        assert after.ticked(now_s + 1e9) == after
    else:
        assert after.state in (life.state, "gone")


@given(st.lists(st.booleans(), min_size=MAX_FAILED_STARTS, max_size=MAX_FAILED_STARTS))
def test_five_failed_starts_are_enough(spawned: list[bool]) -> None:
    life, now_s = Life(), 0.0
    for number, had_process in enumerate(spawned, 1):
        life = (life.spawned() if had_process else life).exited(now_s, "no luck")
        assert life.state == ("failed" if number == MAX_FAILED_STARTS else "backoff")
        now_s = life.retry_at_s or now_s
        life = life.ticked(now_s)
    assert life.reason == "no luck (gave up after 5 starts)"
    assert life.restarts == MAX_FAILED_STARTS - 1


@given(TIMES, st.integers(0, 40), st.floats(0, 1000))
def test_a_stable_run_earns_a_fresh_count(start_s: float, failures: int, more_s: float) -> None:
    life = Life(state="loading", failures=failures, failed_starts=4).became_ready(start_s)
    assert life.failed_starts == 0
    end_s = start_s + STABLE_AFTER_S * 1.001 + more_s
    stable = life.exited(end_s, "died")
    assert (stable.state, stable.failures) == ("backoff", 1)
    early = life.exited(start_s + STABLE_AFTER_S * 0.5, "died")
    assert (early.state, early.failures, early.failed_starts) == ("backoff", failures + 1, 0)
