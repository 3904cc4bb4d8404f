"""OpenAI's requests, as far as they are served. Fields that change the answer and are not served
are refused (`unsupported`), never ignored; other unknown fields are ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_STOPS = 16
INT32_END = 1 << 31
"""Engines count in 32 bits."""


class _Request(BaseModel):
    # strict: a number in quotes is a mistake of the caller's, and hiding it helps nobody.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class TextPart(_Request):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """One message. `name`, `tool_calls` and the like are passed on to the chat template."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: content as one string."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        extra = self.model_extra or {}
        role = "system" if self.role == "developer" else self.role
        return {**extra, "role": role, "content": content or ""}


class StreamOptions(_Request):
    """`include_usage`: one more event before the end, with the token counts."""

    include_usage: bool = False


Stop = Annotated[str, StringConstraints(min_length=1)]


class GenerationRequest(_Request):
    """What chat and text completions have in common. None: the default of `GenerateParams`."""

    model: str = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=INT32_END)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, lt=INT32_END)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def unsupported(self) -> str | None:
        """The name of a field that asks for something that is not served, if there is one."""
        if self.n not in (None, 1):
            return "n"
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                return name
        return None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT32_END)
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None

    def unsupported(self) -> str | None:
        """As above."""
        if self.tools:
            return "tools"
        if self.response_format and self.response_format.get("type") != "text":
            return "response_format"
        return "logprobs" if self.logprobs else super().unsupported()


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is a text, or tokens of the model."""

    prompt: str | list[Annotated[int, Field(ge=0, lt=INT32_END)]]
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def unsupported(self) -> str | None:
        """As above."""
        if self.best_of not in (None, 1):
            return "best_of"
        for name in ("suffix", "echo", "logprobs"):
            if getattr(self, name):
                return name
        return super().unsupported()
