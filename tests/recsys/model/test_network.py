from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lunet_fast.recsys.model.interactions import Interactions
from lunet_fast.recsys.model.mlp import MLPModel
from lunet_fast.recsys.model.model_files import load_model
from lunet_fast.recsys.model.network import RatingModel
from lunet_fast.recsys.model.prediction import reconstruct
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import latent_ratings, quick_config

N_USERS, N_ITEMS = 7, 5


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    """Nine pairs: user 5 and item 4 occur in none, user 6 in one."""
    users = torch.tensor([0, 0, 0, 1, 2, 3, 3, 4, 6])
    items = torch.tensor([2, 0, 1, 1, 2, 3, 0, 1, 3])
    return users, items


def dense(pairs: tuple[Tensor, Tensor]) -> Tensor:
    matrix = torch.zeros(N_USERS, N_ITEMS, dtype=torch.float64)
    matrix[pairs] = 1
    return matrix


def model_of(pairs: tuple[Tensor, Tensor], **changes: object) -> RatingModel:
    ratings = torch.arange(len(pairs[0])) % 5 + 1.0
    model = RatingModel(quick_config(**changes), *pairs, ratings, N_USERS, N_ITEMS).double()
    with torch.no_grad():  # training would move these away from zero
        for parameter in (model.user_bias, model.item_bias, model.weight, model.intercept):
            if parameter is not None:
                parameter.normal_()
    return model


class TestInteractions:
    def test_sums_and_gradients_are_those_of_the_dense_matrix(self, pairs: tuple[Tensor, Tensor]) -> None:
        matrix, s = dense(pairs), Interactions(*pairs, N_USERS, N_ITEMS)
        for total, reference, rows in (
            (s.sum_over_items, matrix, N_ITEMS),
            (s.sum_over_users, matrix.t(), N_USERS),
        ):
            table = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(total(table), reference @ table)
            assert torch.autograd.gradcheck(total, (table,))

    def test_is_a_set(self, pairs: tuple[Tensor, Tensor]) -> None:
        shuffled = torch.randperm(9).repeat(2)
        twice = Interactions(pairs[0][shuffled], pairs[1][shuffled], N_USERS, N_ITEMS)
        once = Interactions(*pairs, N_USERS, N_ITEMS)
        assert torch.equal(once.indptr, twice.indptr)
        assert torch.equal(once.indices, twice.indices)
        assert once.user_counts.tolist() == dense(pairs).sum(1).tolist()
        assert once.item_counts.tolist() == dense(pairs).sum(0).tolist()

    def test_contains_every_pair_and_no_other(self, pairs: tuple[Tensor, Tensor]) -> None:
        grid = torch.cartesian_prod(torch.arange(N_USERS), torch.arange(N_ITEMS))
        found = Interactions(*pairs, N_USERS, N_ITEMS).contains(grid[:, 0], grid[:, 1])
        assert torch.equal(found, dense(pairs).bool().flatten())

    @pytest.mark.parametrize(
        ("indptr", "indices"),
        [
            ([0, 2, 1, 3], [0, 1, 0]),
            ([0, 1, 2, 4], [0, 1, 0]),
            ([0, 1, 2, 3], [0, 5, 0]),
            ([1, 2, 3], [0, 1, 2]),
        ],
    )
    def test_refuses_a_broken_matrix(self, indptr: list[int], indices: list[int]) -> None:
        with pytest.raises(ValueError, match="interactions"):
            Interactions.from_csr(torch.tensor(indptr), torch.tensor(indices), N_ITEMS)


class TestInput:
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    def test_is_embedding_plus_history_without_the_pair(
        self, pairs: tuple[Tensor, Tensor], power: float
    ) -> None:
        model, matrix = model_of(pairs, history_power=power), dense(pairs)
        users, items = torch.tensor([0, 0, 3, 6, 5]), torch.tensor([2, 3, 0, 3, 4])
        assert model.user_history is not None
        assert model.item_history is not None
        x = model.output(users, items).x
        for b, (u, i) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
            rest = matrix.clone()
            rest[u, i] = 0
            user = (
                model.user_embedding.weight[u]
                + rest[u] @ model.user_history.weight / rest[u].sum().clamp(min=1) ** power
            )
            column = rest[:, i]
            item = (
                model.item_embedding.weight[i]
                + column @ model.item_history.weight / column.sum().clamp(min=1) ** power
            )
            expected = torch.cat((user.view(2, 4), item.view(2, 4)), dim=1)
            torch.testing.assert_close(x[:, b], expected)

    def test_saying_that_pairs_are_observed_equals_looking_them_up(
        self, pairs: tuple[Tensor, Tensor]
    ) -> None:
        model = model_of(pairs)
        torch.testing.assert_close(model.output(*pairs, observed=True).x, model.output(*pairs).x)
        others = (torch.tensor([0, 5]), torch.tensor([4, 1]))
        torch.testing.assert_close(model.output(*others, observed=False).x, model.output(*others).x)

    def test_a_training_pair_does_not_see_its_own_history_entry(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs)
        assert model.user_history is not None
        user, item = pairs[0][:1], pairs[1][:1]
        model.output(user, item, observed=True).score.sum().backward()
        gradient = model.user_history.weight.grad
        assert gradient is not None
        assert gradient[item].abs().max() == 0
        assert gradient[pairs[1][1]].abs().max() > 0  # another item of the same user is seen


class TestPrediction:
    @pytest.mark.parametrize("biases", [True, False])
    @pytest.mark.parametrize("readout", ["linear", "pair"])
    def test_formula(self, pairs: tuple[Tensor, Tensor], readout: str, biases: bool) -> None:
        model = model_of(pairs, readout=readout, biases=biases)
        users, items = torch.tensor([0, 1, 6]), torch.tensor([3, 1, 0])
        output = model.output(users, items)
        for k in range(2):
            z = model.nets[k](output.x[k])
            expected = model.mean + model.intercept[k] + z @ model.weight[k]
            if readout == "pair":
                expected = expected + (z[:, :4] * z[:, 4:]).sum(1)
            if model.user_bias is not None and model.item_bias is not None:
                expected = expected + model.user_bias[users, k] + model.item_bias[items, k]
            torch.testing.assert_close(output.z[k], z)
            torch.testing.assert_close(output.score[k], expected)
        torch.testing.assert_close(model(users, items), output.score.mean(0))

    def test_of_what_has_no_training_rating(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs)
        ratings = (torch.arange(9) % 5 + 1.0).double()
        mean = ratings.mean()
        user_0 = (ratings[:3] - mean).sum() / 13
        item_1 = (ratings[[2, 3, 7]] - mean).sum() / 13
        users, items = torch.tensor([0, 5, -1, -1, 5, 0]), torch.tensor([4, 1, 1, 4, -1, -1])
        expected = torch.stack([mean + user_0, mean + item_1, mean + item_1, mean, mean, mean + user_0])
        # The deviations are stored in float32.
        torch.testing.assert_close(model(users, items), expected, rtol=1e-6, atol=1e-6)

    def test_does_not_depend_on_the_other_pairs_or_on_precomputed_histories(
        self, pairs: tuple[Tensor, Tensor]
    ) -> None:
        model = model_of(pairs)
        alone = torch.cat([model(u, i) for u, i in zip(pairs[0].split(1), pairs[1].split(1), strict=True)])
        torch.testing.assert_close(model(*pairs), alone)
        torch.testing.assert_close(model(*pairs, histories=model.histories()), alone)

    def test_dropout_only_where_it_is_drawn(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs, dropout=0.5)
        plain, count = model.output(*pairs), len(pairs[0])
        first, second, again = (
            model.output(*pairs, dropout=model.draw_dropout(count, torch.Generator().manual_seed(seed)))
            for seed in (1, 2, 1)
        )
        assert torch.equal(plain.z, model.output(*pairs).z)
        assert torch.equal(first.z, again.z)
        assert not torch.equal(first.z, second.z)
        assert torch.equal(first.x, plain.x)  # the penalty and the reconstruction see x itself


def test_inverse_gives_back_x() -> None:
    ratings = latent_ratings()
    model = RatingModel(quick_config(), ratings.user, ratings.item, ratings.rating, 60, 40)
    x, z = model.latent(ratings.user, ratings.item)
    assert not torch.allclose(x, z, atol=1e-2)
    torch.testing.assert_close(model.inverse(z), x, rtol=0, atol=1e-5)
    result = reconstruct(model, ratings.user, ratings.item)
    assert 0 < result.error < 1e-11
    assert result.relative == pytest.approx(result.error / x.square().sum(-1).mean().item(), rel=1e-4)


class TestState:
    def test_round_trip(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs).float()
        before = torch.get_rng_state()
        copy = RatingModel.from_state(model.config, model.state_dict(), N_USERS, N_ITEMS)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(copy(*pairs), model(*pairs))

    def test_refuses_tensors_of_another_model(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs).float()
        state = model.state_dict()
        with pytest.raises(ValueError, match="7 users but 8"):
            RatingModel.from_state(model.config, state, 8, N_ITEMS)
        with pytest.raises(ValueError, match="do not fit"):
            RatingModel.from_state(model.config.replace(embedding_size=6), state, N_USERS, N_ITEMS)
        del state["interactions.indptr"]
        with pytest.raises(ValueError, match="do not fit"):
            RatingModel.from_state(model.config, state, N_USERS, N_ITEMS)


def test_no_ratings_no_model() -> None:
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="ratings is empty"):
        RatingModel(quick_config(), none, none, torch.empty(0), 1, 1)


def test_mlp_is_embeddings_and_layers() -> None:
    model = MLPModel(N_USERS, N_ITEMS, 3, (8, 2), mean=3.5, std=0.1)
    users, items = torch.tensor([0, 6]), torch.tensor([4, 1])
    x, h = model.latent(users, items)
    assert torch.equal(
        x, torch.cat((model.user_embedding.weight[users], model.item_embedding.weight[items]), 1)
    )
    assert h.shape == (2, 2)
    assert bool((h >= 0).all())
    expected = 3.5 + h @ model.readout.weight[0] + model.readout.bias
    torch.testing.assert_close(model(users, items), expected)


class TestIdentity:
    """f = identity, beside LU-Net."""

    def test_z_is_x(self, pairs: tuple[Tensor, Tensor]) -> None:
        model = model_of(pairs, network="identity", layers=3)
        x, z = model.latent(*pairs)
        torch.testing.assert_close(z, x, rtol=0, atol=0)
        torch.testing.assert_close(model.inverse(z), x, rtol=0, atol=0)

    def test_stands_still_and_is_no_parameter(self, pairs: tuple[Tensor, Tensor]) -> None:
        model, other = model_of(pairs, network="identity"), model_of(pairs)
        model(*pairs).sum().backward()
        assert all(parameter.grad is None for parameter in model.nets.parameters())
        assert model.user_embedding.weight.grad is not None
        own, whole = (sum(p.numel() for p in each.learnt()) for each in (model, other))
        assert whole - own == sum(p.numel() for p in other.nets.parameters())

    def test_training_and_its_file(self, tmp_path: Path) -> None:
        ratings = latent_ratings()
        config = quick_config(network="identity", mlp=False)
        found = train(ratings, config, out=tmp_path / "run")
        assert found.metrics["reconstruction_error"] == 0
        assert all(not bool(parameter.any()) for parameter in found.trained.model.nets.parameters())
        again = load_model(tmp_path / "run" / "model.safetensors").model
        assert again.config.network == "identity"
        some = ratings.user[:50], ratings.item[:50]
        torch.testing.assert_close(again(*some), found.trained.model(*some), rtol=0, atol=0)
        errors = train(ratings, config.replace(network="lu-net")).metrics["test_mse"]
        assert found.metrics["test_mse"] < 1.5 * errors
