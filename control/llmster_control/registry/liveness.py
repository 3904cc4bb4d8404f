"""When a silent node is suspect, and when it is lost. Pure."""

from llmster_control.protocol import Liveness

SUSPECT_AFTER_S = 3.0
"""Three missed reports: slow, or gone; used only where nothing else can serve."""
LOST_AFTER_S = 10.0


def judge(silent_s: float, connected: bool) -> Liveness:
    """The liveness of a node that last reported `silent_s` seconds ago.

    A closed connection makes it suspect at once. There is no memory: one report makes it online.
    """
    if silent_s >= LOST_AFTER_S:
        return "lost"
    if silent_s >= SUSPECT_AFTER_S or not connected:
        return "suspect"
    return "online"
