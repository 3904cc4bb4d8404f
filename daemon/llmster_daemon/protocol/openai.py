"""OpenAI's requests, as far as they are served. Fields that change the answer and are not served
are refused (`unsupported`), never ignored; other unknown fields are ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_GRAMMAR_CHARS = 64 << 10
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


TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
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
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_BIASES
    )
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_CHARS)
    """GBNF, as llama-server takes it."""

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def unsupported(self) -> str | None:
        """The name of a field that asks for something that is not served, if there is one."""
        return "n" if self.n not in (None, 1) else None

    def alternatives(self) -> int | None:
        """How many alternatives to tell beside log probabilities; None: no log probabilities."""
        return None

    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs of token and bias."""
        return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=INT32_END)
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def unsupported(self) -> str | None:
        """As above."""
        for name in ("tools", "functions"):
            if getattr(self, name):
                return name
        if self.tool_choice not in (None, "none", "auto"):
            return "tool_choice"
        return super().unsupported()

    def alternatives(self) -> int | None:
        """As above."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is a text, or tokens of the model."""

    prompt: str | list[Annotated[int, Field(ge=0, lt=INT32_END)]]
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def alternatives(self) -> int | None:
        """As above."""
        return self.logprobs

    def unsupported(self) -> str | None:
        """As above."""
        if self.best_of not in (None, 1):
            return "best_of"
        for name in ("suffix", "echo"):
            if getattr(self, name):
                return name
        return super().unsupported()
