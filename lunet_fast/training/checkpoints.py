"""What an interrupted training needs to go on: the file of its parameters, optimiser and generator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lunet_fast.training.files import CheckpointError, read_tensors, write_tensors
from lunet_fast.training.schema import (
    CHECKPOINT_FORMAT,
    CheckpointHeader,
    TrainingState,
    check_same_tensors,
    shown,
)
from lunet_fast.training.sharding import BLOCK, Dealt, DealtTables

_MOMENTS = ("exp_avg", "exp_avg_sq")

#: Whether the state and the tensors of the training's own are those of it: ``ValueError`` if not.
Check = Callable[[TrainingState, dict[str, Tensor]], None]


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
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator | None,
    state: dict[str, Any],
    own: dict[str, Tensor],
    dealt: DealtTables | None = None,
) -> None:
    """Write parameters, the optimiser's tensors, the generator, ``state`` (JSON values) and the training's
    ``own`` tensors into one file. What is sampled has neither optimiser nor generator.

    With ``dealt`` every process calls this, those without a file with None. The file is the same however the
    tables are dealt, so any number of processes reads it.
    """
    tensors = whole_tensors("module.", module, dealt)
    for name, parameter in module.named_parameters():
        for key, value in ({} if optimizer is None else optimizer.state.get(parameter, {})).items():
            # SparseAdam counts its steps by an int, Adam by a floating-point tensor.
            tensor = torch.as_tensor(value)
            tensors[f"optimizer.{name}.{key}"] = tensor if dealt is None else dealt.whole(name, tensor)
    if path is None:
        pass_by(tensors)
        return
    if generator is not None:
        tensors["generator"] = generator.get_state()
    tensors |= {f"own.{name}": tensor for name, tensor in own.items()}
    write_tensors(path, tensors, CHECKPOINT_FORMAT, {"state": state})


def load_training(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator | None,
    check: Check,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Put back what :func:`save_training` wrote, in place; return its ``state`` and ``own``.

    :class:`CheckpointError` where the file does not fit: every name, dtype and shape of the module and the
    optimiser, what the module counts, its structure and its data, the generator, and what ``check`` looks at
    are compared before anything is put back.
    """
    tensors, header = read_tensors(path, CHECKPOINT_FORMAT, CheckpointHeader)
    return _put_back(path, tensors, header, module, optimizer, generator, check)


def load_dealt_training(
    path: Path | None,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    dealt: DealtTables,
    check: Check,
) -> tuple[TrainingState, dict[str, Tensor]]:
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
                if place.endswith(_MOMENTS[1]) and any(bool((b < 0).any()) for b in whole.split(BLOCK)):
                    raise CheckpointError(f"{path}: does not fit this training ({place} is below 0)")
                wholes[place] = whole
        # Of a tensor that is mapped the whole file would be sent.
        message = {name: tensor.clone() for name, tensor in tensors.items()}, header
    small, header = dealt.workers.object_of_first(message)
    small |= {f"module.{name}": parameters[name].detach() for name in dealt.rows}
    found = _put_back(path, small, header, module, optimizer, generator, check, dealt.rows)
    for name in dealt.rows:
        parameter, rows = parameters[name], dealt.rows[name]
        moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
        optimizer.state[parameter] |= moments
        Dealt(dealt.workers, parameter.detach(), rows).fill(wholes.get(f"module.{name}"))
        for moment, own in moments.items():
            Dealt(dealt.workers, own, rows).fill(wholes.get(f"optimizer.{name}.{moment}"))
    return found


def _put_back(
    path: Path | None,
    tensors: dict[str, Tensor],
    header: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator | None,
    check: Check,
    dealt: Collection[str] = (),
) -> tuple[TrainingState, dict[str, Tensor]]:
    try:
        state = TrainingState.from_dict(header["state"])
        saved, own = _below("module.", tensors), _below("own.", tensors)
        known = {"module": True, "optimizer": optimizer is not None, "own": True}
        for name in tensors:
            if not (generator is not None if name == "generator" else known.get(name.partition(".")[0])):
                raise ValueError(f"{name!r} is too many")
        check_same_tensors(module.state_dict(), saved)
        _check_what_stays(module, saved)
        moments = _checked_moments(_below("optimizer.", tensors), module, optimizer, dealt)
        if generator is not None:
            check_generator(tensors["generator"], generator)
        check(state, own)
        module.load_state_dict(saved)
        parameters = dict(module.named_parameters())
        if optimizer is not None:
            for name, values in moments.items():
                optimizer.state[parameters[name]] = values
        if generator is not None:
            generator.set_state(tensors["generator"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this training ({error})") from error
    return state, own


def check_progress(state: TrainingState, phase: str, epochs: int, steps: int, tested: bool) -> None:
    """``ValueError`` unless ``state`` is one of ``phase``, of ``epochs`` epochs of ``steps`` steps, of whose
    ends it has the errors: of the training part, and of a test part where it is ``tested``."""
    epoch = state.epoch
    for what, found, least, most in (
        ("epochs", epoch, 0, epochs),
        ("steps", state.step, 0, steps if epoch < epochs else 0),
        ("train_loss", len(state.train_loss), epoch, epoch),
        ("elapsed", len(state.elapsed), epoch, epoch),
        ("test_loss", len(state.test_loss), epoch * tested, epoch * tested),
    ):
        if not least <= found <= most:
            expected = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(f"the state has {found} {what}, and this training {expected}")
    if state.phase != phase:
        raise ValueError(f"the phase is {shown(state.phase)}, not {phase!r}")


def check_generator(state: Tensor, generator: torch.Generator) -> None:
    """Refuse, by an error of PyTorch's, what is no state of such a generator; which stays as it is."""
    torch.Generator(generator.device).set_state(state)


def _check_what_stays(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """``ValueError`` unless the buffers that no training changes are the module's own.

    Integers are indices into the data, or of the structure, unless the module says in ``counters`` that it
    counts by them; and so are signs.
    """
    counters = getattr(module, "counters", ())
    for name, buffer in module.named_buffers():
        given = saved.get(name)
        if given is None:
            continue
        if name in counters:
            if not 0 <= int(given) < 2**53:
                raise ValueError(f"{name!r} must be a number of at least 0, got {int(given)}")
            continue
        stays = not buffer.is_floating_point() or name.rpartition(".")[2] == "sign"
        if stays and not torch.equal(given.to(buffer.device), buffer):
            raise ValueError(f"{name!r} is that of other data or of another structure")


def _checked_moments(
    saved: dict[str, Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    dealt: Collection[str],
) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter and name, as it takes it; ``ValueError`` where it is none.

    A kernel that is given moments of another shape does not ask. Those of ``dealt`` parameters are apart.
    """
    parameters = dict(module.named_parameters())
    sparse = getattr(optimizer, "sparse", None)
    counted = {id(p) for group in ([] if sparse is None else sparse.param_groups) for p in group["params"]}
    found: dict[str, dict[str, Any]] = {}
    for place, value in saved.items():
        name, _, key = place.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or key not in ("step", *_MOMENTS) or (name in dealt and key != "step"):
            raise ValueError(f"the optimiser's {place!r} is too many")
        if key == "step":
            # SparseAdam counts by an int.
            integers = id(parameter) in counted
            dtypes = (torch.int64,) if integers else (torch.float32, torch.float64)
            if value.ndim or value.dtype not in dtypes or not 1 <= float(value) < 2**53:
                raise ValueError(f"the optimiser's {place!r} must be a number of steps")
            found.setdefault(name, {})[key] = int(value) if integers else value.to(parameter.device)
            continue
        if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"the optimiser's {place!r} must be {parameter.dtype} {list(parameter.shape)}, got "
                f"{value.dtype} {list(value.shape)}"
            )
        if key == _MOMENTS[1] and bool((value < 0).any()):
            raise ValueError(f"the optimiser's {place!r} is below 0")
        found.setdefault(name, {})[key] = value.to(parameter.device)
    for name, values in found.items():
        for key in ("step",) if name in dealt else ("step", *_MOMENTS):
            if key not in values:
                raise ValueError(f"the optimiser's {name + '.' + key!r} is missing")
    return found


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
