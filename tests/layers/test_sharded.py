"""Flows under FSDP2 in two processes, layer by layer as nets are usually sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lunet_fast import LeakySoftplus, LUFlow, LUNet, MonotoneSpline, NormalMixture


def flow_of(activation: torch.nn.Module) -> LUFlow:
    torch.manual_seed(0)
    return LUFlow(LUNet(6, 3, activation, permutation="random"), NormalMixture(6, 3))  # type: ignore[arg-type]


def in_two_processes(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for activation in (LeakySoftplus(0.3, learnable=True, features=6), MonotoneSpline(6, 4)):
        for parts in ("layers", "layers and net", "net", "root"):
            whole, flow = flow_of(activation), flow_of(activation)
            for layer in flow.net.layers if parts.startswith("layers") else ():
                fully_shard(layer)
            if parts.endswith("net"):
                fully_shard(flow.net)
            fully_shard(flow)
            with pytest.raises(TypeError, match="is a DTensor.*into a plain net"):
                flow.net.condition()
            found, wanted = flow(x), whole(x)
            torch.testing.assert_close(found, wanted)
            found.mean().backward()
            wanted.mean().backward()
            for (name, ours), theirs in zip(flow.named_parameters(), whole.parameters(), strict=True):
                assert ours.grad is not None, (parts, name)
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5)
            optimizer = torch.optim.AdamW(flow.parameters(), lr=0.01)
            optimizer.step()
            optimizer.zero_grad()
            assert bool(torch.isfinite(flow(x)).all())
            # What else is called of the flow itself has to be told, as FSDP2 has it.
            register_fsdp_forward_method(flow, "sample")
            with torch.no_grad():
                assert flow.sample(5).shape == (5, 6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_flows_sharded_by_layer(tmp_path: Path) -> None:
    mp.spawn(in_two_processes, (str(tmp_path / "meeting"),), 2)
