"""The density of pairs against its definition, risk and coverage, and items solved for backwards."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from lunet_fast.layers.lunet import LUNet
from lunet_fast.recsys.evaluation import inversion
from lunet_fast.recsys.evaluation.inversion import PairDensity, item_vectors, items_for_score, risk_coverage
from lunet_fast.recsys.model.network import RatingModel
from tests.recsys.synthetic import latent_ratings, quick_config

N_USERS, N_ITEMS = 60, 40


def model_of(**changes: object) -> RatingModel:
    """A model of random weights in float64 on the synthetic ratings; item 39 and user 59 have none."""
    ratings = latent_ratings()
    ratings = ratings.select((ratings.item != N_ITEMS - 1) & (ratings.user != N_USERS - 1))
    generator = torch.Generator().manual_seed(3)
    model = RatingModel(
        quick_config(**changes), *(ratings.user, ratings.item, ratings.rating), N_USERS, N_ITEMS
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def all_training(model: RatingModel) -> tuple[Tensor, Tensor]:
    users, items = model.interactions.of_users(torch.arange(N_USERS))
    return users, items


class TestPairDensity:
    @pytest.mark.parametrize(("space", "layers"), list(itertools.product(inversion.SPACES, (1, 3))))
    def test_is_the_change_of_variables(self, space: str, layers: int) -> None:
        model = model_of(layers=layers)
        users, items = torch.tensor([3, 0, 58]), torch.tensor([7, 2, 30])
        assert model.interactions.contains(users, items).unique().numel() == 2  # both kinds of pairs
        density = PairDensity.fit(model, space=space, ridge=0.01)
        with torch.no_grad():
            fitted = model.latent(*all_training(model))[space == "latent"]
            x, z = model.latent(users, items)
        expected = torch.zeros(len(users), model.config.members, dtype=torch.float64)
        for m, net in enumerate(model.nets):
            covariance = torch.cov(fitted[m].T, correction=0)
            covariance += (
                0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
            )
            normal = MultivariateNormal(fitted[m].mean(0), covariance)
            for b in range(len(users)):
                if space == "input":
                    expected[b, m] = normal.log_prob(x[m, b])
                    continue
                slope = cast(Tensor, jacobian(net, x[m, b]))
                expected[b, m] = normal.log_prob(z[m, b]) + torch.linalg.slogdet(slope).logabsdet
        found = density.log_prob(users, items)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected.mean(1), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("space", inversion.SPACES)
    def test_integrates_to_one(self, space: str) -> None:
        model = model_of(embedding_size=1, layers=3, alpha=0.5)
        density = PairDensity.fit(model, space=space)
        with torch.no_grad():
            x = model.latent(*all_training(model))[0]
            # Each member on a grid of its own, far beyond the training pairs.
            middle, reach = x.mean(1), 16 * x.std(1)
            line = torch.linspace(-1, 1, 1001, dtype=torch.float64)
            grid = torch.cartesian_prod(line, line)
            points = middle.unsqueeze(1) + grid * reach.unsqueeze(1)
            cell = (reach * (line[1] - line[0])).prod(-1)
            total = density.members_log_prob(points).exp().sum(1) * cell
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)

    def test_an_affine_network_changes_nothing(self) -> None:
        model = model_of(layers=1)
        pairs = torch.arange(50), torch.arange(50) % 39
        latent, plain = (
            PairDensity.fit(model, space=space, ridge=0).log_prob(*pairs) for space in inversion.SPACES
        )
        torch.testing.assert_close(latent, plain, rtol=1e-8, atol=1e-8)

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = model_of()
        pairs = torch.arange(50), torch.arange(50) % 39
        whole = PairDensity.fit(model).log_prob(*pairs)
        monkeypatch.setattr(inversion, "CHUNK", 7)
        torch.testing.assert_close(PairDensity.fit(model).log_prob(*pairs), whole, rtol=1e-10, atol=1e-10)

    def test_float32_is_near_float64(self) -> None:
        model = model_of()
        pairs = torch.arange(50), torch.arange(50) % 39
        wide = PairDensity.fit(model).log_prob(*pairs)
        torch.testing.assert_close(PairDensity.fit(model.float()).log_prob(*pairs), wide, rtol=0, atol=1e-3)

    def test_no_pairs(self) -> None:
        none = torch.empty(0, dtype=torch.int64)
        assert PairDensity.fit(model_of()).log_prob(none, none).shape == (0,)

    def test_what_cannot_be_fitted(self) -> None:
        model = model_of()
        with pytest.raises(ValueError, match="space='z' is unknown: choose one of latent, input"):
            PairDensity.fit(model, space="z")
        with pytest.raises(ValueError, match="ridge=-1 must be a finite number of at least 0"):
            PairDensity.fit(model, ridge=-1)
        few = latent_ratings().select(torch.arange(3))
        small = RatingModel(quick_config(), few.user, few.item, few.rating, N_USERS, N_ITEMS)
        with pytest.raises(ValueError, match=r"3 training pairs in 8 dimensions is singular with ridge=0"):
            PairDensity.fit(small, ridge=0)

    def test_unseen_indices_are_refused(self) -> None:
        density = PairDensity.fit(model_of())
        with pytest.raises(ValueError, match="users must be indices from 0 to 59, got -1 to 3"):
            density.log_prob(torch.tensor([3, -1]), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match="items must be indices from 0 to 39, got 0 to 40"):
            density.log_prob(torch.tensor([3, 1]), torch.tensor([0, 40]))


class TestRiskCoverage:
    def test_known_values(self) -> None:
        found = risk_coverage(torch.tensor([0.1, 3.0, 2.0]), torch.tensor([6.0, 1.0, 2.0]))
        assert found.tolist() == [1.0, 1.5, 3.0]

    def test_equal_confidence_shares_its_error(self) -> None:
        error = torch.tensor([4.0, 0.0, 2.0, 6.0])
        assert risk_coverage(torch.zeros(4), error).tolist() == [3.0] * 4
        for order in itertools.permutations(range(4)):
            confidence = torch.tensor([1.0, 1.0, -torch.inf, 0.0])
            found = risk_coverage(confidence[list(order)], error[list(order)])
            assert found.tolist() == [2.0, 2.0, 10 / 3, 3.0]

    def test_perfect_confidence_has_the_least_area(self) -> None:
        error = torch.tensor([0.0, 1.0, 0.25, 9.0, 4.0])
        areas = [
            float(risk_coverage(torch.tensor(order), error).mean())
            for order in itertools.permutations([1.0, 2.0, 3.0, 4.0, 5.0])
        ]
        assert float(risk_coverage(-error, error).mean()) == min(areas)
        assert float(risk_coverage(error, error).mean()) == max(areas)
        assert sum(areas) / len(areas) == pytest.approx(float(error.mean()))

    def test_random_confidence_has_the_mean_error(self) -> None:
        generator = torch.Generator().manual_seed(0)
        error = torch.rand(20_000, generator=generator)
        area = float(risk_coverage(torch.rand(20_000, generator=generator), error).mean())
        assert area == pytest.approx(float(error.mean()), abs=0.01)

    @pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
    def test_shapes(self, shapes: Any) -> None:
        with pytest.raises(ValueError, match=r"must both be \[N\] with N > 0, got"):
            risk_coverage(*(torch.zeros(shape) for shape in shapes))

    def test_nan(self) -> None:
        with pytest.raises(ValueError, match="confidence has NaN"):
            risk_coverage(torch.tensor([1.0, torch.nan]), torch.zeros(2))


def scores_of(model: RatingModel, users: Tensor, vector: Tensor, near: Tensor | None, readout: str) -> Tensor:
    """What each member's read-out gives for the users as they are with an item of this vector: by hand."""
    config, rated = model.config, model.interactions.item_counts > 0
    user = model.embed(users, torch.zeros_like(users), model.histories(), False)[..., : config.embedding_size]
    own = config.embedding_size - config.interaction_size
    rates = readout == "rating"
    weight = cast(Tensor, model.weight if rates else model.interaction_weight)
    constant = cast(Tensor, model.intercept if rates else model.interaction_intercept)
    item_bias = cast(Tensor, model.item_bias if rates else model.item_logit)
    out = []
    for m, net in enumerate(model.nets):
        z = cast(LUNet, net)(torch.cat((user[m], vector[m]), -1))
        score = z @ weight[m] + constant[m]
        z_user, z_item = z.chunk(2, -1)
        product = (z_user * z_item)[:, :own] if rates else (z_user * z_item)[:, own:]
        score = score + (product.sum(-1) if config.readout == "pair" else 0)
        score = score + (item_bias[rated, m].mean() if near is None else item_bias[near, m])
        if rates:
            score = score + cast(Tensor, model.user_bias)[users, m]
            score = score + (0 if config.loss == "ordinal" else model.mean)
        out.append(score)
    return torch.stack(out)


CASES: list[dict[str, Any]] = [
    {"readout": readout, "layers": layers, "gamma": gamma}
    for readout, layers, gamma in itertools.product(("linear", "pair"), (1, 3), (0.5, 1.0))
]
CASES += [{"loss": "ordinal"}, {"gamma": 0.0}, {"members": 1, "alpha": 0.5}]


class TestItemsForScore:
    @pytest.mark.parametrize("settings", CASES, ids=str)
    @pytest.mark.parametrize("from_item", [False, True])
    def test_hits_the_score_with_the_user_as_it_is(self, settings: dict[str, Any], from_item: bool) -> None:
        model = model_of(**settings)
        users = torch.tensor([3, 0, 58])
        near = torch.tensor([7, 2, 30]) if from_item else None
        readouts = {0.0: ["interaction"], 1.0: ["rating"]}.get(
            settings.get("gamma", 1.0), ["rating", "interaction"]
        )
        for readout in readouts:
            wanted = torch.tensor([4.0, 2.5, 5.0])
            found = items_for_score(model, model.histories(), users, wanted, near=near, readout=readout)
            with torch.no_grad():
                reached = scores_of(model, users, found.vector, near, readout)
            goal = wanted.double().expand_as(reached)
            torch.testing.assert_close(reached, goal, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.score, reached, rtol=0, atol=1e-9)

    def test_hits_the_score_in_float32(self) -> None:
        model = model_of(layers=2).float()
        users = torch.arange(59)
        for wanted in (1.0, 3.0, 5.0):
            found = items_for_score(model, model.histories(), users, wanted)
            assert float((found.score - wanted).abs().max()) <= 1e-5

    def test_is_the_nearest_point(self) -> None:
        model = model_of(layers=3)
        users = torch.tensor([3, 0, 58])
        found = items_for_score(model, model.histories(), users, 4.5)
        rated = model.interactions.item_counts > 0
        start = item_vectors(model, model.histories())[:, rated].mean(1, keepdim=True)
        # At the nearest point of a surface the way there is along its gradient.
        vector = found.vector.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scores_of(model, users, vector, None, "rating").sum(), vector)
        cosine = torch.cosine_similarity(found.vector - start, gradient, dim=-1)
        torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), rtol=0, atol=1e-9)

    def test_an_item_with_the_score_is_itself(self) -> None:
        model = model_of(members=1)
        users, near = torch.tensor([3, 0, 58]), torch.tensor([8, 2, 31])
        vectors = item_vectors(model, model.histories())
        with torch.no_grad():
            wanted = scores_of(model, users, vectors[:, near], near, "rating")[0]
            # An item's vector is the same for all users who have not rated it: so are the scores the model's.
            unseen = ~model.interactions.contains(users, near)
            assert bool(unseen.any())
            torch.testing.assert_close(model(users, near)[unseen], wanted[unseen], rtol=0, atol=1e-10)
        found = items_for_score(model, model.histories(), users, wanted, 5, near=near, exclude_seen=False)
        torch.testing.assert_close(found.vector, vectors[:, near], rtol=0, atol=1e-9)
        for row, item in enumerate(near.tolist()):
            distance = (vectors[0] - vectors[0, item]).norm(dim=-1)
            distance[[item, N_ITEMS - 1]] = torch.inf
            assert found.items[row].tolist() == distance.argsort()[:5].tolist()
            torch.testing.assert_close(found.distance[row], distance.sort().values[:5])

    def test_leaves_out_what_was_seen(self) -> None:
        model = model_of()
        users, near = torch.tensor([3, 0, 58]), torch.tensor([7, 2, 30])
        for given, exclude_seen in itertools.product((None, near), (True, False)):
            found = items_for_score(
                model, model.histories(), users, 4.0, N_ITEMS, near=given, exclude_seen=exclude_seen
            )
            rows, seen = model.interactions.of_users(users)
            for row in range(len(users)):
                left_out = {N_ITEMS - 1}
                if exclude_seen:
                    left_out |= set(seen[rows == row].tolist())
                if given is not None:
                    left_out.add(int(given[row]))
                kept = N_ITEMS - len(left_out)
                items, distance = found.items[row], found.distance[row]
                assert set(items[:kept].tolist()) == set(range(N_ITEMS)) - left_out
                assert bool((distance[:kept].diff() >= 0).all())
                # Places without an item.
                assert bool((items[kept:] == -1).all())
                assert bool(distance[kept:].isinf().all())

    def test_distances_are_over_all_members(self) -> None:
        model = model_of(members=3)
        found = items_for_score(model, model.histories(), torch.tensor([3]), 4.0, 4)
        vectors = item_vectors(model, model.histories())
        for item, distance in zip(found.items[0], found.distance[0], strict=True):
            apart = (vectors[:, item] - found.vector[:, 0]).square().sum().sqrt()
            torch.testing.assert_close(distance, apart)

    def test_a_score_out_of_reach_is_told(self) -> None:
        model = model_of(readout="linear")
        with torch.no_grad():
            cast(Tensor, model.weight).zero_()
        found = items_for_score(model, model.histories(), torch.tensor([3]), 50.0)
        assert bool(found.vector.isfinite().all())
        assert float((found.score - 50.0).abs().min()) > 10

    def test_no_users(self) -> None:
        model = model_of()
        found = items_for_score(model, model.histories(), torch.empty(0, dtype=torch.int64), 4.0, 5)
        assert found.items.shape == (0, 5)

    def test_ordinary_mistakes(self) -> None:
        model = model_of()
        histories, users = model.histories(), torch.tensor([3])
        with pytest.raises(ValueError, match="count=0 must be at least 1"):
            items_for_score(model, histories, users, 4.0, 0)
        for wrong in ([59], [-1], [60]):
            with pytest.raises(ValueError, match=r"users must be int64 \[U\], indices from 0 to 59"):
                items_for_score(model, histories, torch.tensor(wrong), 4.0)
        with pytest.raises(ValueError, match=r"near must be int64 \[U\], indices from 0 to 39 .* got \[39\]"):
            items_for_score(model, histories, users, 4.0, near=torch.tensor([39]))
        with pytest.raises(ValueError, match=r"near must be \[1\] as users is, got \[2\]"):
            items_for_score(model, histories, users, 4.0, near=torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="readout='logit' is unknown"):
            items_for_score(model, histories, users, 4.0, readout="logit")
        with pytest.raises(ValueError, match="gamma=1: this model was trained without the interaction"):
            items_for_score(model, histories, users, 4.0, readout="interaction")
