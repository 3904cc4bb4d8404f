"""Messages to a prompt, with the chat template that the model's file brings.

The template is a program from an untrusted file: it runs in jinja2's sandbox, where it can read
what it is given and nothing else, and its work and output are bounded.
"""

import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import BadRequest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For models without a template of their own."""
MAX_PROMPT_CHARS = 32 << 20


class _Generation(Extension):
    """The `{% generation %}` block of some templates: marks answers for training, shows them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise BadRequest(
        "bad_messages",
        f"the model's chat template refuses these messages: {message}",
        "check the order of roles: usually a system message, then user and assistant in turn",
        param="messages",
    )


@lru_cache(maxsize=32)
def _compile(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
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
        prompt = _compile(source or CHATML).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=None,
        )
    except (TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise BadRequest(
            "bad_messages",
            f"the model's chat template can't take these messages ({type(error).__name__})",
            "check roles and contents; `POST /v1/completions` takes a prompt as it is",
            param="messages",
        ) from error
    if len(prompt) > MAX_PROMPT_CHARS:
        raise BadRequest("prompt_too_large", "the prompt is too large", "shorten it")
    return str(prompt)
