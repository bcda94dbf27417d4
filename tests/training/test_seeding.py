"""First weights: the same as ever for a seed, whatever other threads draw meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.mlp import MLPModel, perceptron
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.training import train
from lunet_fast.training.seeding import seeded
from tests.recsys.synthetic import latent_ratings, quick_config


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    return latent_ratings()


def together(*works: Callable[[], Any]) -> list[Any]:
    """What the works give, each in a thread of its own; the first error is raised."""
    found: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(place: int) -> None:
        try:
            begin.wait(30)
            found[place] = works[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return found


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """As the weights of the first release were drawn, which a seed must give for ever."""
    mixed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(mixed))
        yield


@pytest.mark.parametrize("readout", ["linear", "pair"])
@pytest.mark.parametrize("seed", [0, 7])
def test_weights_are_those_of_the_global_generator(ratings: Ratings, seed: int, readout: str) -> None:
    def made(drawing: Callable[[int], AbstractContextManager[Any]]) -> list[torch.Tensor]:
        with drawing(seed):
            models: list[nn.Module] = [
                RatingModel(
                    quick_config(readout=readout, gamma=0.5),
                    ratings.user,
                    ratings.item,
                    ratings.rating,
                    ratings.n_users,
                    ratings.n_items,
                ),
                MLPModel(60, 40, 4, (8, 6), 3.0, 0.1),
                perceptron((6, 8, 8)),
            ]
        return [parameter for model in models for parameter in model.parameters()]

    before = torch.random.get_rng_state()
    own = made(seeded)
    assert torch.equal(torch.random.get_rng_state(), before), "something is drawn from the global generator"
    for one, other in zip(own, made(seeded_globally), strict=True):
        assert torch.equal(one, other)


def test_what_another_thread_draws_is_its_own() -> None:
    """It draws between the two draws of what is seeded."""
    torch.manual_seed(1)
    expected = [float(torch.rand(())) for _ in range(3)]
    torch.manual_seed(1)
    inside, drawn = threading.Event(), threading.Event()
    numbers = [float(torch.rand(()))]

    def initialise() -> list[float]:
        with seeded(0):
            first = float(torch.empty(1).normal_())
            inside.set()
            assert drawn.wait(30)
            return [first, float(torch.empty(1).normal_())]

    def draw() -> None:
        assert inside.wait(30)
        numbers.append(float(torch.rand(())))
        drawn.set()

    among_others = together(initialise, draw)[0]
    numbers.append(float(torch.rand(())))
    assert numbers == expected
    with seeded(0):
        assert [float(torch.empty(1).normal_()) for _ in range(2)] == among_others


def test_two_trainings_at_once_are_each_their_own(ratings: Ratings) -> None:
    configs = [quick_config(epochs=1, mlp=False, split="none", gamma=0.5, seed=seed) for seed in (0, 1)]

    def weights(config: TrainConfig) -> list[torch.Tensor]:
        return list(train(ratings, config).trained.model.parameters())

    alone = [weights(config) for config in configs]
    at_once = together(*(partial(weights, config) for config in configs))
    for one, other in zip(alone, at_once, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
