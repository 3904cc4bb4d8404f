"""Messages to a prompt, with the chat template that the model's file brings.

The template is a program from an untrusted file: it runs in jinja2's sandbox, where it can read
what it is given and nothing else, and its time and output are bounded.
"""

import datetime
import time
from functools import lru_cache
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import BadRequest, LlmsterError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models without a template of their own."""
MAX_PROMPT_CHARS = 32 << 20
MAX_RENDER_S = 2.0
MAX_PRODUCT = 1 << 20
"""Items of a sequence, or bits of a number, that `*` and `**` may make."""
_DEADLINE = "deadline!"
"""No template can name this variable."""


class _Generation(Extension):
    """The `{% generation %}` block of some templates: marks answers for training, shows them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, where loops and calls end in time, and products stay small."""

    intercepted_binops = frozenset({"*", "**"})

    @pass_context
    def step(self, context: Context) -> bool:
        """Called by every turn of a loop and every call of a macro. Raises OverflowError."""
        if time.monotonic() > context[_DEADLINE]:
            raise OverflowError(f"more than {MAX_RENDER_S:g} s")
        return True

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A product or a power. Raises OverflowError for a large one."""
        if _size(operator, left, right) > MAX_PRODUCT:
            raise OverflowError(f"a large result of '{operator}'")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template, with a call of `step` in all that can repeat."""
        template = super()._parse(source, name, filename)
        repeating: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *template.find_all(nodes.For),
            *template.find_all(nodes.Macro),
            *template.find_all(nodes.CallBlock),
        ]
        for node in repeating:
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(step))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(step, node.test)
            node.set_lineno(node.lineno).set_environment(self)
        return template


def _size(operator: str, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        return bits + right.bit_length() if operator == "*" else bits * right
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return len(sequence) * count
    return 0


def _refuse(message: str) -> None:
    raise BadRequest(
        "bad_messages",
        f"the model's chat template refuses these messages: {message}",
        "check the order of roles: usually a system message, then user and assistant in turn",
        param="messages",
    )


@lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def render(
    source: str | None, messages: list[dict[str, Any]], bos_token: str, eos_token: str
) -> str:
    """The prompt, up to where the model's answer begins. Raises BadRequest."""
    try:
        prompt: str = _compile(source or CHATML).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
            **{_DEADLINE: time.monotonic() + MAX_RENDER_S},
        )
        prompt.encode()  # half a surrogate pair, which no engine could take, fails here
    except LlmsterError:
        raise
    except Exception as error:
        # Whatever goes wrong in a program of somebody else's.
        raise BadRequest(
            "bad_messages",
            f"the model's chat template can't take these messages ({type(error).__name__})",
            "check roles and contents; `POST /v1/completions` takes a prompt as it is",
            param="messages",
        ) from error
    if len(prompt) > MAX_PROMPT_CHARS:
        raise BadRequest("prompt_too_large", "the prompt is too large", "shorten it")
    return prompt
