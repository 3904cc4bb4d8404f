"""The base of every wire type, and the words that several of them share."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Role = Literal["prefill", "decode", "mixed"]
"""What a node is used for. Any node can do both phases; the role says what it is best at."""

InstanceState = Literal["starting", "loading", "ready", "backoff", "failed", "stopping"]
"""Where a loaded model is in its life. `backoff`: its engine died and will be started again."""

RouteKind = Literal["colocated", "split", "none"]
"""`none`: no node took the request."""


class Frozen(BaseModel):
    """An immutable value. Unknown fields are ignored, so that versions can differ in a pool."""

    model_config = ConfigDict(frozen=True, extra="ignore")
