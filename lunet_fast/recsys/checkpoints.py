"""Files of a run: trained models, and what an interrupted training needs. safetensors and JSON, no pickle.

Every file is written beside its place and moved there when it is complete, so that a reader or a crash finds
the old file or the new one. safetensors is imported on use: it belongs to the extra ``lunet-fast[train]``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lunet_fast.recsys.config import TrainConfig
from lunet_fast.recsys.model import RatingModel
from lunet_fast.recsys.protocols import Parts
from lunet_fast.recsys.ratings import IdMap

MODEL_FORMAT = "lunet-fast model"
CHECKPOINT_FORMAT = "lunet-fast checkpoint"
CANDIDATES_FORMAT = "lunet-fast candidates"
FORMAT_VERSION = 1

# A process that is killed while it writes leaves a file of this name behind.
_TEMPORARY = ".lunet-fast-"


class CheckpointError(ValueError):
    """A model or checkpoint file cannot be used; the message names the file and why."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, flush it to disk and move it to ``path`` in one step."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a run folder is as public as its umask says.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an indented JSON object atomically; NaN and infinities raise ``ValueError``, as JSON has none."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; :class:`CheckpointError` where the file holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, state: dict[str, Any]) -> None:
    """Write a safetensors file atomically, with ``state`` as JSON in its header."""
    from safetensors.torch import save_file

    header = json.dumps({"format": kind, "version": FORMAT_VERSION, **state}, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One key alone, since safetensors writes several in no fixed order: the same model is the same bytes.
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata={"lunet_fast": header}))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: tensors on the CPU and the header's JSON.

    A missing file raises ``FileNotFoundError``; a damaged, foreign or newer one :class:`CheckpointError`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        header = json.loads(metadata.get("lunet_fast", "null"))
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != kind:
        raise CheckpointError(f"{path}: this safetensors file is not a {kind} file")
    version = header.get("version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: version {version!r} of the format; this release reads up to {FORMAT_VERSION}: update "
            "lunet-fast"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: the tensor {name!r} holds NaN or infinite values")
    return tensors, header


# Run folders ------------------------------------------------------------------------------------------------


class RunFolderError(ValueError):
    """A run folder cannot be used as asked; the message names it and what to do."""


class RunFolder:
    """The files of one training.

    ``config.json``, ``metrics.json``, ``model.safetensors``, ``loss.png``; ``candidates.safetensors`` where
    ratings are held out for ranking; for resuming, ``checkpoints/``.
    ``metrics.json`` is written last, so a folder that has one is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics = path / "config.json", path / "metrics.json"
        self.model, self.loss = path / "model.safetensors", path / "loss.png"
        self.candidates = path / "candidates.safetensors"
        self.checkpoints = path / "checkpoints"

    def is_finished(self) -> bool:
        return self.metrics.is_file()

    def is_started(self) -> bool:
        """Whether there is work in the folder that a new training would replace."""
        return self.is_finished() or self.model.is_file() or any(self.checkpoints.glob("*.safetensors"))

    def prepare(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder and see that it can be written.

        :class:`RunFolderError` where it cannot, or where it holds another training. Nothing is deleted here.
        Of ``resume`` and ``overwrite`` at most one may be given.
        """
        if resume and overwrite:
            raise RunFolderError(
                "--resume goes on with a training and --overwrite replaces it: give one of the two"
            )
        if self.is_started() and not resume and not overwrite:
            state = "a finished training" if self.is_finished() else "an interrupted training"
            raise RunFolderError(
                f"{self.path} holds {state}: add --resume to go on with it, --overwrite to replace it, or "
                "choose another --out"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.checkpoints / "test.tmp", lambda temporary: _write_text(temporary, "x"))
            (self.checkpoints / "test.tmp").unlink()
        except OSError as error:
            raise RunFolderError(f"cannot write into {self.path} ({error}): choose another --out") from error

    def begin(self, config: dict[str, Any], *, resume: bool) -> None:
        """Record the settings of the training that now starts.

        Resuming, they must be those that the folder records already (what is under ``source`` may differ);
        otherwise the former training is deleted. So is what a killed process left half written.
        """
        for folder in (self.path, self.checkpoints):
            for half_written in folder.glob(f"{_TEMPORARY}*"):
                half_written.unlink(missing_ok=True)
        if resume and self.config.is_file():
            recorded = read_json(self.config)
            # By way of JSON, which has one kind of sequence.
            wanted = json.loads(json.dumps(config))
            for name in sorted(wanted.keys() | recorded.keys()):
                if name != "source" and wanted.get(name) != recorded.get(name):
                    raise RunFolderError(
                        f"{self.path} was trained with {name}={recorded.get(name)!r}, not "
                        f"{wanted.get(name)!r}: give the same settings to resume it, or choose another --out"
                    )
            return
        for old in (
            self.metrics,
            self.model,
            self.loss,
            self.candidates,
            *self.checkpoints.glob("*.safetensors"),
        ):
            old.unlink(missing_ok=True)
        write_json(self.config, config)


# Trained models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedModel:
    """A model and what leads from a user's own ids to its indices and back."""

    model: RatingModel
    users: IdMap
    items: IdMap
    scale: tuple[float, float]
    item_info: pd.DataFrame | None = None


def save_model(path: Path, trained: TrainedModel) -> None:
    """Write model, settings, ids, scale and titles into one safetensors file."""
    tensors = {f"model.{name}": tensor for name, tensor in trained.model.state_dict().items()}
    tensors |= _pack_ids("users", trained.users) | _pack_ids("items", trained.items)
    columns = []
    if trained.item_info is not None:
        columns = [name for name in ("title", "genres") if name in trained.item_info.columns]
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
    write_tensors(path, tensors, MODEL_FORMAT, state)


def load_model(path: Path) -> TrainedModel:
    """Read what :func:`save_model` wrote, onto the CPU; :class:`CheckpointError` where it is unusable."""
    tensors, header = read_tensors(path, MODEL_FORMAT)
    try:
        config = TrainConfig.from_dict(header["config"])
        users, items = _unpack_ids("users", tensors), _unpack_ids("items", tensors)
        state = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        model = RatingModel.from_state(config, state, len(users), len(items))
        low, high = (float(end) for end in header["scale"])
        info = {name: _unpack_texts(f"items.{name}", tensors) for name in header["item_info"]}
        item_info = pd.DataFrame(info) if info else None
        if item_info is not None and len(item_info) != len(items):
            raise ValueError(f"{len(item_info)} titles for {len(items)} items")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: {reason}") from error
    return TrainedModel(model, users, items, (low, high), item_info)


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


def _unpack_ids(name: str, tensors: dict[str, Tensor]) -> IdMap:
    if f"{name}.ids" in tensors:
        return IdMap(tensors[f"{name}.ids"].numpy())
    return IdMap(_unpack_texts(f"{name}.ids", tensors))


def _pack_texts(name: str, texts: list[str]) -> dict[str, Tensor]:
    """Texts as one UTF-8 tensor and the place where each starts: too many for the file's header."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {f"{name}.text": torch.from_numpy(data), f"{name}.offsets": torch.from_numpy(offsets)}


def _unpack_texts(name: str, tensors: dict[str, Tensor]) -> list[str]:
    data = tensors[f"{name}.text"].numpy().tobytes()
    offsets = tensors[f"{name}.offsets"].tolist()
    if offsets[0] != 0 or offsets[-1] != len(data) or sorted(offsets) != offsets:
        raise ValueError(f"{name}.offsets does not cut {name}.text into texts")
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(offsets)]


# Interrupted trainings --------------------------------------------------------------------------------------


def save_training(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    state: dict[str, Any],
) -> None:
    """Write parameters, the optimiser's tensors, the generator and ``state`` (JSON values) into one file."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, CHECKPOINT_FORMAT, {"state": state})


def load_training(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Any]:
    """Put back what :func:`save_training` wrote, in place, and return its ``state``.

    :class:`CheckpointError` where the file does not fit the module; nothing is half restored then, as long as
    the caller gives up.
    """
    tensors, header = read_tensors(path, CHECKPOINT_FORMAT)
    try:
        module.load_state_dict(_below("module.", tensors))
        for name, parameter in module.named_parameters():
            saved = _below(f"optimizer.{name}.", tensors)
            if saved:
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}
        generator.set_state(tensors["generator"])
        state = header["state"]
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: does not fit this training ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: the state is not a JSON object")
    return state


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
