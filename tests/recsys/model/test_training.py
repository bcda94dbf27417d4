from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.config import TrainConfig, nearest_dataset, recipe
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.schema import CANDIDATES_FORMAT
from lunet_fast.recsys.model.training import train
from lunet_fast.training.files import read_tensors
from lunet_fast.training.loop import DivergenceError, Progress
from lunet_fast.training.run import Result
from tests.recsys.synthetic import latent_ratings, quick_config

TrainResult = Result[TrainedModel]


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    return latent_ratings()


@pytest.fixture(scope="module")
def result(ratings: Ratings) -> TrainResult:
    return train(ratings, quick_config(epochs=15, mlp_epochs=10, mlp_learning_rate=0.01))


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return result.trained.model.state_dict()


def assert_same_weights(a: TrainResult, b: TrainResult) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class TestResult:
    def test_learns_more_than_the_mean(self, ratings: Ratings, result: TrainResult) -> None:
        variance = ratings.rating.var().item()
        assert result.metrics["test_mse"] < 0.5 * variance
        assert result.metrics["mlp_test_mse"] < 0.8 * variance
        assert result.curve.train[-1] < result.curve.train[0]

    def test_metrics(self, result: TrainResult) -> None:
        values = result.metrics
        assert values["test_rmse"] == pytest.approx(values["test_mse"] ** 0.5)
        assert 0 < values["reconstruction_error_relative"] < 1e-10
        assert values["reconstruction_error"] < 1e-9
        # A narrow layer with ReLU cannot give back all of x, a decoder of it is still better than none.
        assert 1e-6 < values["mlp_reconstruction_error_relative"] < 1
        expected = {"dataset": "latent", "recipe": "best", "split": "random", "seed": 0, "epochs": 15}
        assert {name: values[name] for name in expected} == expected
        assert (values["train_ratings"], values["test_ratings"]) == (960, 240)
        assert values["parameters"] == sum(p.numel() for p in result.trained.model.parameters())
        assert values["version_torch"] == torch.__version__
        assert all(isinstance(value, (int, float, str)) for value in values.values())  # flat
        json.dumps(values, allow_nan=False)

    def test_figure_shows_every_epoch(self, result: TrainResult) -> None:
        assert len(result.curve.train) == len(result.curve.test) == 15
        assert result.curve.test[-1] == result.metrics["test_mse"]


class TestDeterminism:
    def test_same_seed_same_result(self, ratings: Ratings) -> None:
        torch.manual_seed(123)  # what ran before must not matter
        first = train(ratings, quick_config())
        torch.rand(10)
        second = train(ratings, quick_config())
        assert_same_weights(first, second)
        untimed = [
            {name: value for name, value in r.metrics.items() if "seconds" not in name}
            for r in (first, second)
        ]
        assert untimed[0] == untimed[1]

    def test_other_seed_other_result(self, ratings: Ratings) -> None:
        first, second = (train(ratings, quick_config(mlp=False, epochs=1, seed=seed)) for seed in (0, 1))
        assert first.metrics["test_mse"] != second.metrics["test_mse"]

    def test_leaves_the_global_generator_alone(self, ratings: Ratings) -> None:
        before = torch.get_rng_state()
        train(ratings, quick_config(epochs=1, mlp_epochs=1))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_control_does_not_change_the_model(self, ratings: Ratings) -> None:
        assert_same_weights(train(ratings, quick_config()), train(ratings, quick_config(mlp=False)))


class TestParts:
    def test_no_weight_depends_on_a_test_rating(self, ratings: Ratings) -> None:
        test_rows = random_split(ratings, 0).test
        changed = ratings.rating.clone()
        changed[test_rows] = 6 - changed[test_rows]
        first = train(ratings, quick_config(mlp=False))
        second = train(replace(ratings, rating=changed), quick_config(mlp=False))
        assert_same_weights(first, second)
        assert first.metrics["test_mse"] != second.metrics["test_mse"]

    def test_parts_given_equal_parts_made(self, ratings: Ratings) -> None:
        split = random_split(ratings, 0)
        given = train(ratings.select(split.train), quick_config(mlp=False), test=ratings.select(split.test))
        made = train(ratings, quick_config(mlp=False))
        assert_same_weights(given, made)
        assert given.metrics["test_mse"] == made.metrics["test_mse"]
        assert given.metrics["split"] == "files"

    def test_per_user(self, ratings: Ratings) -> None:
        values = train(ratings, quick_config(mlp=False, epochs=1, split="per-user")).metrics
        assert values["split"] == "per-user"

    def test_without_a_test_part_nothing_is_measured(self, ratings: Ratings) -> None:
        result = train(ratings, quick_config(split="none"))
        assert result.metrics["train_ratings"] == len(ratings)
        assert not {"test_mse", "reconstruction_error", "mlp_test_mse"} & result.metrics.keys()
        assert result.curve.test == []

    def test_split_files_needs_the_test_part(self, ratings: Ratings) -> None:
        with pytest.raises(ValueError, match="pass test="):
            train(ratings, quick_config(split="files"))

    def test_an_empty_part_is_refused(self, ratings: Ratings) -> None:
        with pytest.raises(ValueError, match="the test part of latent is empty"):
            train(ratings, quick_config(), test=ratings.select([]))
        with pytest.raises(ValueError, match="the training part of latent is empty"):
            train(ratings.select([]), quick_config(split="none"))


class TestHybrid:
    def test_one_model_rates_and_ranks(self, ratings: Ratings) -> None:
        settings = {"gamma": 0.5, "split": "joint", "epochs": 25, "embedding_size": 8, "l2_latent": 0.02}
        values = train(ratings, quick_config(**settings, mlp=False)).metrics
        assert values["test_mse"] < 0.75 * float(ratings.rating.var())
        assert (values["held_out_ratings"], values["train_ratings"], values["test_ratings"]) == (60, 912, 228)
        for name in ("hr@10", "ndcg@10", "precision@10", "full_ndcg@10", "mrr", "coverage@10"):
            assert 0 <= values[name] <= 1
        assert 0 < values["reconstruction_error_relative"] < 1e-10

    def test_learns_who_chooses_what(self) -> None:
        """Two kinds of users choose from two kinds of items."""
        rng = np.random.default_rng(0)
        pairs = [(u, i) for u in range(60) for i in range(u % 2, 80, 2) if rng.random() < 0.5]
        clicks = from_frame(pd.DataFrame(pairs, columns=["user", "item"]), rating=None)
        settings = {"gamma": 0.0, "split": "leave-one-out", "epochs": 20, "dropout": 0.0}
        for loss in ("mse", "bpr"):
            values = train(clicks, quick_config(**settings, loss=loss)).metrics
            # Of about 60 candidates 20 are of the user's kind: chance is hr@20 = 0.33.
            assert values["hr@20"] > 0.75
            assert "test_mse" not in values
            assert "mlp_test_mse" not in values

    @pytest.mark.parametrize("negatives_outside", ["known", "training"])
    def test_no_weight_depends_on_which_of_the_other_parts_a_pair_is_in(
        self, ratings: Ratings, negatives_outside: str
    ) -> None:
        """Ratings of the parts that are not trained on change nothing."""
        config = quick_config(gamma=0.5, split="joint", negatives_outside=negatives_outside, mlp=False)
        parts = Parts.of(ratings, config.split, config.seed)
        outside = torch.ones(len(ratings), dtype=torch.bool)
        key = ratings.user * 40 + ratings.item
        outside[torch.isin(key, parts.training.user * 40 + parts.training.item)] = False
        changed = torch.where(outside, 6 - ratings.rating, ratings.rating)
        first, second = train(ratings, config), train(replace(ratings, rating=changed), config)
        assert_same_weights(first, second)
        assert first.metrics["test_mse"] != second.metrics["test_mse"]

    def test_with_gamma_one_nothing_is_drawn(self, ratings: Ratings) -> None:
        """The settings of what is not trained leave the weights as they are."""
        first = train(ratings, quick_config(mlp=False))
        second = train(ratings, quick_config(mlp=False, negatives=9, interaction_share=0.2))
        assert_same_weights(first, second)

    def test_candidates_are_saved(self, ratings: Ratings, tmp_path: Path) -> None:
        config = quick_config(gamma=0.5, split="joint", epochs=1, mlp=False)
        train(ratings, config, out=tmp_path)
        tensors, _ = read_tensors(tmp_path / "candidates.safetensors", CANDIDATES_FORMAT)
        parts = Parts.of(ratings, config.split, config.seed)
        assert parts.held_out is not None
        assert parts.candidates is not None
        assert torch.equal(tensors["candidates"], parts.candidates)
        assert torch.equal(tensors["user"], parts.held_out.user)
        assert torch.equal(tensors["item"], parts.held_out.item)

    def test_resumed_training_draws_the_same(self, ratings: Ratings, tmp_path: Path) -> None:
        config = quick_config(gamma=0.5, split="joint", mlp=False)
        whole = train(ratings, config)

        class Stop(Progress):
            def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
                if epoch == 1:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(ratings, config, out=tmp_path, progress=Stop(), checkpoint_seconds=0)
        resumed = train(ratings, config, out=tmp_path, resume=True, checkpoint_seconds=0)
        assert_same_weights(whole, resumed)


class TestLoop:
    def test_linear_schedule_ends_near_zero(self, ratings: Ratings) -> None:
        """The last epoch of many moves the weights less than the only epoch of one."""

        class Moves(Progress):
            losses: list[float]

            def __init__(self) -> None:
                self.losses = []

            def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
                assert test_loss is not None
                self.losses.append(test_loss)

        moves = {}
        for schedule in ("linear", "constant"):
            heard = Moves()
            train(ratings, quick_config(mlp=False, schedule=schedule, epochs=10), progress=heard)
            moves[schedule] = abs(heard.losses[-1] - heard.losses[-2])
        assert moves["linear"] < 0.5 * moves["constant"]

    def test_progress_hears_every_phase_and_epoch(self, ratings: Ratings) -> None:
        heard: list[tuple[object, ...]] = []

        class Ears(Progress):
            def start(self, phase: str, epochs: int, steps: int, done: int) -> None:
                heard.append(("start", phase, epochs, steps, done))

            def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
                heard.append((phase, epoch, test_loss is None))

        train(ratings, quick_config(epochs=2, mlp_epochs=1, mlp_batch_size=300), progress=Ears())
        assert heard == [
            ("start", "LU-Net", 2, 8, 0),
            ("LU-Net", 0, False),
            ("LU-Net", 1, False),
            ("start", "MLP", 1, 4, 0),
            ("MLP", 0, False),
            ("start", "decoder", 1, 4, 0),
            ("decoder", 0, True),
        ]

    def test_divergence_names_the_place_and_the_remedy(self, ratings: Ratings) -> None:
        with pytest.raises(DivergenceError, match=r"LU-Net: .* epoch \d.* learning_rate=10000 .* try 2000"):
            train(ratings, quick_config(learning_rate=1e4))

    def test_a_rating_that_is_not_a_number_is_told_before_training(self, ratings: Ratings) -> None:
        broken = ratings.rating.clone()
        broken[random_split(ratings, 0).train[5]] = float("nan")
        with pytest.raises(ValueError, match=r"training part of latent has the rating nan in row 5"):
            train(replace(ratings, rating=broken), quick_config())

    def test_an_index_beyond_the_ids_is_told_before_training(self, ratings: Ratings) -> None:
        broken = ratings.item.clone()
        broken[random_split(ratings, 0).train[5]] = 40
        with pytest.raises(ValueError, match=r"item indices from 0 to 40, and there are 40 items"):
            train(replace(ratings, item=broken), quick_config())

    def test_weights_spoilt_by_the_last_step_are_found(self, ratings: Ratings) -> None:
        """One step an epoch, so that no loss is computed from what it made of the weights."""
        config = quick_config(epochs=1, batch_size=10_000, learning_rate=1e39)
        with pytest.raises(DivergenceError, match="is nan after epoch 1"):
            train(ratings, config)

    def test_one_user_one_item_and_equal_ratings(self) -> None:
        one = latent_ratings(users=1, items=4, ratings=4)
        assert train(one, quick_config(mlp=False)).metrics["test_ratings"] == 1
        equal = latent_ratings()
        equal = replace(equal, rating=torch.full_like(equal.rating, 3.0), scale=(3.0, 3.0))
        assert train(equal, quick_config(mlp=False)).metrics["test_mse"] == 0.0

    def test_a_device_that_is_not_there(self, ratings: Ratings) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(ValueError, match="no CUDA device"):
            train(ratings, quick_config(), device="cuda")


class TestConfig:
    def test_round_trip_through_json(self) -> None:
        config = recipe("paper", 100_000, seed=7, mlp_hidden=(5,))
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize(
        ("n_ratings", "name"),
        [(1, "ml-100k"), (300_000, "ml-100k"), (320_000, "ml-1m"), (32_000_000, "ml-1m")],
    )
    def test_settings_of_the_nearest_data(self, n_ratings: int, name: str) -> None:
        assert nearest_dataset(n_ratings) == name
        sizes = {"ml-100k": 100_000, "ml-1m": 1_000_209}
        assert recipe("best", n_ratings) == recipe("best", sizes[name])

    def test_paper_protocol(self) -> None:
        config = recipe("paper", 100_000)
        protocol = (config.learning_rate, config.net_learning_rate, config.batch_size, config.epochs)
        assert protocol == (1e-3, 1e-3, 128, 50)
        assert (config.readout, config.schedule) == ("linear", "constant")
        budget = (
            config.mlp_learning_rate,
            config.mlp_batch_size,
            config.mlp_epochs,
            config.mlp_embedding_size,
        )
        assert budget == (1e-3, 128, 50, config.embedding_size)

    @pytest.mark.parametrize(
        ("setting", "value", "message"),
        [
            ("epochs", 0, "epochs=0 must be a whole number from 1 to 1000000"),
            ("epochs", 1.5, "epochs=1.5"),
            ("layers", True, "layers=True"),
            ("dropout", 1.0, "below 1"),
            ("alpha", 1.0, "between 0 and 1"),
            ("learning_rate", float("nan"), "learning_rate=nan must be a number above 0"),
            ("l2_latent", -0.1, "at least 0"),
            ("seed", -1, "seed=-1"),
            ("biases", 1, "true or false"),
            ("readout", "sum", "choose one of linear, pair"),
            ("split", "weekly", "choose one of random, per-user"),
            ("mlp_hidden", (), "must be a list of 1 entries or more"),
            ("learn_rate", 0.1, "unknown setting 'learn_rate': the settings are recipe, seed"),
        ],
    )
    def test_refuses(self, setting: str, value: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            recipe("best", 1, **{setting: value})

    def test_unknown_recipe(self) -> None:
        with pytest.raises(ValueError, match="recipe='good' is unknown: choose one of paper, best"):
            recipe("good", 1)
