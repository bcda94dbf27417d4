"""The training loss: squared error over the observed ratings (2.12) and its penalties."""

from __future__ import annotations

import torch
from torch import Tensor

from lunet_fast.recsys.config import TrainConfig
from lunet_fast.recsys.model import Output


def rating_loss(output: Output, rating: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Loss to differentiate, and the squared error of the members' mean prediction, both scalars.

    ``output`` holds K members' predictions ``[K, B]``; ``rating`` is ``[B]``. The loss is a mean over the
    batch and a sum over the members, each with its own squared error, so that a member has the gradient that
    it would have alone. As means over the batch, the L2 terms weigh a user or an item by how often it is
    rated. The one on z is what regularises: the network rescales whatever a penalty on x alone would shrink.
    """
    loss = (output.prediction - rating).square()
    if config.l2_latent:
        loss = loss + config.l2_latent * output.z.square().sum(-1)
    if config.l2_embedding:
        loss = loss + config.l2_embedding * output.x.square().sum(-1)
    if config.l2_bias and output.bias is not None:
        loss = loss + config.l2_bias * output.bias.square().sum(-1)
    with torch.no_grad():
        error = (output.prediction.mean(0) - rating).square().mean()
    return loss.mean(-1).sum(), error
