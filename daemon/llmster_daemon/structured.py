"""Answers that must have a form: JSON Schema to the grammar (GBNF) that engines follow."""

import json
from functools import lru_cache
from typing import Any

from .errors import BadRequest

MAX_SCHEMA_BYTES = 64 << 10
ANY_OBJECT = '{"type":"object"}'
"""`response_format: json_object`: any object will do."""


def grammar_of(response_format: dict[str, Any]) -> str | None:
    """The grammar for OpenAI's `response_format`; None for plain text.

    The first call imports llama.cpp's converter, so call this in a thread. Raises BadRequest.
    """
    kind = response_format.get("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return _convert(ANY_OBJECT)
    if kind != "json_schema":
        raise _bad(f"there is no type '{str(kind)[:40]}'")
    holder = response_format.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise _bad("json_schema.schema must be an object")
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise _bad(f"the schema is larger than {MAX_SCHEMA_BYTES >> 10} KiB")
    return _convert(text)


@lru_cache(maxsize=64)
def _convert(schema: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = json_schema_to_gbnf(schema)
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
        raise _bad(f"the schema can't be followed ({type(error).__name__}: {error})") from error
    except (RecursionError, IndexError, NotImplementedError) as error:
        raise _bad(f"the schema can't be followed ({type(error).__name__})") from error
    return str(grammar)


def _bad(message: str) -> BadRequest:
    return BadRequest(
        "bad_schema",
        f"response_format: {message}",
        "use json_object, or json_schema with a JSON Schema whose $refs are local",
        param="response_format",
    )
