"""Flows in the hands of Lightning and of accelerate; skipped where those are not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lunet_fast import LeakySoftplus, LUFlow, LUNet, MonotoneSpline, NormalMixture
from lunet_fast.layers.activations import BijectiveActivation

D = 5
EPOCHS = 4
DECAY = 0.5


def flow(activation: BijectiveActivation, seed: int = 0) -> LUFlow:
    torch.manual_seed(seed)
    net = LUNet(D, 3, activation, permutation="random", signs="random", structure_seed=2)
    return LUFlow(net, NormalMixture(D, 2))


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(60, D, generator=generator) @ torch.randn(D, D, generator=generator) + 1.0


def parameters_of(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def structure_of(flow: LUFlow) -> list[Tensor]:
    return [b.clone() for name, b in flow.named_buffers() if name.endswith(("sign", "permutation"))]


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


def learner_of(lightning: Any) -> Any:
    class Learner(lightning.LightningModule):
        """A flow that is trained by maximum likelihood, as the documentation of Lightning has it."""

        def __init__(self) -> None:
            super().__init__()
            self.flow = flow(LeakySoftplus(0.2, learnable=True))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return -self.flow(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.02)

    return Learner


def fitted(lightning: Any, folder: Path, *callbacks: Any, epochs: int = EPOCHS, **options: Any) -> Any:
    """(the module after its training, the trainer)."""
    learner = learner_of(lightning)()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        default_root_dir=folder,
        **quiet,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=20)
    trainer.fit(learner, data, **options)
    return learner, trainer


@pytest.mark.parametrize("kind", ["stochastic weight averaging", "exponential mean with buffers"])
def test_averages_of_lightning(lightning: Any, tmp_path: Path, kind: str) -> None:
    seen: list[list[Tensor]] = []

    class Record(lightning.Callback):
        def record(self, trainer: Any, module: Any) -> None:
            seen.append(parameters_of(module))

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if kind.startswith("stochastic"):
                self.record(trainer, module)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if kind.startswith("exponential"):
                self.record(trainer, module)

    if kind.startswith("stochastic"):
        averaging = lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    else:
        averaging = lightning.callbacks.EMAWeightAveraging(decay=DECAY, use_buffers=True)
    learner, _ = fitted(lightning, tmp_path, averaging, Record())
    if kind.startswith("stochastic"):
        expected = [torch.stack(each).mean(0) for each in zip(*seen[1:], strict=True)]
    else:
        expected = seen[0]
        for after in seen[1:]:
            expected = [DECAY * mean + (1 - DECAY) * new for mean, new in zip(expected, after, strict=True)]
    assert len(seen) == (EPOCHS if kind.startswith("stochastic") else 3 * EPOCHS)
    for found, mean in zip(learner.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), mean)
    start, trained = flow(LeakySoftplus(0.2, learnable=True)), learner.flow
    for found, own in zip(structure_of(trained), structure_of(start), strict=True):
        assert torch.equal(found, own)
    with torch.no_grad():
        assert trained(rows()).mean() > start(rows()).mean() + 0.5
        torch.testing.assert_close(trained.net.inverse(trained.net(rows())), rows(), rtol=1e-4, atol=1e-4)


def test_checkpoints_of_lightning(lightning: Any, tmp_path: Path) -> None:
    whole, _ = fitted(lightning, tmp_path)
    half, trainer = fitted(lightning, tmp_path, epochs=EPOCHS // 2)
    file = tmp_path / "half.ckpt"
    trainer.save_checkpoint(file)
    loaded = type(half).load_from_checkpoint(file)
    assert torch.equal(loaded.flow(rows()), half.flow(rows()))
    resumed, _ = fitted(lightning, tmp_path, ckpt_path=file)
    assert torch.equal(resumed.flow(rows()), whole.flow(rows()))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize(
    "activation", [lambda: LeakySoftplus(0.2, learnable=True), lambda: MonotoneSpline(D, 4)]
)
@pytest.mark.parametrize("stored", ["pytorch_model.bin", "model.safetensors"])
def test_dispatched_by_accelerate(
    tmp_path: Path, activation: Callable[[], BijectiveActivation], buffers: bool, stored: str
) -> None:
    accelerate = pytest.importorskip("accelerate")
    from safetensors.torch import save_file

    saved = flow(activation(), seed=1)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if stored.endswith("bin"):
        torch.save(saved.state_dict(), tmp_path / stored)
    else:
        save_file(saved.state_dict(), tmp_path / stored, metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=buffers):
        empty = flow(activation())
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / stored), device_map={"": "cpu"})
    assert torch.equal(loaded(rows()), saved(rows()))
    drawn = []
    for each in (saved, loaded):
        torch.manual_seed(3)
        drawn.append(each.sample(7))
    assert torch.equal(*drawn)


def test_layers_that_accelerate_keeps_on_disk(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    saved = flow(LeakySoftplus(0.2, learnable=True), seed=1)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with accelerate.init_empty_weights():
        empty = flow(LeakySoftplus(0.2, learnable=True))
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty,
        str(tmp_path / "pytorch_model.bin"),
        device_map={"net.layers.0": "cpu", "net.layers.1": "disk", "net.layers.2": "cpu", "base": "cpu"},
        offload_folder=str(tmp_path / "offloaded"),
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded.net(rows()), saved.net(rows()))
        # accelerate brings numbers back for a module's call alone.
        for call in (loaded.net.inverse, loaded.net.forward_and_logabsdet, loaded.log_prob):
            with pytest.raises(ValueError, match="on meta.*only calls of it as net.x. bring them back"):
                call(rows())
        with pytest.raises(ValueError, match="on meta.*only calls of it as net.x. bring them back"):
            loaded.sample(3)
