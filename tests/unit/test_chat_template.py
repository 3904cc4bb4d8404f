"""Prompts from messages, with chat templates that nobody vouches for."""

import time
from pathlib import Path
from typing import Any

import pytest

from llmster_daemon import chat_template
from llmster_daemon.chat_template import MAX_PROMPT_CHARS, render
from llmster_daemon.errors import BadRequest
from llmster_daemon.models.gguf import read_gguf

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""


def prompt(source: str | None, messages: list[dict[str, Any]] | None = None) -> str:
    return render(source, HELLO if messages is None else messages, "<s>", "</s>")


def refused(source: str, messages: list[dict[str, Any]] | None = None) -> BadRequest:
    """The error, of which some parts are the same for every template that fails."""
    with pytest.raises(BadRequest) as caught:
        prompt(source, messages)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "bad_messages", "messages")
    assert error.hint
    return error


@pytest.mark.parametrize("source", [None, ""])
def test_models_without_a_template_get_chatml(source: str | None) -> None:
    assert prompt(source, TALK) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_smollm2() -> None:
    assert prompt(SMOLLM2) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt(SMOLLM2, TALK) == prompt(None, TALK)


@pytest.mark.live
def test_the_template_of_the_real_sample_model(sample_model: Path) -> None:
    assert read_gguf(sample_model).chat_template == SMOLLM2


def test_tokens_that_begin_and_end_a_text() -> None:
    assert prompt(LLAMA2, TALK[1:]) == ("<s>[INST] Hello [/INST] Hi! </s><s>[INST] Bye [/INST]")


def test_blocks_leave_no_space_behind() -> None:
    """As transformers renders: `trim_blocks` and `lstrip_blocks`."""
    source = (
        "{% for m in messages %}\n  {% if m.role %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert prompt(source) == "Hello\n"


def test_loops_can_be_left() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% endfor %}"
    )
    assert prompt(source, TALK) == "systemuser"


def test_what_is_marked_for_training_is_shown() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert prompt(source, TALK) == "Be brief.HelloHi!Bye"
    refused("{% generation %}no end")


def test_what_templates_are_given() -> None:
    source = "{{ bos_token }} {{ eos_token }} {{ add_generation_prompt }} {{ tools is none }}"
    assert prompt(source) == "<s> </s> True True"
    assert prompt("{{ nothing }}") == ""
    assert prompt("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}"
    )
    assert prompt(source, TALK) == "4"


def test_messages_can_have_more_than_text() -> None:
    tool = {"role": "tool", "content": "42", "name": "answer", "tool_call_id": "c1"}
    assert prompt("{{ messages[0].name }} {{ messages[0] | tojson }}", [tool]).startswith(
        'answer {"content": "42"'
    )


def test_a_template_can_refuse_messages() -> None:
    error = refused(LLAMA2, TALK)
    assert "roles must alternate" in error.message
    assert "order of roles" in error.hint


def test_a_role_that_the_template_does_not_know() -> None:
    source = (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('Unknown role: ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert prompt(source) == "Hello"
    assert "Unknown role: system" in refused(source, TALK).message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ (messages | attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}{{ ''.nothing.here }}",
        "{% import 'os' as os %}",
        "{% from 'os' import system %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'base' %}",
        "{{ __import__('os') }}",
        "{{ open('/etc/passwd') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
    ],
)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    messages = [dict(HELLO[0])]
    refused(source, messages)
    assert messages == HELLO


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}{{ '{0.__class__}'.format(messages) }}",
        "{{ messages | attr('__class__') }}",
        "{{ raise_exception.__globals__ }}{{ strftime_now.__code__ }}",
    ],
)
def test_hidden_attributes_show_nothing(source: str) -> None:
    assert "class" not in prompt(source)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{{ 'unfinished", "TemplateSyntaxError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% break %}", "SyntaxError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages | nosuchfilter }}", "TemplateAssertionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ {}['a']['b'] }}", "UndefinedError"),
        ("{{ messages[0].content.index('z') }}", "ValueError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("(" * 5000 + "{{" + "(" * 5000, "TemplateSyntaxError|RecursionError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    ],
)
def test_whatever_a_template_raises_is_the_request_s_error(source: str, kind: str) -> None:
    message = refused(source).message
    assert any(f"({name})" in message for name in kind.split("|"))


def test_errors_do_not_quote_messages() -> None:
    secret = [{"role": "user", "content": "my secret"}]
    error = refused(
        "{{ messages[0].content | int(base='x') }}{{ messages[0].content + 1 }}", secret
    )
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    "source",
    [
        # Each of these would take hours.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}"
        "{% for a in r %}{% for b in r if b < 0 %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{{ r | sum }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% for a in [[[]]] recursive %}{{ loop([[[]]]) if loop.depth < 60 }}"
        "{{ loop([[[]]]) if loop.depth < 60 }}{% endfor %}",
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call f() %}" * 60
        + "x"
        + "{% endcall %}" * 60,
    ],
    ids=["loops", "filtered", "sums", "macros", "recursive", "callers"],
)
def test_endless_work_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.2)
    started = time.monotonic()
    assert "(OverflowError)" in refused(source).message
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ ([0] * 100000) * 100000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(n=3) %}"
        "{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_huge_results_are_refused(source: str) -> None:
    assert "(OverflowError)" in refused(source).message


def test_sums_of_ordinary_size_are_not_refused() -> None:
    assert prompt("{{ '-' * 10 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 1.5 * 2 }}") == (
        "----------1210240.53.0"
    )


def test_long_chats_are_not_refused() -> None:
    long = [{"role": "user", "content": "x" * 100}] * 20_000
    assert len(prompt(SMOLLM2, long)) > 2_000_000


def test_a_prompt_beyond_all_bounds() -> None:
    half = [{"role": "user", "content": "x" * (MAX_PROMPT_CHARS // 2)}]
    with pytest.raises(BadRequest) as caught:
        prompt("{{ messages[0].content }}{{ messages[0].content }}!", half)
    assert caught.value.code == "prompt_too_large"
