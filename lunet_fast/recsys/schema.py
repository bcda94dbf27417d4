"""What the files of :mod:`~lunet_fast.recsys.checkpoints` hold, as JSON Schema, and the check against it.

A file is safetensors: eight bytes with the length of a JSON object, that object (names, dtypes, shapes and
places of the tensors), the tensors. Under ``__metadata__`` it has the one key ``lunet_fast``, a string of
JSON: the *header*, which :data:`HEADERS` describes for each kind of file; ``python -m
lunet_fast.recsys.schema`` prints the schemas.

Version 2 of the format has ``sha256`` in the header: the digest of the rest of the header, as JSON with
sorted keys and no white space, followed by, for each tensor in the order of their names, the JSON array
[name, dtype, shape] and the bytes. Version 1 is the same without it.

Tensors of a model file, little-endian: ``model.<name>``, the ``state_dict`` of
:class:`~lunet_fast.recsys.model.RatingModel`; ``users.ids`` and ``items.ids`` int64 ``[n]``, or where ids are
strings, ``users.ids.text`` uint8, all of them in UTF-8 one after another, and ``users.ids.offsets`` int64
``[n + 1]``, where each begins and the last ends; ``items.title`` and ``items.genres`` likewise, if any.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

from lunet_fast.recsys import config

MODEL_FORMAT = "lunet-fast model"
CHECKPOINT_FORMAT = "lunet-fast checkpoint"
CANDIDATES_FORMAT = "lunet-fast candidates"
FORMAT_VERSION = 2

DIGEST_FROM = 2
"""The version of the format from which ``sha256`` has to be there."""

TEXT_COLUMNS = ("title", "genres")
"""What a model file can say of items."""

Schema = dict[str, Any]

_FIELD_TYPES: dict[str, Schema] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "tuple[int, ...]": {"type": "array", "items": {"type": "integer"}},
}


def _config_schema() -> Schema:
    """The fields of ``TrainConfig``, whose own checks say which values are allowed; none has to be there."""
    fields = dataclasses.fields(config.TrainConfig)
    return {
        "type": "object",
        "properties": {field.name: _FIELD_TYPES[str(field.type)] for field in fields},
        "additionalProperties": False,
    }


def _header_schema(kind: str, description: str, **properties: Schema) -> Schema:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind,
        "description": description,
        "type": "object",
        "properties": {
            "format": {"const": kind},
            "version": {"type": "integer", "minimum": 1, "maximum": FORMAT_VERSION},
            "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            **properties,
        },
        "required": ["format", "version", *properties],
        "additionalProperties": False,
    }


#: Format → the schema of its files' header.
HEADERS: dict[str, Schema] = {
    MODEL_FORMAT: _header_schema(
        MODEL_FORMAT,
        "A trained model: its settings, the scale of its ratings, and how many ids and texts there are.",
        config=_config_schema(),
        scale={"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        n_users={"type": "integer", "minimum": 0},
        n_items={"type": "integer", "minimum": 0},
        item_info={
            "type": "array",
            "items": {"type": "string", "enum": list(TEXT_COLUMNS)},
            "uniqueItems": True,
        },
    ),
    CHECKPOINT_FORMAT: _header_schema(
        CHECKPOINT_FORMAT, "An interrupted training: how far it is.", state={"type": "object"}
    ),
    CANDIDATES_FORMAT: _header_schema(
        CANDIDATES_FORMAT, "What ranking was measured on.", dataset={"type": "string"}
    ),
}


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

    The part of JSON Schema that :data:`HEADERS` uses; the type is looked at first, so that every other rule
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


if __name__ == "__main__":
    print(json.dumps(HEADERS, indent=2))
