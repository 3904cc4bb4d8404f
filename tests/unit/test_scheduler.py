"""The scheduler's rules, one by one. Any mix of them: `property/test_scheduler.py`."""

import pytest

from llmster_daemon.engines.worker.scheduler import Phase, Scheduler, Sequence, Step


def parts(step: Step) -> list[tuple[str, int, int, bool]]:
    return [(p.sequence.id, p.start, p.count, p.wants) for p in step.parts]


def compute(scheduler: Scheduler) -> Step:
    """One step as the engine does it: every sequence whose logits are wanted gets a token."""
    step = scheduler.plan()
    for sequence in step.swap_out:
        scheduler.swapped_out(sequence)
    for part in step.parts:
        scheduler.advance(part)
        if part.wants:
            part.sequence.tokens.append(0)
    return step


def add(scheduler: Scheduler, request_id: str, tokens: int, awaits_kv: bool = False) -> Sequence:
    return scheduler.add(request_id, [0] * tokens, awaits_kv)


def until_full(scheduler: Scheduler) -> Step:
    """Compute until some sequence gives way; that step."""
    for _ in range(scheduler.cells * 2):
        step = compute(scheduler)
        if step.swap_out:
            return step
    raise AssertionError("nothing gave way")


def test_a_prompt_longer_than_a_batch_is_computed_in_parts_that_continue() -> None:
    scheduler = Scheduler(cells=100, slots=2, batch_tokens=8)
    add(scheduler, "a", 20)
    planned = [parts(compute(scheduler)) for _ in range(4)]
    assert planned == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
        [("a", 20, 1, True)],
    ]


def test_prompts_get_only_a_share_of_the_batch_while_others_generate() -> None:
    scheduler = Scheduler(cells=200, slots=3, batch_tokens=32, shared_chunk=5)
    add(scheduler, "a", 2)
    compute(scheduler)
    add(scheduler, "b", 40)
    assert parts(compute(scheduler)) == [("a", 2, 1, True), ("b", 0, 5, False)]


def test_several_prompts_share_one_batch_in_order_of_arrival() -> None:
    scheduler = Scheduler(cells=200, slots=3, batch_tokens=8)
    add(scheduler, "a", 5)
    add(scheduler, "b", 5)
    assert parts(compute(scheduler)) == [("a", 0, 5, True), ("b", 0, 3, False)]


def test_a_short_request_does_not_overtake_a_long_one_that_waits_for_room() -> None:
    scheduler = Scheduler(cells=100, slots=4, batch_tokens=64)
    first = add(scheduler, "first", 60)
    compute(scheduler)
    add(scheduler, "long", 90)
    add(scheduler, "short", 2)
    for _ in range(5):
        assert not compute(scheduler).admitted
    scheduler.remove(first)
    assert [s.id for s in compute(scheduler).admitted] == ["long"]


def test_cells_that_a_prompt_under_way_will_need_are_not_given_to_another() -> None:
    scheduler = Scheduler(cells=100, slots=4, batch_tokens=8)
    add(scheduler, "first", 60)
    second = add(scheduler, "second", 30)
    compute(scheduler)
    assert scheduler.free_cells == 92
    assert second.phase is Phase.WAITING


def test_a_request_as_long_as_the_cache_allows_is_admitted_when_it_is_alone() -> None:
    scheduler = Scheduler(cells=10, slots=2, batch_tokens=64)
    add(scheduler, "a", 9)
    assert parts(compute(scheduler)) == [("a", 0, 9, True)]


@pytest.mark.parametrize("tokens", [0, 10, 11])
def test_a_prompt_that_can_never_fit_is_refused(tokens: int) -> None:
    scheduler = Scheduler(cells=10, slots=2, batch_tokens=64)
    with pytest.raises(ValueError, match=f"{tokens} prompt tokens for a cache of 10"):
        add(scheduler, "a", tokens)
    assert not list(scheduler)


def test_when_the_cache_is_full_the_youngest_gives_way_and_comes_back() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=32)
    old, young = add(scheduler, "old", 10), add(scheduler, "young", 10)
    step = until_full(scheduler)
    assert step.swap_out == [young]
    assert [p.sequence for p in step.parts] == [old]
    assert young.phase is Phase.WAITING
    assert young.slot == -1
    kept = young.computed
    scheduler.remove(old)
    step = compute(scheduler)
    assert step.admitted == [young]
    assert parts(step) == [("young", kept, 1, True)]


def test_one_that_gave_way_comes_back_before_those_that_arrived_later() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=32)
    old = add(scheduler, "old", 10)
    add(scheduler, "young", 10)
    late = add(scheduler, "late", 10)
    assert late.slot == -1
    until_full(scheduler)
    scheduler.remove(old)
    assert next(s.id for s in compute(scheduler).admitted) == "young"


def test_a_request_that_awaits_its_kv_holds_cells_for_its_whole_prompt() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=32)
    awaiting = add(scheduler, "awaiting", 40, awaits_kv=True)
    assert parts(compute(scheduler)) == []
    assert awaiting.phase is Phase.AWAITING
    assert scheduler.free_cells == 20
    scheduler.stop_awaiting(awaiting)
    assert scheduler.free_cells == 60
    assert parts(compute(scheduler)) == [("awaiting", 0, 32, False)]


def test_a_request_that_awaits_its_kv_never_gives_way_even_if_it_is_the_youngest() -> None:
    scheduler = Scheduler(cells=100, slots=3, batch_tokens=32)
    oldest, middle = add(scheduler, "oldest", 5), add(scheduler, "middle", 5)
    awaiting = add(scheduler, "awaiting", 20, awaits_kv=True)
    assert until_full(scheduler).swap_out == [middle]
    assert awaiting.phase is Phase.AWAITING
    assert oldest.phase is Phase.RUNNING


def test_a_request_whose_kv_came_generates_without_computing_its_prompt() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=32)
    sequence = add(scheduler, "a", 20, awaits_kv=True)
    compute(scheduler)
    sequence.computed = 20
    scheduler.kv_arrived(sequence)
    sequence.tokens.append(0)
    assert parts(compute(scheduler)) == [("a", 20, 1, True)]


def test_only_what_is_missing_of_a_kv_is_computed_when_it_stops_coming() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=32)
    sequence = add(scheduler, "a", 20, awaits_kv=True)
    compute(scheduler)
    sequence.computed = 12
    scheduler.stop_awaiting(sequence)
    assert parts(compute(scheduler)) == [("a", 12, 8, True)]


def test_a_request_whose_handover_is_called_off_before_it_got_a_slot_is_computed_here() -> None:
    scheduler = Scheduler(cells=60, slots=1, batch_tokens=32)
    first = add(scheduler, "first", 5)
    second = add(scheduler, "second", 7, awaits_kv=True)
    compute(scheduler)
    scheduler.stop_awaiting(second)
    scheduler.remove(first)
    assert parts(compute(scheduler)) == [("second", 0, 7, True)]


def test_a_stalled_prompt_does_not_hold_others_up() -> None:
    scheduler = Scheduler(cells=60, slots=3, batch_tokens=4)
    stalled = add(scheduler, "stalled", 12)
    add(scheduler, "other", 3)
    compute(scheduler)
    stalled.stalled = True
    assert parts(compute(scheduler)) == [("other", 2, 1, True)]
    stalled.stalled = False
    assert parts(compute(scheduler)) == [("other", 3, 1, True), ("stalled", 2, 3, False)]


def test_removing_twice_frees_a_slot_once() -> None:
    scheduler = Scheduler(cells=60, slots=1, batch_tokens=32)
    sequence = add(scheduler, "a", 5)
    compute(scheduler)
    scheduler.remove(sequence)
    scheduler.remove(sequence)
    first, second = add(scheduler, "b", 5), add(scheduler, "c", 5)
    compute(scheduler)
    assert (first.slot, second.slot) == (0, -1)


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    scheduler = Scheduler(cells=1000, slots=4, batch_tokens=16)
    add(scheduler, "long", 400)
    compute(scheduler)
    add(scheduler, "longer", 500)
    add(scheduler, "short", 5)
    assert parts(compute(scheduler)) == [
        ("long", 16, 11, False),
        ("short", 0, 5, True),
    ]


def test_a_long_prompt_advances_beside_any_number_of_short_ones() -> None:
    scheduler = Scheduler(cells=1000, slots=4, batch_tokens=16, shared_chunk=16)
    long = add(scheduler, "long", 100)
    for number in range(12):
        add(scheduler, f"short {number}", 16)
        before = long.computed
        compute(scheduler)
        assert long.computed > before
