"""A node's liveness, from its silence and its connection alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmster_control.registry.liveness import LOST_AFTER_S, SUSPECT_AFTER_S, judge

WORSE = {"online": 0, "suspect": 1, "lost": 2}
SILENCE = st.floats(min_value=0, allow_nan=False) | st.sampled_from(
    [SUSPECT_AFTER_S, LOST_AFTER_S, math.inf]
)


@given(SILENCE, SILENCE, st.booleans())
def test_longer_silence_never_makes_it_better(one: float, other: float, connected: bool) -> None:
    shorter, longer = sorted((one, other))
    assert WORSE[judge(shorter, connected)] <= WORSE[judge(longer, connected)]


@given(SILENCE)
def test_without_a_connection_it_is_never_online(silent_s: float) -> None:
    assert judge(silent_s, connected=False) != "online"


@given(SILENCE)
def test_a_connection_never_makes_it_worse(silent_s: float) -> None:
    assert WORSE[judge(silent_s, connected=True)] <= WORSE[judge(silent_s, connected=False)]


@pytest.mark.parametrize(
    ("silent_s", "connected", "liveness"),
    [
        (0.0, True, "online"),
        (math.nextafter(SUSPECT_AFTER_S, 0), True, "online"),
        (SUSPECT_AFTER_S, True, "suspect"),
        (math.nextafter(LOST_AFTER_S, 0), True, "suspect"),
        (LOST_AFTER_S, True, "lost"),
        (math.inf, True, "lost"),
        (0.0, False, "suspect"),
        (math.nextafter(LOST_AFTER_S, 0), False, "suspect"),
        (LOST_AFTER_S, False, "lost"),
    ],
)
def test_the_thresholds(silent_s: float, connected: bool, liveness: str) -> None:
    assert judge(silent_s, connected) == liveness
