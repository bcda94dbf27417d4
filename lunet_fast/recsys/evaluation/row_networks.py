"""Networks that read a user's whole row: RBM, CDAE and DMF, which the source paper cites.

No package has them that works with today's NumPy (RecBole 1.2 has the latter two and does not start with
NumPy 2), so they are written here after their papers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation.fitted import (
    Fitted,
    count_parameters,
    interactions_of,
    labelled_batches,
    rated_rows,
    rows_at_once,
    shape_of,
)
from lunet_fast.recsys.evaluation.peer_settings import Settings
from lunet_fast.recsys.model.interactions import runs
from lunet_fast.recsys.model.sequences import between_levels
from lunet_fast.training.loop import descend

#: Levels of a rating; where there are more values, so many ranges with about as many ratings each.
MOST_LEVELS = 10


def _levels(rating: Tensor) -> tuple[Tensor, Tensor]:
    """The levels' values, increasing, and the level of each rating."""
    level = torch.bucketize(rating, between_levels(rating, MOST_LEVELS), right=True)
    counts = torch.bincount(level)
    return torch.bincount(level, rating.double()).div(counts.clamp_min(1)).float(), level


class _Machine:
    """A restricted Boltzmann machine whose visible units are a user's ratings, each one of ``levels``.

    Weights ``[n_items, levels, hidden]``, biases of the levels ``[n_items, levels]`` and of the hidden units.
    """

    def __init__(self, training: Ratings, hidden: int) -> None:
        self.values, level = _levels(training.rating)
        shape = (training.n_items, len(self.values))
        self.weight = 0.01 * torch.randn(*shape, hidden)
        # As often as seen, and a rating of each level as frequent as in all the data.
        counts = torch.zeros(shape).index_put_(
            (training.item, level), torch.ones(len(training)), accumulate=True
        )
        self.visible = (counts + counts.sum(0) / counts.sum()).log()
        self.hidden = torch.zeros(hidden)
        # Ratings in the order of users, and where each user's begin.
        order = training.user.argsort(stable=True)
        self.item, self.level = training.item[order], level[order]
        self.counts = torch.bincount(training.user, minlength=training.n_users)
        self.start = self.counts.cumsum(0) - self.counts

    def rows(self, users: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The (place in ``users``, item, level) of each of their ratings."""
        row, inside = runs(self.counts[users])
        place = self.start[users][row] + inside
        return row, self.item[place], self.level[place]

    def probability(self, row: Tensor, visible: Tensor, users: int) -> Tensor:
        """Of the hidden units ``[users, hidden]`` to be on, by the weights ``visible`` of each rating."""
        return torch.sigmoid(self.hidden + torch.zeros(users, len(self.hidden)).index_add_(0, row, visible))

    def levels(self, items: Tensor, hidden: Tensor) -> Tensor:
        """Logits ``[N, levels]`` of the ratings of items by users whose hidden units are ``[N, hidden]``."""
        return torch.einsum("nkh,nh->nk", self.weight[items], hidden) + self.visible[items]


@torch.no_grad()
def rbm(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Restricted Boltzmann machine (Salakhutdinov, Mnih and Hinton 2007), by contrastive divergence of one
    step with momentum; predicts the mean of a rating's levels. O(ratings · levels · hidden) an epoch."""
    torch.manual_seed(seed)
    machine = _Machine(training, settings["hidden"])
    tensors = (machine.weight, machine.visible, machine.hidden)
    speeds = [torch.zeros_like(tensor) for tensor in tensors]
    everyone = torch.arange(training.n_users)[machine.counts > 0]
    for _ in range(settings["epochs"]):
        for users in everyone[torch.randperm(len(everyone))].split(settings["batch"]):
            row, item, level = machine.rows(users)
            seen = machine.probability(row, machine.weight[item, level], len(users))
            on = torch.bernoulli(seen)
            drawn = torch.softmax(machine.levels(item, on[row]), 1).multinomial(1).squeeze(1)
            again = machine.probability(row, machine.weight[item, drawn], len(users))
            steps = [torch.zeros_like(tensor) for tensor in tensors]
            for levels, hidden, sign in ((level, seen, 1.0), (drawn, again, -1.0)):
                steps[0].index_put_((item, levels), sign * hidden[row], accumulate=True)
                steps[1].index_put_((item, levels), torch.full((len(item),), sign), accumulate=True)
                steps[2] += sign * hidden.sum(0)
            steps[0] -= settings["l2"] * len(users) * machine.weight
            for tensor, speed, step in zip(tensors, speeds, steps, strict=True):
                speed.mul_(0.9).add_(step, alpha=settings["rate"] / len(users))
                tensor += speed

    # Of an item that nobody rated the machine would say the same to all: it is the user's mean instead.
    unrated = torch.bincount(training.item, minlength=training.n_items) == 0
    sums = torch.bincount(training.user, training.rating.double(), training.n_users)
    means = sums.div(machine.counts).nan_to_num(float(training.rating.mean())).float()

    def predict(users: Tensor, items: Tensor) -> Tensor:
        some, place = users.unique(return_inverse=True)
        row, item, level = machine.rows(some)
        hidden = machine.probability(row, machine.weight[item, level], len(some))
        width = machine.weight[0].numel()
        parts = [
            torch.softmax(machine.levels(items[part], hidden[place[part]]), 1) @ machine.values
            for part in torch.arange(len(items)).split(rows_at_once(width))
        ]
        found = torch.cat(parts) if parts else torch.empty(0)
        return torch.where(unrated[items], means[users], found)

    return Fitted(sum(tensor.numel() for tensor in tensors), predict=predict)


class _Autoencoder(nn.Module):
    def __init__(self, training: Ratings, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(training.n_items, size)
        self.user = nn.Embedding(training.n_users, size)
        nn.init.normal_(self.user.weight, std=0.01)
        self.decoder = nn.Linear(size, training.n_items)

    def forward(self, rows: Tensor, users: Tensor) -> Tensor:
        """Logits ``[B, n_items]`` of rows ``[B, n_items]``."""
        found: Tensor = self.decoder(torch.sigmoid(self.encoder(rows) + self.user(users)))
        return found


def cdae(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Collaborative denoising autoencoder (Wu, DuBois, Zheng and Ester 2016): a user's row with some of it
    left out, and a vector of the user's own, give all of it back; cross-entropy over all items.

    O(n_users · n_items · size) an epoch.
    """
    torch.manual_seed(seed)
    seen, net = interactions_of(training), _Autoencoder(training, settings["size"])
    optimizer = torch.optim.AdamW(
        net.parameters(), settings["rate"], weight_decay=settings["decay"], fused=True
    )
    for _ in range(settings["epochs"]):
        for users in torch.randperm(training.n_users).split(settings["batch"]):
            rows = rated_rows(seen, users)
            logits = net(F.dropout(rows, settings["corruption"]), users)
            loss = F.binary_cross_entropy_with_logits(logits, rows, reduction="sum") / len(users)
            descend(optimizer, loss)

    @torch.no_grad()
    def score_items(users: Tensor) -> Tensor:
        scores: Tensor = net(rated_rows(seen, users), users)
        return scores

    return Fitted(count_parameters(net), score_items=score_items)


class _Tower(nn.Module):
    """Vectors of all rows of a sparse matrix, whose first layer is a product with it."""

    def __init__(self, matrix: Tensor, size: int, layers: int) -> None:
        super().__init__()
        self.matrix = matrix
        self.first = nn.Parameter(0.01 * torch.randn(matrix.shape[1], size))
        self.rest = nn.Sequential(*(m for _ in range(layers - 1) for m in (nn.ReLU(), nn.Linear(size, size))))

    def forward(self) -> Tensor:
        found: Tensor = self.rest(torch.sparse.mm(self.matrix, self.first))
        return F.normalize(found, dim=1)


def dmf(training: Ratings, seed: int, settings: Settings) -> Fitted:
    """Deep matrix factorisation (Xue et al. 2017): the cosine of what networks make of a user's row and of an
    item's column of the matrix of interactions, by cross-entropy with drawn pairs.

    Its negative cosines are cut at a small number in the paper, whose gradient is nothing; here the cosine
    over a temperature is the logit. O(ratings · size) a step.
    """
    torch.manual_seed(seed)
    places = torch.stack((training.user, training.item))
    by_user = torch.sparse_coo_tensor(places, torch.ones(len(training)), shape_of(training))
    towers = nn.ModuleList(
        _Tower(matrix.coalesce(), settings["size"], settings["layers"]) for matrix in (by_user, by_user.t())
    )
    bias = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*towers.parameters(), bias], settings["rate"], fused=True)
    epoch = labelled_batches(training, settings["batch"], seed)
    for _ in range(settings["epochs"]):
        for users, items, labels in epoch():
            cosines = (towers[0]()[users] * towers[1]()[items]).sum(1)
            loss = F.binary_cross_entropy_with_logits(cosines / settings["temperature"] + bias, labels)
            descend(optimizer, loss)
    with torch.no_grad():
        vectors = [tower() for tower in towers]

    def score_items(users: Tensor) -> Tensor:
        return vectors[0][users] @ vectors[1].T

    return Fitted(count_parameters(towers) + 1, score_items=score_items)
