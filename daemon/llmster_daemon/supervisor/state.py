"""The life of a supervised process. Pure: time comes in, decisions come out.

starting -> loading -> ready
   ^                     |    any exit that nobody asked for
   `----- backoff <------'    (failed: it can't work, or never did in five tries)

unload: -> stopping -> gone
"""

from dataclasses import dataclass, replace
from typing import Literal

LifeState = Literal["starting", "loading", "ready", "backoff", "failed", "stopping", "gone"]

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
STABLE_AFTER_S = 60.0
"""Ready for this long, a process has earned a fresh count of its failures."""
MAX_FAILED_STARTS = 5


@dataclass(frozen=True, slots=True)
class Life:
    """Where a process is. `restarts` counts all; `failures` those since it was last stable."""

    state: LifeState = "starting"
    progress: float | None = None
    restarts: int = 0
    failures: int = 0
    failed_starts: int = 0
    ready_since_s: float | None = None
    retry_at_s: float | None = None
    reason: str | None = None

    def spawned(self) -> "Life":
        """The process exists."""
        return replace(self, state="loading", progress=0.0) if self.state == "starting" else self

    def progressed(self, value: float) -> "Life":
        """It says how far it is, 0 to 1."""
        return replace(self, progress=value) if self.state == "loading" else self

    def became_ready(self, now_s: float) -> "Life":
        """It can serve."""
        if self.state not in ("starting", "loading"):
            return self
        return replace(
            self,
            state="ready",
            progress=None,
            ready_since_s=now_s,
            failed_starts=0,
            retry_at_s=None,
            reason=None,
        )

    def exited(self, now_s: float, reason: str, permanent: bool = False) -> "Life":
        """It is gone. `permanent`: starting it again can't help."""
        if self.state in ("gone", "failed", "backoff"):
            return self
        if self.state == "stopping":
            return replace(self, state="gone", progress=None)
        was_ready = self.state == "ready" and self.ready_since_s is not None
        ready_for_s = 0.0 if self.ready_since_s is None else now_s - self.ready_since_s
        stable = was_ready and ready_for_s >= STABLE_AFTER_S
        failures = 1 if stable else self.failures + 1
        failed_starts = 0 if was_ready else self.failed_starts + 1
        if permanent or failed_starts >= MAX_FAILED_STARTS:
            tries = "" if permanent else f" (gave up after {failed_starts} starts)"
            return replace(
                self,
                state="failed",
                progress=None,
                failures=failures,
                failed_starts=failed_starts,
                ready_since_s=None,
                reason=reason + tries,
            )
        return replace(
            self,
            state="backoff",
            progress=None,
            failures=failures,
            failed_starts=failed_starts,
            ready_since_s=None,
            retry_at_s=now_s + delay_s(failures),
            reason=reason,
        )

    def ticked(self, now_s: float) -> "Life":
        """Time has passed: leave `backoff` when its end has come."""
        if self.state == "backoff" and self.retry_at_s is not None and now_s >= self.retry_at_s:
            return replace(self, state="starting", restarts=self.restarts + 1, retry_at_s=None)
        return self

    def unloaded(self) -> "Life":
        """Nobody wants it any more."""
        if self.state in ("starting", "backoff", "failed", "gone"):
            return replace(self, state="gone", progress=None, retry_at_s=None)
        return replace(self, state="stopping", progress=None)


def delay_s(failures: int) -> float:
    """Seconds to wait after that many failures in a row: doubles up to a limit."""
    return float(min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(max(failures, 1) - 1, 16)))
