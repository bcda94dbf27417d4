"""The file of a trained density: safetensors with the settings in its header, no pickle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Rows
from lunet_fast.density.model import DensityModel, build_flow
from lunet_fast.density.preprocessing import Preprocessing
from lunet_fast.training.files import CheckpointError, read_tensors, write_tensors
from lunet_fast.training.schema import FORMAT_VERSION, Header

FLOW_FORMAT = "lunet-fast flow"

Total = Annotated[int, Field(ge=0)]


class FlowHeader(Header):
    """A trained density: its settings, its data, and what that goes through."""

    format: Literal["lunet-fast flow"]
    version: Annotated[int, Field(ge=2, le=FORMAT_VERSION)]
    config: DensityConfig
    dataset: str
    source: str
    features: Annotated[int, Field(ge=1)]
    classes: Total
    levels: Total
    """0 stands for data that are not integers."""
    image: Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=2)]
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
        found = tensors.get("flow.net.layers.0.lu", tensors.get("flow.net.net.layers.0.lu"))
        if found is None or found.shape != (features, features):
            # Told before a net of that size is made.
            raise ValueError(f"the first layer is not one of {features} features")
        if config.conditional != (classes > 0):
            raise ValueError(f"classes is {classes} with conditional={config.conditional}")
        with torch.random.fork_rng(devices=[]):
            flow = build_flow(config, features, classes)
        preprocessing = Preprocessing(
            header["levels"] or None,
            *(tensors.pop(f"preprocessing.{name}", None) for name in ("shift", "scale")),
        )
        for name, value in (("shift", preprocessing.shift), ("scale", preprocessing.scale)):
            if value is not None and (value.shape != (features,) or not value.is_floating_point()):
                raise ValueError(f"preprocessing.{name} must be [{features}], got {list(value.shape)}")
        shares = tensors.pop("shares", None)
        if (0 if shares is None else shares.numel()) != classes:
            raise ValueError(f"shares does not have a number for each of {classes} classes")
        flow.load_state_dict({name.removeprefix("flow."): tensor for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = DensityModel(flow.requires_grad_(False), preprocessing, features, shares)
    size = header["image"]
    image = (size[0], size[1]) if len(size) == 2 else None
    return TrainedFlow(model, config, header["dataset"], header["source"], image)
