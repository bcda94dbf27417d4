"""What the files of :mod:`~lunet_fast.recsys.model.model_files` hold, in the format of
:mod:`lunet_fast.training.schema`.

``python -m lunet_fast.recsys.model.schema`` prints the schemas of the headers.

Tensors of a model file, little-endian: ``model.<name>``, the ``state_dict`` of
:class:`~lunet_fast.recsys.model.network.RatingModel`; ``users.ids`` and ``items.ids`` int64 ``[n]``, or where
ids are
strings, ``users.ids.text`` uint8, all of them in UTF-8 one after another, and ``users.ids.offsets`` int64
``[n + 1]``, where each begins and the last ends; ``items.title`` and ``items.genres`` likewise, if any.
"""

from __future__ import annotations

import dataclasses
import json

from lunet_fast.recsys.model import config
from lunet_fast.training.schema import CHECKPOINT_FORMAT, CHECKPOINT_HEADER, Schema, header_schema

MODEL_FORMAT = "lunet-fast model"
CANDIDATES_FORMAT = "lunet-fast candidates"

TEXT_COLUMNS = ("title", "genres")
"""What a model file can say of items."""

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


#: Format → the schema of its files' header.
HEADERS: dict[str, Schema] = {
    MODEL_FORMAT: header_schema(
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
    CHECKPOINT_FORMAT: CHECKPOINT_HEADER,
    CANDIDATES_FORMAT: header_schema(
        CANDIDATES_FORMAT, "What ranking was measured on.", dataset={"type": "string"}
    ),
}


if __name__ == "__main__":
    print(json.dumps(HEADERS, indent=2))
