"""Suite ``training``: a step of the recommender.

A step is what the trainer does with a batch: gather, loss, backward, Adam, by the trainer's own functions.
Data is drawn, as many ratings as 80 % of MovieLens 100K, so that no file is needed. ``nn.Linear MLP`` is the
same model with square linear layers and softplus in LU-Net's place; K members' weights are stacked, as ours
are. Each way has weights of its own, and its error is that of loss and gradient against the same model in
float64, written plainly. Steps run on as many CPU threads as the recipe trains on, which is one.
Whole trainings, which reach a test error or do not, are in ``quality``.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lunet_fast import LUDense, LUNet
from lunet_fast.bench.contenders import Unavailable
from lunet_fast.bench.contest import Contest, Row, Run, Spec
from lunet_fast.bench.machine import relative_error
from lunet_fast.ops import reference
from lunet_fast.ops.values import Activation
from lunet_fast.recsys.data.ratings import IdMap, Ratings
from lunet_fast.recsys.model.config import RECIPES, TrainConfig, recipe
from lunet_fast.recsys.model.mlp import MLPModel
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.training import (
    control_objective,
    control_optimizer,
    rating_objective,
    rating_optimizer,
)
from lunet_fast.training.loop import cpu_threads, descend

SUITE = "training"

#: What a contest of this suite is about, its batches, and who is "ours" in it.
STEP = "training step"
ROWS = (128, 4096)
OURS = "LU-Net"

#: Users, items and ratings of the drawn data: the training part of MovieLens 100K.
SHAPE = (943, 1682)
RATINGS = 80_000

#: Relative error against float64 that is let through, of the loss and of its gradient.
TOLERANCE = 1e-5


# --- a step ---------------------------------------------------------------------------------------------


def specs(scale: str) -> list[Spec]:
    """Recipe ``paper`` at both batches, with recipe ``best`` too for "all"."""
    names = RECIPES if scale == "all" else RECIPES[:1]
    return [
        Spec(SUITE, STEP, 2 * recipe(name, RATINGS).embedding_size, rows, f"recipe {name}")
        for name in names
        for rows in ROWS
    ]


def draw(users: int, items: int, count: int, seed: int = 0) -> Ratings:
    """``count`` ratings of 1 to 5 of distinct pairs, all by chance."""
    if not 0 < count <= users * items:
        raise ValueError(f"count must be from 1 to {users * items}, the number of pairs, got {count}")
    rng = np.random.default_rng(seed)
    pairs = torch.from_numpy(rng.permutation(users * items)[:count])
    return Ratings(
        name="drawn",
        user=pairs // items,
        item=pairs % items,
        rating=torch.from_numpy(rng.integers(1, 6, count).astype(np.float32)),
        timestamp=None,
        users=IdMap(range(users)),
        items=IdMap(range(items)),
        scale=(1.0, 5.0),
    )


class Batch(NamedTuple):
    """Training ratings, each ``[B]``."""

    user: Tensor
    item: Tensor
    rating: Tensor


@dataclass(frozen=True)
class Problem:
    """Ratings to train on, all of them on the device, and the settings of the model."""

    config: TrainConfig
    ratings: Ratings
    all: Batch
    device: torch.device

    @classmethod
    def of(cls, config: TrainConfig, ratings: Ratings, device: torch.device) -> Problem:
        parts = Batch(ratings.user.to(device), ratings.item.to(device), ratings.rating.to(device))
        return cls(config, ratings, parts, device)

    def gather(self, rows: Tensor) -> Batch:
        """The ratings of these rows [B] of the training part."""
        return Batch(self.all.user[rows], self.all.item[rows], self.all.rating[rows])


class StackedLinear(nn.Module):
    """K linear layers [D, D] in one: x [K, B, D] by weights [K, D, D], as batched products."""

    def __init__(self, members: int, features: int) -> None:
        super().__init__()
        each = [nn.Linear(features, features) for _ in range(members)]
        self.weight = nn.Parameter(torch.stack([linear.weight.detach() for linear in each]))
        self.bias = nn.Parameter(torch.stack([linear.bias.detach() for linear in each]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class LinearRatingModel(RatingModel):
    """The recommender with M linear layers [D, D] and softplus between them in LU-Net's place."""

    def __init__(self, config: TrainConfig, *data: Any) -> None:
        super().__init__(config, *data)
        K, D = config.members, 2 * config.embedding_size
        layers: list[nn.Module] = []
        for _ in range(config.layers):
            layers += [nn.Linear(D, D) if K == 1 else StackedLinear(K, D), nn.Softplus()]
        self.nets = nn.ModuleList([nn.Sequential(*layers[:-1])])

    def network(self, x: Tensor) -> Tensor:
        z: Tensor = self.nets[0](x)
        return z


Objective = Callable[[Batch, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Way:
    """One way to train: a model, its optimiser, and the loss of a batch with the error to report."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    plain: Callable[[Any, Batch, torch.Generator], Tensor]
    """The loss by the formulas as they stand: of the model in float64, a batch and dropout's generator."""


def _made(problem: Problem, kind: type[RatingModel]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.config.seed)
        data = problem.ratings
        shape = (data.n_users, data.n_items)
        return kind(problem.config, data.user, data.item, data.rating, *shape).to(problem.device)


def _lu_net(problem: Problem) -> Way:
    model = _made(problem, RatingModel)
    return Way(
        model, rating_optimizer(model), lambda batch, g: rating_objective(model, *batch, g), _plain_loss
    )


def _linear_mlp(problem: Problem) -> Way:
    model = _made(problem, LinearRatingModel)
    return Way(
        model, rating_optimizer(model), lambda batch, g: rating_objective(model, *batch, g), _plain_loss
    )


def _compiled(problem: Problem) -> Way:
    """Ours with loss and gradient left to ``torch.compile``, which compiles at the first step."""
    model = _made(problem, RatingModel)
    torch._dynamo.reset()  # else it would try to make one program of all sizes
    compiled = torch.compile(rating_objective, dynamic=False)

    def objective(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = compiled(model, *batch, generator)
        return found

    return Way(model, rating_optimizer(model), objective, _plain_loss)


def _control(problem: Problem) -> Way:
    """Table 2's control, which has the paper's budget and a smaller network, and no dropout."""
    config, data = problem.config, problem.ratings
    if config.recipe != "paper":
        raise Unavailable("it has the budget of recipe paper, whatever the recipe, and is timed there")
    mean = float(data.rating.double().mean())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = (config.mlp_embedding_size, config.mlp_hidden)
        model = MLPModel(data.n_users, data.n_items, *sizes, mean, config.embedding_std).to(problem.device)
    optimizer = control_optimizer(model, config)
    return Way(model, optimizer, lambda batch, g: control_objective(model, *batch), _plain_control_loss)


CONTENDERS: dict[str, Callable[[Problem], Way]] = {
    OURS: _lu_net,
    "nn.Linear MLP": _linear_mlp,
    "MLP control of table 2": _control,
}

#: For scale "all" alone: it compiles anew for every size.
COMPILED = "LU-Net, torch.compile"


def build(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    config: TrainConfig | None = None,
    ratings: Ratings | None = None,
    contenders: Mapping[str, Callable[[Problem], Way]] = CONTENDERS,
) -> Contest:
    """The contest of one spec; every contender has done one step and its error is known.

    Args:
        config: by default that of the recipe which ``spec.detail`` names.
        ratings: by default as many as MovieLens 100K trains on.

    Raises:
        ValueError: dtype is not float32, or there are fewer ratings than ``spec.rows``.
    """
    if dtype != torch.float32:
        raise ValueError(f"dtype must be torch.float32, in which the recommender is trained, got {dtype}")
    ratings = draw(*SHAPE, RATINGS) if ratings is None else ratings
    if len(ratings) < spec.rows:
        raise ValueError(f"ratings must be at least one batch, {spec.rows}, got {len(ratings)}")
    config = recipe(spec.detail.removeprefix("recipe "), len(ratings)) if config is None else config
    problem = Problem.of(config, ratings, device)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    parameters, missing = {}, {}
    for name, make in contenders.items():
        try:
            way = make(problem)
            errors[name], seconds = _error(way, problem, spec.rows, compiles=name == COMPILED)
        except Unavailable as reason:
            missing[name] = str(reason)
            continue
        runs[name] = _step(way, problem, spec.rows)
        parameters[name] = sum(p.numel() for p in way.model.parameters())
        if name == COMPILED:
            # Whoever trains pays for it once, so it is told beside the times of the steps.
            missing[f"{name}, first step"] = f"{seconds:.1f} s, which is in no time above"
    B, D, K, M = spec.rows, 2 * config.embedding_size, config.members, config.layers
    return Contest(
        spec,
        runs,
        errors,
        tolerance=TOLERANCE,
        flops=6.0 * K * M * B * D * D,
        # Adam reads and writes every parameter and its two moments, and reads its gradient, written before.
        bytes_moved=4.0 * 8.0 * parameters[OURS] if OURS in parameters else 0.0,
        ours=OURS,
        missing=missing,
        parameters=parameters,
    )


def contests(
    specs: Sequence[Spec], scale: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Contest]:
    """The contests of ``specs``, each built when it is its turn; torch.compile in scale "all" alone.

    While one is being run PyTorch has as many CPU threads as the trainer gives it, whatever was set before.
    """
    contenders = CONTENDERS | ({COMPILED: _compiled} if scale == "all" else {})
    for spec in specs:
        config = recipe(spec.detail.removeprefix("recipe "), RATINGS)
        with cpu_threads(config.threads):
            yield build(spec, device, dtype, config=config, contenders=contenders)


def samples_per_second(row: Row) -> float:
    """Ratings trained on in a second."""
    return row.rows / row.median


def _step(way: Way, problem: Problem, rows: int) -> Run:
    """One step on the next of the whole batches of one random order, over and over."""
    generator = torch.Generator(problem.device).manual_seed(0)
    order = torch.randperm(len(problem.ratings), generator=generator, device=problem.device)
    batches = itertools.cycle([each for each in order.split(rows) if len(each) == rows])
    errors = torch.zeros(1, device=problem.device)
    share = rows / len(order)

    def run() -> None:
        loss, error = way.objective(problem.gather(next(batches)), generator)
        descend(way.optimizer, loss)
        errors[0] = error * share

    return run


# --- checked --------------------------------------------------------------------------------------------


def _error(way: Way, problem: Problem, rows: int, *, compiles: bool) -> tuple[float, float]:
    """(relative error of loss and gradient on the first rows against float64, seconds that they took)."""
    batch = problem.gather(torch.arange(rows, device=problem.device))
    parameters = list(way.model.parameters())
    began = time.perf_counter()
    try:
        loss, _ = way.objective(batch, torch.Generator(problem.device).manual_seed(1))
        gradients = torch.autograd.grad(loss, parameters)
    except Exception as error:
        if not compiles:
            raise
        # Of many types, with the whole program in the message.
        raise Unavailable(
            f"torch.compile failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    seconds = time.perf_counter() - began
    wide = copy.deepcopy(way.model).double()
    truth = way.plain(wide, batch, torch.Generator(problem.device).manual_seed(1))
    true_gradients = torch.autograd.grad(truth, list(wide.parameters()))
    loss_error = relative_error(loss.detach().reshape(1), truth.detach().reshape(1))
    flat, true_flat = (torch.cat([g.flatten() for g in each]) for each in (gradients, true_gradients))
    return max(loss_error, relative_error(flat, true_flat)), seconds


def _plain_loss(model: RatingModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """``losses.hybrid_loss`` with gamma 1, by member, histories by a dense matrix of who rated what."""
    config, size = model.config, model.config.embedding_size
    users, items, ratings = batch
    kept = _dropout(model, batch, generator)
    pairs = model.interactions
    seen = torch.zeros(pairs.n_users, pairs.n_items, dtype=torch.float64, device=users.device)
    rows = torch.repeat_interleave(torch.arange(pairs.n_users, device=users.device), pairs.indptr.diff())
    seen[rows, pairs.indices.long()] = 1.0

    def history(rated: Tensor, own: Tensor, table: Tensor) -> Tensor:
        others = rated.scatter(1, own.unsqueeze(1), 0.0)
        return others @ table / others.sum(1, keepdim=True).clamp(min=1.0) ** config.history_power

    total = torch.zeros((), dtype=torch.float64, device=users.device)
    for member in range(config.members):
        part = slice(member * size, (member + 1) * size)
        user, item = model.user_embedding.weight[users, part], model.item_embedding.weight[items, part]
        if model.user_history is not None:
            user = user + history(seen[users], items, model.user_history.weight[:, part])
        if model.item_history is not None:
            item = item + history(seen.T[items], users, model.item_history.weight[:, part])
        x = torch.cat((user, item), -1)
        z = _plain_network(model, member, x * kept[member])
        assert model.weight is not None
        assert model.intercept is not None
        prediction = model.mean + z @ model.weight[member] + model.intercept[member]
        if config.readout == "pair":
            prediction = prediction + (z[:, :size] * z[:, size:]).sum(-1)
        penalty = config.l2_latent * z.square().sum(-1) + config.l2_embedding * x.square().sum(-1)
        if model.user_bias is not None and model.item_bias is not None:
            biases = model.user_bias[users, member], model.item_bias[items, member]
            prediction = prediction + biases[0] + biases[1]
            penalty = penalty + config.l2_bias * (biases[0].square() + biases[1].square())
        total = total + ((prediction - ratings).square() + penalty).mean()
    return total


def _plain_network(model: RatingModel, member: int, x: Tensor) -> Tensor:
    """z [B, D] of one member."""
    if not isinstance(model, LinearRatingModel):
        for layer in cast("list[LUDense]", list(cast(LUNet, model.nets[member]).layers)):
            phi = cast(Activation, layer._fused())
            x, _ = reference.layer(x, layer._matrix(), phi, inverse=False, logabsdet=False)
        return x
    for module in cast(nn.Sequential, model.nets[0]):
        if isinstance(module, StackedLinear):
            x = x @ module.weight[member].T + module.bias[member]
        elif isinstance(module, nn.Linear):
            x = x @ module.weight.T + module.bias
        else:
            x = F.softplus(x, threshold=40.0)
    return x


def _dropout(model: RatingModel, batch: Batch, generator: torch.Generator) -> Tensor:
    """The factors [K, B, D] by which dropout multiplies x, drawn as the model draws them, in float32."""
    with torch.no_grad():
        x = model.output(batch.user, batch.item, observed=True).x
    keep = 1 - model.config.dropout
    if keep == 1:
        return torch.ones_like(x)
    drawn = torch.empty_like(x, dtype=torch.float32).bernoulli_(keep, generator=generator)
    return drawn.double() / keep


def _plain_control_loss(model: MLPModel, batch: Batch, generator: torch.Generator) -> Tensor:
    x = torch.cat((model.user_embedding.weight[batch.user], model.item_embedding.weight[batch.item]), -1)
    for module in model.hidden:
        x = x @ module.weight.T + module.bias if isinstance(module, nn.Linear) else x.clamp(min=0.0)
    prediction = model.mean + x @ model.readout.weight[0] + model.readout.bias
    return (prediction - batch.rating).square().mean()
