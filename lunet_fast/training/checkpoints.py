"""What an interrupted training needs to go on: the file of its parameters, optimiser and generator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.training.files import CheckpointError, read_tensors, write_tensors
from lunet_fast.training.schema import CHECKPOINT_FORMAT, CheckpointHeader
from lunet_fast.training.sharding import Dealt, DealtTables


def whole_tensors(prefix: str, module: nn.Module, dealt: DealtTables | None) -> dict[str, Tensor | Dealt]:
    """The tensors of a module's state by name, those that are dealt to several processes as wholes."""
    state = module.state_dict()
    whole = (lambda name, tensor: tensor) if dealt is None else dealt.whole
    return {prefix + name: whole(name, tensor) for name, tensor in state.items()}


def pass_by(tensors: Mapping[str, Tensor | Dealt]) -> None:
    """Take part in what process 0 writes, in its order."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, Dealt):
            for _ in tensor.blocks():
                pass


def save_training(
    path: Path | None,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    state: dict[str, Any],
    own: dict[str, Tensor],
    dealt: DealtTables | None = None,
) -> None:
    """Write parameters, the optimiser's tensors, the generator, ``state`` (JSON values) and the training's
    ``own`` tensors into one file.

    With ``dealt`` every process calls this, those without a file with None. The file is the same however the
    tables are dealt, so any number of processes reads it.
    """
    tensors = whole_tensors("module.", module, dealt)
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            # SparseAdam counts its steps by an int, Adam by a floating-point tensor.
            tensor = torch.as_tensor(value)
            tensors[f"optimizer.{name}.{key}"] = tensor if dealt is None else dealt.whole(name, tensor)
    if path is None:
        pass_by(tensors)
        return
    tensors["generator"] = generator.get_state()
    tensors |= {f"own.{name}": tensor for name, tensor in own.items()}
    write_tensors(path, tensors, CHECKPOINT_FORMAT, {"state": state})


def load_training(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put back what :func:`save_training` wrote, in place; return its ``state`` and ``own``.

    :class:`CheckpointError` where the file does not fit the module; nothing is half restored then, as long as
    the caller gives up.
    """
    return _put_back(
        path, *read_tensors(path, CHECKPOINT_FORMAT, CheckpointHeader), module, optimizer, generator
    )


def load_dealt_training(
    path: Path | None,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    dealt: DealtTables,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As :func:`load_training`, called by every process; those without the file give None.

    The file is mapped into memory, and each process gets its rows a block at a time.
    """
    parameters = dict(module.named_parameters())
    wholes: dict[str, Tensor] = {}
    message = None
    if path is not None:
        tensors, header = read_tensors(path, CHECKPOINT_FORMAT, CheckpointHeader, mapped=True)
        for name, rows in dealt.rows.items():
            wanted = torch.Size((rows, *parameters[name].shape[1:]))
            for place in (f"module.{name}", *(f"optimizer.{name}.{moment}" for moment in _MOMENTS)):
                whole = tensors.pop(place, None)
                if whole is None or (whole.shape, whole.dtype) != (wanted, parameters[name].dtype):
                    raise CheckpointError(
                        f"{path}: does not fit this training ({place} must be {parameters[name].dtype} "
                        f"{list(wanted)})"
                    )
                wholes[place] = whole
        # Of a tensor that is mapped the whole file would be sent.
        message = {name: tensor.clone() for name, tensor in tensors.items()}, header
    small, header = dealt.workers.object_of_first(message)
    small |= {f"module.{name}": parameters[name].detach() for name in dealt.rows}
    found = _put_back(path, small, header, module, optimizer, generator)
    for name in dealt.rows:
        parameter, rows = parameters[name], dealt.rows[name]
        moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
        optimizer.state[parameter] |= moments
        Dealt(dealt.workers, parameter.detach(), rows).fill(wholes.get(f"module.{name}"))
        for moment, own in moments.items():
            Dealt(dealt.workers, own, rows).fill(wholes.get(f"optimizer.{name}.{moment}"))
    return found


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _put_back(
    path: Path | None,
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        module.load_state_dict(_below("module.", tensors))
        for name, parameter in module.named_parameters():
            saved = _below(f"optimizer.{name}.", tensors)
            if saved:
                optimizer.state[parameter] = {
                    key: int(value) if value.dtype == torch.int64 else value.to(parameter.device)
                    for key, value in saved.items()
                }
        generator.set_state(tensors["generator"])
        state = header["state"]
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: does not fit this training ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: the state is not a JSON object")
    return state, _below("own.", tensors)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
