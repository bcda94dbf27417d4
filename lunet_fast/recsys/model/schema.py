"""What the files of :mod:`~lunet_fast.recsys.model.model_files` hold, in the format of
:mod:`lunet_fast.training.schema`.

``python -m lunet_fast.recsys.model.schema`` prints the JSON Schemas of the headers.

Tensors of a model file, little-endian: ``model.<name>``, the ``state_dict`` of
:class:`~lunet_fast.recsys.model.network.RatingModel`; ``users.ids`` and ``items.ids`` int64 ``[n]``, or where
ids are strings, ``users.ids.text`` uint8, all of them in UTF-8 one after another, and ``users.ids.offsets``
int64 ``[n + 1]``, where each begins and the last ends; ``items.title`` and ``items.genres`` likewise, if any.
``known.indptr`` int64 and ``known.indices`` int32: the pairs of the whole data as a sparse matrix of users by
items, where training had a part of them.
A model of recipe ``sequence`` is such a file of another format: ``model.<name>`` is of
:class:`~lunet_fast.recsys.model.state_network.StateNetwork`.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.training.schema import CHECKPOINT_FORMAT, CheckpointHeader, Header, Schema

MODEL_FORMAT = "lunet-fast model"
SEQUENCES_FORMAT = "lunet-fast sequence model"
CANDIDATES_FORMAT = "lunet-fast candidates"

TextColumn = Literal["title", "genres"]
TEXT_COLUMNS: tuple[str, ...] = get_args(TextColumn)
"""What a model file can say of items."""

Total = Annotated[int, Field(ge=0)]


def _each_once(names: list[TextColumn]) -> list[TextColumn]:
    if len(set(names)) < len(names):
        raise ValueError(f"item_info={names} must not repeat an entry")
    return names


Scale = Annotated[list[float], Field(min_length=2, max_length=2)]
TextColumns = Annotated[
    list[TextColumn], AfterValidator(_each_once), Field(json_schema_extra={"uniqueItems": True})
]


class ModelHeader(Header):
    """A trained model: its settings, the scale of its ratings, and how many ids and texts there are."""

    format: Literal["lunet-fast model"]
    config: TrainConfig
    scale: Scale
    n_users: Total
    n_items: Total
    item_info: TextColumns


class SequencesHeader(Header):
    """A trained model of recipe ``sequence``, as :class:`ModelHeader`."""

    format: Literal["lunet-fast sequence model"]
    config: SequenceConfig
    scale: Scale
    n_users: Total
    n_items: Total
    item_info: TextColumns


class CandidatesHeader(Header):
    """What ranking was measured on."""

    format: Literal["lunet-fast candidates"]
    dataset: str


#: Format → the header of its files.
HEADERS: dict[str, Schema] = {
    MODEL_FORMAT: ModelHeader,
    SEQUENCES_FORMAT: SequencesHeader,
    CHECKPOINT_FORMAT: CheckpointHeader,
    CANDIDATES_FORMAT: CandidatesHeader,
}


if __name__ == "__main__":
    print(json.dumps({kind: header.model_json_schema() for kind, header in HEADERS.items()}, indent=2))
