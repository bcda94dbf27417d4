"""Files of trained recommenders: the model with its ids and titles, and what a ranking was measured on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lunet_fast.recsys.data.ratings import IdMap
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.schema import (
    CANDIDATES_FORMAT,
    HEADERS,
    MODEL_FORMAT,
    SEQUENCES_FORMAT,
    TEXT_COLUMNS,
)
from lunet_fast.recsys.model.sequence_config import SequenceConfig
from lunet_fast.recsys.model.state_network import StateNetwork
from lunet_fast.training.checkpoints import pass_by, whole_tensors
from lunet_fast.training.files import CheckpointError, kind_of, read_tensors, write_tensors
from lunet_fast.training.sharding import Dealt, DealtTables

Model = TypeVar("Model", RatingModel, StateNetwork)


@dataclass(frozen=True)
class _Trained(Generic[Model]):
    """A model and what leads from a user's own ids to its indices and back."""

    model: Model
    users: IdMap
    items: IdMap
    scale: tuple[float, float]
    """The lowest and the highest rating that is possible."""
    item_info: pd.DataFrame | None = None
    """Titles and genres, a row for each index."""
    known: Interactions | None = None
    """Who rated what in the whole data, tested and held-out parts too; None where training had all."""


class TrainedModel(_Trained[RatingModel]):
    """A model of ratings and interactions, with its ids."""

    def rated(self) -> Interactions:
        """Every pair that is known, for leaving out of recommendations."""
        return self.model.interactions if self.known is None else self.known


class TrainedSequences(_Trained[StateNetwork]):
    """A model of recipe ``sequence``, with its ids."""

    def rated(self) -> Interactions:
        """As of :class:`TrainedModel`."""
        return self.model.sequences.interactions() if self.known is None else self.known


def save_model(path: Path | None, trained: TrainedModel, dealt: DealtTables | None = None) -> None:
    """Write model, settings, ids, scale and titles into one safetensors file.

    With ``dealt`` every process calls this, those without a file with None; the file is that of the whole.
    """
    tensors = whole_tensors("model.", trained.model, dealt)
    if path is None:
        pass_by(tensors)
        return
    _write(path, tensors, MODEL_FORMAT, trained)


def save_sequences(path: Path, trained: TrainedSequences) -> None:
    """As :func:`save_model`, for recipe ``sequence``."""
    _write(path, whole_tensors("model.", trained.model, None), SEQUENCES_FORMAT, trained)


def _write(
    path: Path, tensors: dict[str, Tensor | Dealt], kind: str, trained: TrainedModel | TrainedSequences
) -> None:
    """The ``tensors`` of a model with what leads to it."""
    tensors |= _pack_ids("users", trained.users) | _pack_ids("items", trained.items)
    if trained.known is not None:
        tensors |= {f"known.{name}": getattr(trained.known, name) for name in ("indptr", "indices")}
    columns = []
    if trained.item_info is not None:
        columns = [name for name in TEXT_COLUMNS if name in trained.item_info.columns]
        for name in columns:
            texts = trained.item_info[name].fillna("").astype(str).tolist()
            tensors |= _pack_texts(f"items.{name}", texts)
    state = {
        "config": trained.model.config.to_dict(),
        "scale": list(trained.scale),
        "n_users": len(trained.users),
        "n_items": len(trained.items),
        "item_info": columns,
    }
    write_tensors(path, tensors, kind, state)


def load_model(path: Path) -> TrainedModel:
    """Read what :func:`save_model` wrote, onto the CPU; :class:`CheckpointError` where it is unusable.

    Files of every version of the format are read. A file may come from anybody: nothing in it is executed,
    its header has to fit :data:`~lunet_fast.recsys.model.schema.HEADERS`, and the names, dtypes and shapes of
    its tensors the settings, before anything is allocated for these. What it predicts is its maker's word
    alone.
    """
    model, *rest = _read(path, MODEL_FORMAT, TrainConfig, RatingModel)
    return TrainedModel(model, *rest)


def load_sequences(path: Path) -> TrainedSequences:
    """Read what :func:`save_sequences` wrote, as :func:`load_model` does."""
    model, *rest = _read(path, SEQUENCES_FORMAT, SequenceConfig, StateNetwork)
    return TrainedSequences(model, *rest)


def is_of_sequences(path: Path) -> bool:
    """Whether a model file is of recipe ``sequence``; the errors of reading it where it is no such file."""
    return kind_of(path) == SEQUENCES_FORMAT


def _read(path: Path, kind: str, config_type: Any, model_type: Any) -> tuple[Any, ...]:
    """(model, users, items, scale, titles, known pairs) of a file of that format."""
    tensors, header = read_tensors(path, kind, HEADERS[kind])
    try:
        config = config_type.from_dict(header["config"])
        users, items = (_unpack_ids(side, tensors, header[f"n_{side}"]) for side in ("users", "items"))
        low, high = (float(end) for end in header["scale"])
        if not low <= high:
            raise ValueError(f"scale=({low:g}, {high:g}) must be the lowest and the highest rating")
        info = {name: _unpack_texts(f"items.{name}", tensors, len(items)) for name in header["item_info"]}
        known = _unpack_known(tensors, len(users), len(items))
        # What is left is the model's.
        state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        if len(state) < len(tensors):
            other = min(name for name in tensors if not name.startswith("model."))
            raise ValueError(f"the tensor {other!r} is not of a model file")
        model = model_type.from_state(config, state, len(users), len(items))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error
    return model, users, items, (low, high), pd.DataFrame(info) if info else None, known


def save_candidates(path: Path, parts: Parts) -> None:
    """Write what ranking was measured on: held-out pairs ``user`` and ``item``, int64 ``[H]``, and the items
    ``candidates``, int64 ``[H, C]``, that each was ranked with, all as indices; -1 for none.
    """
    assert parts.held_out is not None
    assert parts.candidates is not None
    tensors = {"user": parts.held_out.user, "item": parts.held_out.item, "candidates": parts.candidates}
    write_tensors(path, tensors, CANDIDATES_FORMAT, {"dataset": parts.training.name})


def _pack_ids(name: str, ids: IdMap) -> dict[str, Tensor]:
    if ids.ids.dtype == np.int64:
        return {f"{name}.ids": torch.from_numpy(ids.ids.copy())}
    return _pack_texts(f"{name}.ids", [str(text) for text in ids.ids])


def _unpack_ids(name: str, tensors: dict[str, Tensor], count: int) -> IdMap:
    """What :func:`_pack_ids` packed, taken out of ``tensors``; ``ValueError`` unless it is ``count`` ids."""
    if f"{name}.ids" in tensors:
        ids = IdMap(_taken(f"{name}.ids", tensors, torch.int64).numpy())
    else:
        ids = IdMap(_unpack_texts(f"{name}.ids", tensors))
    if len(ids) != count:
        raise ValueError(f"the header has {count} {name} but {len(ids)} {name[:-1]} ids are there")
    return ids


def _unpack_known(tensors: dict[str, Tensor], n_users: int, n_items: int) -> Interactions | None:
    """The pairs of the whole data, taken out of ``tensors``; files of before have none."""
    if "known.indptr" not in tensors:
        return None
    indptr, indices = (
        _taken(f"known.{name}", tensors, dtype)
        for name, dtype in (("indptr", torch.int64), ("indices", torch.int32))
    )
    if len(indptr) != n_users + 1:
        raise ValueError(f"known.indptr is of {len(indptr) - 1} users and there are {n_users}")
    return Interactions.from_csr(indptr, indices, n_items)


def _pack_texts(name: str, texts: list[str]) -> dict[str, Tensor]:
    """Texts as one UTF-8 tensor and the place where each starts: too many for the file's header."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {f"{name}.text": torch.from_numpy(data), f"{name}.offsets": torch.from_numpy(offsets)}


def _unpack_texts(name: str, tensors: dict[str, Tensor], count: int | None = None) -> list[str]:
    """What :func:`_pack_texts` packed, taken out of ``tensors``."""
    data = _taken(f"{name}.text", tensors, torch.uint8).numpy().tobytes()
    offsets = _taken(f"{name}.offsets", tensors, torch.int64).tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != len(data) or sorted(offsets) != offsets:
        raise ValueError(f"{name}.offsets does not cut {name}.text into texts")
    if count is not None and len(offsets) != count + 1:
        raise ValueError(f"{name} has {len(offsets) - 1} texts for {count} items")
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(offsets)]


def _taken(name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """``tensors[name]``, taken out of it: ``[n]`` of ``dtype``, or ``ValueError``."""
    tensor = tensors.pop(name)
    if tensor.ndim != 1 or tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} [n], got {tensor.dtype} {list(tensor.shape)}")
    return tensor
