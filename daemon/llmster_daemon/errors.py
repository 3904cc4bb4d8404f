"""Every error that llmster raises on purpose.

    LlmsterError(code, message, hint, status)
    |- BadRequest          400  the request itself is wrong
    |  `- ContextOverflow  400  prompt and completion do not fit the context
    |- NotFound            404  no such model, instance, node or route
    |- Conflict            409  what is asked contradicts the present state
    |- Unavailable         503  nothing can serve this now; asking again may help
    |  `- EngineLost       503  the engine died or hung under the request
    |- BadModel            422  a model file that can't be used
    `- HomeError           500  the home directory can't be used (full, read-only)

Over HTTP each becomes one OpenAI-shaped envelope (`envelope`); on the command line, one line and
a hint, with exit code 1. `hint` names the next command to run, or what to change.
"""

from typing import Any


class LlmsterError(Exception):
    """The root. `code` is stable and for machines; `message` and `hint` are for people."""

    default_status = 500

    def __init__(
        self,
        code: str,
        message: str,
        hint: str = "",
        status: int | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.status = self.default_status if status is None else status
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def body(self) -> dict[str, Any]:
        """The inner object of the envelope."""
        kind = "invalid_request_error" if 400 <= self.status < 500 else "server_error"
        return {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
            "hint": self.hint,
        }

    def envelope(self) -> dict[str, Any]:
        """The one shape in which an error leaves over HTTP."""
        return {"error": self.body()}

    @classmethod
    def from_body(cls, body: dict[str, Any], status: int | None = None) -> "LlmsterError":
        """The error that another process of ours reported."""
        return LlmsterError(
            code=str(body.get("code") or "unknown"),
            message=str(body.get("message") or "unknown error"),
            hint=str(body.get("hint") or ""),
            status=status,
            param=body.get("param"),
        )


class BadRequest(LlmsterError):
    default_status = 400


class ContextOverflow(BadRequest):
    """The prompt, or prompt and completion, are longer than the context. In tokens."""

    def __init__(self, prompt_tokens: int, max_tokens: int | None, context_length: int) -> None:
        asked = f" and {max_tokens:,} to generate" if max_tokens else ""
        super().__init__(
            "context_length_exceeded",
            f"the prompt has {prompt_tokens:,} tokens{asked}; the context holds {context_length:,}",
            "shorten the prompt, ask for fewer tokens, or load the model again with"
            " `llmster load KEY --context N`",
            param="messages",
        )


class NotFound(LlmsterError):
    default_status = 404


class Conflict(LlmsterError):
    default_status = 409


class BadModel(LlmsterError):
    default_status = 422


class Unavailable(LlmsterError):
    default_status = 503


class EngineLost(Unavailable):
    """The engine went away while it worked on a request."""

    def __init__(self, message: str = "the engine stopped while it worked on this request") -> None:
        super().__init__("engine_lost", message, "ask again; `llmster ps` shows the engine's state")


class HomeError(LlmsterError):
    default_status = 500


def unknown_model(name: str, known: list[str], on_disk: bool = False) -> NotFound:
    """404 for a model nobody serves; the hint depends on whether it only needs loading."""
    if on_disk:
        return NotFound(
            "model_not_loaded",
            f"the model '{name}' is in the store but not loaded",
            f"run `llmster load {name}`",
            param="model",
        )
    served = ", ".join(known) if known else "none"
    return NotFound(
        "model_not_found",
        f"no node of the pool has the model '{name}' (loaded: {served})",
        "run `llmster ls` to see the models, `llmster import FILE` to add one",
        param="model",
    )
