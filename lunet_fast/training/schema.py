"""The format of the files of :mod:`~lunet_fast.training.files`: JSON Schema of headers, and the check against
it.

A file is safetensors: eight bytes with the length of a JSON object, that object (names, dtypes, shapes and
places of the tensors), the tensors. Under ``__metadata__`` it has the one key ``lunet_fast``, a string of
JSON: the *header*, which a schema describes for each kind of file.

Version 2 of the format has ``sha256`` in the header: the digest of the rest of the header, as JSON with
sorted keys and no white space, followed by, for each tensor in the order of their names, the JSON array
[name, dtype, shape] and the bytes. Version 1 is the same without it.
"""

from __future__ import annotations

import math
import re
from typing import Any

CHECKPOINT_FORMAT = "lunet-fast checkpoint"
FORMAT_VERSION = 2

DIGEST_FROM = 2
"""The version of the format from which ``sha256`` has to be there."""

Schema = dict[str, Any]


def header_schema(kind: str, description: str, first: int = 1, **properties: Schema) -> Schema:
    """Of the headers of files of ``kind``, with these properties beside the common ones, all required but the
    digest; ``first`` is the version of the format that the kind came with."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind,
        "description": description,
        "type": "object",
        "properties": {
            "format": {"const": kind},
            "version": {"type": "integer", "minimum": first, "maximum": FORMAT_VERSION},
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            **properties,
        },
        "required": ["format", "version", *properties],
        "additionalProperties": False,
    }


CHECKPOINT_HEADER = header_schema(
    CHECKPOINT_FORMAT, "An interrupted training: how far it is.", state={"type": "object"}
)


def _is_number(value: Any) -> bool:
    # An integer may be too large for a float, of which the schema says nothing.
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


_TYPES: dict[str, Any] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: _is_number(value) and not isinstance(value, bool),
}

_KEYWORDS: dict[str, Any] = {
    "type": lambda value, wanted: None if _TYPES[wanted](value) else f"must be of type {wanted}",
    "const": lambda value, wanted: None if value == wanted else f"must be {wanted!r}",
    "enum": lambda value, wanted: None if value in wanted else f"must be one of {', '.join(wanted)}",
    "minimum": lambda value, wanted: None if value >= wanted else f"must be at least {wanted}",
    "maximum": lambda value, wanted: None if value <= wanted else f"must be at most {wanted}",
    "pattern": lambda value, wanted: None if re.search(wanted, value) else f"must match {wanted}",
    "minItems": lambda value, wanted: None if len(value) >= wanted else f"must have {wanted} entries",
    "maxItems": lambda value, wanted: None if len(value) <= wanted else f"must have {wanted} entries",
    "uniqueItems": lambda value, wanted: (
        None if len({repr(entry) for entry in value}) == len(value) else "must not repeat an entry"
    ),
    "required": lambda value, wanted: next((f"lacks {name!r}" for name in wanted if name not in value), None),
}


def violation(value: Any, schema: Schema, place: str = "the header") -> str | None:
    """What is wrong with a JSON value, or None: the place, the value and what it must be.

    The part of JSON Schema that the headers here use; the type is looked at first, so that every other rule
    meets a value of its kind.
    """
    for keyword, check in _KEYWORDS.items():
        if keyword in schema:
            wrong = check(value, schema[keyword])
            if wrong is not None:
                return f"{place}: {shown(value)} {wrong}"
    properties: Schema = schema.get("properties", {})
    if isinstance(value, dict):
        if schema.get("additionalProperties") is False:
            unknown = next((name for name in value if name not in properties), None)
            if unknown is not None:
                return f"{place}: unknown {shown(unknown)}; known are {', '.join(properties)}"
        for name, inner in properties.items():
            wrong = violation(value[name], inner, name) if name in value else None
            if wrong is not None:
                return wrong
    elif isinstance(value, list) and "items" in schema:
        for each in value:
            wrong = violation(each, schema["items"], f"an entry of {place}")
            if wrong is not None:
                return wrong
    return None


def shown(value: Any, limit: int = 60) -> str:
    """The value for a message, cut where it is long: what is refused may be of any size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
