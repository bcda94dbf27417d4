"""The file of a trained density: safetensors with the settings in its header, no pickle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import EXACT_LEVELS, Rows
from lunet_fast.density.model import DensityModel, build_flow
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.training.files import CheckpointError, read_tensors, write_tensors
from lunet_fast.training.schema import FORMAT_VERSION, Header, check_same_tensors, shown

FLOW_FORMAT = "lunet-fast flow"

Classes = Annotated[int, Field(ge=0, le=10**9)]


class FlowHeader(Header):
    """A trained density: its settings, its data, and what that goes through."""

    format: Literal["lunet-fast flow"]
    version: Annotated[int, Field(ge=2, le=FORMAT_VERSION)]
    config: DensityConfig
    dataset: str
    source: str
    features: Annotated[int, Field(ge=1, le=10**9)]
    classes: Classes
    levels: Annotated[int, Field(ge=0, le=EXACT_LEVELS)]
    """0 stands for data that are not integers."""
    image: Annotated[list[Annotated[int, Field(ge=1, le=10**9)]], Field(max_length=2)]
    """Height and width; empty for no picture."""


@dataclass(frozen=True)
class TrainedFlow:
    """A density read from a file, and what it was trained on."""

    model: DensityModel
    config: DensityConfig
    dataset: str
    source: str
    image: tuple[int, int] | None


def save_flow(path: Path, model: DensityModel, config: DensityConfig, rows: Rows) -> None:
    """Write the flow, its preprocessing and settings into one file, atomically."""
    preprocessing = model.preprocessing
    tensors = {f"flow.{name}": tensor for name, tensor in model.flow.state_dict().items()}
    for name in ("shift", "scale"):
        value = getattr(preprocessing, name)
        if value is not None:
            tensors[f"preprocessing.{name}"] = value
    if model.shares is not None:
        tensors["shares"] = model.shares
    state: dict[str, Any] = {
        "config": config.to_dict(),
        "dataset": rows.name,
        "source": rows.source,
        "features": model.features,
        "classes": 0 if model.shares is None else len(model.shares),
        "levels": preprocessing.levels or 0,
        "image": list(rows.image or ()),
    }
    write_tensors(path, tensors, FLOW_FORMAT, state)


def load_flow(path: Path) -> TrainedFlow:
    """Read what :func:`save_flow` wrote, onto the CPU.

    Nothing in the file is executed. :class:`CheckpointError` where it is damaged, of another kind, or where
    its tensors are not those of its settings; ``FileNotFoundError`` where it is missing.
    """
    tensors, header = read_tensors(path, FLOW_FORMAT, FlowHeader)
    try:
        config = DensityConfig.from_dict(header["config"])
        features, classes = header["features"], header["classes"]
        preprocessing = _preprocessing(tensors, header["levels"] or None, features)
        shares = _shares(tensors, classes)
        if config.conditional != (classes > 0):
            raise ValueError(f"classes is {classes} with conditional={config.conditional}")
        size = header["image"]
        if size and (len(size) != 2 or math.prod(size) != features):
            raise ValueError(f"image={size} is no picture of {features} features")
        state = {name.removeprefix("flow."): t for name, t in tensors.items() if name.startswith("flow.")}
        if len(state) < len(tensors):
            other = min(name for name in tensors if not name.startswith("flow."))
            raise ValueError(f"the tensor {shown(other)} is not of a flow file")
        # Told before a net of that many layers is made.
        layers = [tensor.shape for name, tensor in state.items() if name.endswith(".lu")]
        if layers != [(features, features)] * config.layers:
            raise ValueError(f"the layers are not layers={config.layers} ones of {features} features")
        with torch.device("meta"):  # where no settings are too large
            check_same_tensors(build_flow(config, features, classes).state_dict(), state)
        with torch.random.fork_rng(devices=[]):
            flow = build_flow(config, features, classes)
        flow.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = DensityModel(flow.requires_grad_(False), preprocessing, features, shares)
    image = (size[0], size[1]) if size else None
    return TrainedFlow(model, config, header["dataset"], header["source"], image)


def _preprocessing(tensors: dict[str, Tensor], levels: int | None, features: int) -> Preprocessing:
    """That of the file, its tensors taken out; ``ValueError`` where they are none."""
    shift, scale = (tensors.pop(f"preprocessing.{name}", None) for name in ("shift", "scale"))
    if (shift is None) != (scale is None):
        raise ValueError("preprocessing.shift and preprocessing.scale belong together, and one is missing")
    for name, value in (("shift", shift), ("scale", scale)):
        if value is not None and (value.shape != (features,) or not value.is_floating_point()):
            raise ValueError(
                f"preprocessing.{name} must be floating-point numbers [{features}], got {value.dtype} "
                f"{list(value.shape)}"
            )
    if scale is not None and not bool((scale > 0).all()):
        raise ValueError("preprocessing.scale must be above 0")
    return Preprocessing(levels, shift, scale)


def _shares(tensors: dict[str, Tensor], classes: int) -> Tensor | None:
    """The classes' shares, taken out; ``ValueError`` where they are none of ``classes``."""
    shares = tensors.pop("shares", None)
    if (None if shares is None else shares.shape) != ((classes,) if classes else None):
        raise ValueError(f"shares must be there with a number for each of {classes} classes, or not for 0")
    if shares is None:
        return None
    if not shares.is_floating_point() or not bool((shares >= 0).all()) or abs(float(shares.sum()) - 1) > 1e-3:
        raise ValueError("shares must be floating-point numbers from 0 on with the sum 1")
    return shares
