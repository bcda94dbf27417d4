"""What the simplest methods reach on the same parts: biases for ratings, popularity for ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from lunet_fast.recsys.measures import metrics
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.offsets import shrunk_biases

RANKED = ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10")


def plain_figures(parts: Parts, config: TrainConfig) -> dict[str, float]:
    """``biases_test_mse`` and ``biases_test_rmse`` of biases with the settings' L2, clipped to the scale, and
    ``popularity_...`` of the RANKED metrics of the number of training ratings, as far as ``parts`` allow."""
    training, test = parts.training, parts.test
    values: dict[str, float] = {}
    if test is not None and config.gamma > 0:
        mean = training.rating.double().mean()
        l2 = (config.offset_l2_user, config.offset_l2_item)
        sizes = (training.n_users, training.n_items)
        of_user, of_item = shrunk_biases(training.user, training.item, training.rating - mean, sizes, l2)
        predicted = (mean + of_user[test.user] + of_item[test.item]).clamp(*training.scale).float()
        values["biases_test_mse"] = metrics.mse(predicted, test.rating)
        values["biases_test_rmse"] = metrics.rmse(predicted, test.rating)
    chosen = (
        training if config.positive_from is None else training.select(training.rating >= config.positive_from)
    )
    counts = torch.bincount(chosen.item, minlength=training.n_items).float()

    def popularity(users: Tensor) -> Tensor:
        return counts.expand(len(users), -1).clone()

    found = evaluate_ranking(popularity, parts, config.seed, config.positive_from).metrics
    return values | {f"popularity_{name}": found[name] for name in RANKED if name in found}
