"""Several processes that train one model, started by ``torchrun``: who they are and what they share."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: the first one evaluates while they do."""


@dataclass(frozen=True)
class Workers:
    """The processes of a training; this one is number ``rank`` of ``world_size``. The default is one alone.

    All of them take the same steps: a batch is the same for all, each computes the gradient of its
    :meth:`share` of it, and PyTorch's ``DistributedDataParallel`` adds the gradients up. Random numbers are
    drawn for the whole batch by every process from the same generator, so that neither what is computed nor
    a checkpoint depends on how many there are. Process 0 alone reads checkpoints, writes files and evaluates.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The rows of a batch of ``rows`` that are this process's: contiguous, equal up to one."""
        each, rest = divmod(rows, self.world_size)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))

    def parallel(self, module: nn.Module, apart: Sequence[nn.Parameter] = ()) -> nn.Module:
        """``module``, its parameters made those of process 0 and its gradients the mean over all.

        Not those of ``apart``, which are each process's own.
        """
        if self.world_size == 1:
            return module
        ignored = [name for name, value in module.named_parameters() if any(value is one for one in apart)]
        parallel = nn.parallel.DistributedDataParallel
        parallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Newer releases call the option forward_sync_buffers; 2.6 does not know that name.
            warnings.simplefilter("ignore", FutureWarning)
            return parallel(module, device_ids=devices, broadcast_buffers=False)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's ``values``."""
        if self.world_size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def of_first(self, value: int) -> int:
        """Process 0's ``value``."""
        if self.world_size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, 0)
        return int(shared)

    def object_of_first(self, value: Any) -> Any:
        """Process 0's ``value``, small and picklable."""
        if self.world_size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    @contextmanager
    def file_of_first(self, path: Path | None) -> Iterator[Path | None]:
        """Process 0's file ``path`` as one that this process can read; None where process 0 has none.

        The others need not share a disk with process 0: its bytes are sent to them.
        """
        if self.world_size == 1:
            yield path if path is not None and path.is_file() else None
            return
        size = self.of_first(path.stat().st_size if path is not None and path.is_file() else -1)
        if size < 0:
            yield None
            return
        content = torch.empty(size, dtype=torch.uint8)
        if self.is_first and path is not None:
            content = torch.from_file(str(path), size=size, dtype=torch.uint8)
        content = content.to(self.device)
        dist.broadcast(content, 0)
        if self.is_first:
            yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "checkpoint.safetensors"
            copy.write_bytes(content.cpu().numpy().tobytes())
            yield copy


def existing_device(name: torch.device | str) -> torch.device:
    """``name`` as a device; ``ValueError`` where it is none, or a GPU that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={str(name)!r} is no device: use 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(name)!r}: PyTorch sees no CUDA device here; use device='cpu'")
    return device


def _fresh(store: Store, rank: int, world_size: int) -> Store:
    """A part of ``store`` that only the processes which are there now write into.

    After a restart torchrun gives its workers the store of their dead predecessors, whose addresses they
    would take for each other's. So process 0 draws a name and hands it to whoever greets it with a new one.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = store.get(f"welcome/{mine}").decode()
        store.set(f"ready/{name}/{rank}", "")
        return PrefixStore(name, store)
    others = range(1, world_size)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not all(store.check([f"ready/{mine}/{other}"]) for other in others):
        for other in others:
            if store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise RuntimeError(f"fewer than {world_size} processes are there after {TIMEOUT}")
        time.sleep(0.02)
    return PrefixStore(mine, store)


@contextmanager
def workers_of_torchrun(device: torch.device | str) -> Iterator[Workers]:
    """Join the processes that ``torchrun`` has started, gloo between CPUs and NCCL between GPUs.

    Without ``torchrun``: this process alone. With ``device`` ``cuda`` each takes the GPU of its local rank.
    """
    place = existing_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Workers(device=place)
        return
    store, rank, world_size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    settings: dict[str, Any] = {"backend": "gloo", "timeout": TIMEOUT, "rank": rank, "world_size": world_size}
    settings["store"] = _fresh(store, rank, world_size)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
        settings |= {"backend": "nccl", "device_id": place}
    dist.init_process_group(**settings)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), place)
    finally:
        # After an error the others may be gone, and leaving the group in good order would wait for them.
        dist.destroy_process_group()
