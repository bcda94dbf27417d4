from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ratings import RatingFileError, from_frame
from lunet_fast.recsys.serving.fold_in import HISTORY_DAMPING, RATING_PRIOR, FoldIn
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.recsys.synthetic import latent_frame, quick_config

QUICK: dict[str, Any] = {
    name: value
    for name, value in quick_config().to_dict().items()
    if name in ("recipe", "members", "embedding_size", "batch_size", "learning_rate")
}
GIVEN = {3: 5.0, 4: 1.0, 8: 4.0, 11: 2.0}


def fitted(frame: pd.DataFrame | None = None, **settings: Any) -> LUNetRecommender:
    known = latent_frame() if frame is None else frame
    return LUNetRecommender(**{**QUICK, "epochs": 4, **settings}).fit(known, scale=(1, 5))


@pytest.fixture(scope="module")
def rating() -> LUNetRecommender:
    return fitted()


@pytest.fixture(scope="module")
def hybrid() -> LUNetRecommender:
    return fitted(gamma=0.4)


class TestFoldIn:
    @pytest.mark.parametrize("method", ["fit", "history"])
    def test_the_trained_model_is_not_changed(self, hybrid: LUNetRecommender, method: str) -> None:
        model = hybrid.trained.model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        counts = model.interactions.item_counts.clone()
        for parameter in model.parameters():
            parameter.grad = None
        hybrid.fold_in(GIVEN, method=method).recommend(5, exclude_seen=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.interactions.item_counts, counts)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert len(hybrid.users) == 60

    @pytest.mark.parametrize("gamma", [0.4, 0.0])
    def test_with_the_vector_of_a_trained_user_it_predicts_like_it(self, gamma: float) -> None:
        recommender = fitted(gamma=gamma)
        trained, frame = recommender.trained, latent_frame()
        user = frame[frame["user"] == 7]
        given = torch.from_numpy(trained.items.index(user["item"]))
        with torch.no_grad():
            fold_in = FoldIn(trained, trained.model.histories())
            ratings = torch.tensor(user["rating"].to_numpy(), dtype=torch.float32)
            alone, histories = fold_in(given, ratings if gamma else None, "history")
            alone.model.user_embedding.weight.copy_(trained.model.user_embedding.weight[7:8])
            if alone.model.user_bias is not None and trained.model.user_bias is not None:
                alone.model.user_bias.copy_(trained.model.user_bias[7:8])
            left = torch.tensor([i for i in range(40) if i not in set(user["item"])])
            zeros, sevens = torch.zeros_like(left), torch.full_like(left, 7)
            reads = [(alone.model.interaction, trained.model.interaction)]
            if gamma:
                reads.append((alone.model, trained.model))
            for one, whole in reads:
                torch.testing.assert_close(one(zeros, left, histories), whole(sevens, left))

    def test_learns_what_the_user_likes(self) -> None:
        """Users taken out of training: nearer to their ratings than the mean of user and item."""
        frame = latent_frame(ratings=1800)
        known, new = frame[frame["user"] < 45], frame[frame["user"] >= 45]
        recommender = fitted(known, epochs=12)
        mean = known["rating"].mean()
        errors: dict[str, list[float]] = {"fit": [], "history": [], "mean": []}
        for _, rows in new.groupby("user"):
            given, test = rows.iloc[:12], rows.iloc[12:]
            for method in ("fit", "history"):
                user = recommender.fold_in(given, method=method)
                errors[method] += list((user.predict(test["item"]) - test["rating"]) ** 2)
            deviation = (given["rating"] - mean).sum() / 22
            errors["mean"] += list(
                (recommender.predict("nobody", test["item"]) + deviation - test["rating"]) ** 2
            )
        mse = {name: float(np.mean(values)) for name, values in errors.items()}
        assert mse["fit"] < 0.9 * mse["mean"], mse
        assert mse["fit"] < mse["history"] < mse["mean"], mse

    def test_history_fits_the_bias_in_closed_form(self) -> None:
        recommender = fitted(members=1, l2_bias=0.0)
        items, values = list(GIVEN), np.array(list(GIVEN.values()), dtype=np.float32)
        user = recommender.fold_in(GIVEN, method="history")
        model = user._alone.trained.model
        assert model.user_bias is not None
        trained = recommender.trained.model.user_bias
        assert trained is not None
        bias, start = model.user_bias.item(), trained.mean().item()
        before = user._alone.trained.model(
            torch.zeros(4, dtype=torch.int64), torch.tensor(items), user._alone._histories
        )
        residual = values - (before.detach().numpy() - (bias - start))
        assert bias - start == pytest.approx(residual.sum() / (4 + RATING_PRIOR), rel=1e-3)

    def test_history_of_a_new_user(self, rating: LUNetRecommender, hybrid: LUNetRecommender) -> None:
        """x_u = mean embedding + normalised sum of the items' vectors, damped with gamma 1."""
        for recommender, damping in ((rating, 3 / (3 + HISTORY_DAMPING)), (hybrid, 1.0)):
            model = recommender.trained.model
            alone = recommender.fold_in([1, 2, 5], method="history")._alone
            histories = alone._histories
            assert histories is not None
            assert model.user_history is not None
            x = alone.trained.model.embed(torch.tensor([0]), torch.tensor([9]), histories, None)
            power = 3**-model.config.history_power
            expected = model.user_embedding.weight.mean(0)
            expected = expected + damping * power * model.user_history.weight[[1, 2, 5]].sum(0)
            torch.testing.assert_close(x[:, 0, :4].flatten(), expected)

    @pytest.mark.parametrize(
        "settings",
        [
            {"gamma": 0.0},
            {"gamma": 0.0, "loss": "bpr", "negative_sampling": "popularity"},
            {"gamma": 0.5, "loss": "huber"},
            {"loss": "ordinal"},
            {"biases": False},
            {"user_history": False, "item_history": False},
            {"readout": "linear", "gamma": 0.5, "item_history": False},
        ],
    )
    def test_any_kind_of_model(self, settings: dict[str, Any]) -> None:
        recommender = fitted(**settings)
        for method in ("fit", "history"):
            user = recommender.fold_in(GIVEN, method=method)
            assert len(user.recommend(4)) == 4
            gamma = recommender.trained.model.config.gamma
            values = user.score(range(40)) if gamma < 1 else user.predict(range(40))
            assert np.isfinite(values).all()
            assert len(np.unique(values)) > 30

    def test_side_features_are_the_mean_users(self) -> None:
        ratings = from_frame(latent_frame(), scale=(1, 5))
        info = pd.DataFrame({"age": [20, 40, 60] * 20, "gender": ["M", "F"] * 30})
        recommender = LUNetRecommender(**QUICK, epochs=2).fit(replace(ratings, user_info=info))
        histories = recommender.trained.model.histories()
        assert histories.user_features is not None
        found = recommender.fold_in(GIVEN)._alone._histories
        assert found is not None
        torch.testing.assert_close(found.user_features, histories.user_features.mean(0, keepdim=True))


class TestGiven:
    def test_forms(self, rating: LUNetRecommender) -> None:
        expected = rating.fold_in(GIVEN).predict(range(40))
        frame = pd.DataFrame({"note": "x", "item": list(GIVEN), "rating": list(GIVEN.values())})
        for given in (frame, {str(item): value for item, value in GIVEN.items()}):
            np.testing.assert_array_equal(rating.fold_in(given).predict(range(40)), expected)
        alone = rating.fold_in(list(GIVEN)).predict(range(40))
        for items in (frame[["item"]], np.array(list(GIVEN)), torch.tensor(list(GIVEN)), [*GIVEN, 3]):
            np.testing.assert_array_equal(rating.fold_in(items).predict(range(40)), alone)
        assert not np.array_equal(alone, expected)

    def test_interactions_alone_take_no_ratings(self) -> None:
        clicks = fitted(gamma=0.0)
        expected = clicks.fold_in(list(GIVEN)).score(range(40))
        np.testing.assert_array_equal(clicks.fold_in(dict.fromkeys(GIVEN, 77)).score(range(40)), expected)

    def test_items_without_ratings_say_nothing(self, hybrid: LUNetRecommender) -> None:
        expected = hybrid.fold_in(GIVEN)
        found = hybrid.fold_in({**GIVEN, "nothing": 5, -4: 1})
        np.testing.assert_array_equal(found.predict(range(40)), expected.predict(range(40)))
        for given in ({}, [], {"nothing": 4}, pd.DataFrame({"item": [], "rating": []})):
            nobody = hybrid.fold_in(given)
            items = [*range(40), "nothing"]
            np.testing.assert_array_equal(nobody.predict(items), hybrid.predict("nobody", items))
            np.testing.assert_array_equal(nobody.score(items), hybrid.score("nobody", items))
            top = hybrid.recommend("nobody", 5).drop(columns="user")
            pd.testing.assert_frame_equal(nobody.recommend(5), top)

    def test_a_user_of_every_item(self, hybrid: LUNetRecommender) -> None:
        user = hybrid.fold_in(list(range(40)))
        assert len(user.recommend(5)) == 0
        assert len(user.recommend(5, exclude_seen=False)) == 5

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({3: 6}, "'6' is outside the scale 1 to 5"),
            ({3: "good"}, "good"),
            ({3: float("nan")}, "row 1: rating is missing"),
            ({3: 4, "3": 4}, "3"),
            (pd.DataFrame({"film": [3]}), "no column 'item', only film"),
            (pd.DataFrame({"user": [1, 2], "item": [3, 4]}), "ratings are of 2 users"),
        ],
    )
    def test_wrong_ones_are_named(self, rating: LUNetRecommender, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            rating.fold_in(given)
        assert isinstance(error.value, RatingFileError) or "ratings" in str(error.value)

    def test_series_and_rows_mean_what_they_say(self, rating: LUNetRecommender) -> None:
        expected = rating.fold_in(GIVEN).predict(range(40))
        series = pd.Series(list(GIVEN.values()), index=list(GIVEN))
        for given in (series, list(GIVEN.items()), np.array(list(GIVEN.items()))):
            np.testing.assert_array_equal(rating.fold_in(given).predict(range(40)), expected)
        with pytest.raises(TypeError, match="ratings is a str"):
            rating.fold_in("film-3")

    def test_unknown_method(self, rating: LUNetRecommender) -> None:
        with pytest.raises(ValueError, match="method='magic' is unknown: choose one of fit, history"):
            rating.fold_in(GIVEN, method="magic")


class TestFoldedUser:
    def test_recommend_is_the_order_of_what_is_predicted(
        self, rating: LUNetRecommender, hybrid: LUNetRecommender
    ) -> None:
        for recommender in (rating, hybrid):
            user = recommender.fold_in(GIVEN)
            read = user.predict if recommender is rating else user.score
            for exclude_seen in (True, False):
                left = [item for item in range(40) if not (exclude_seen and item in GIVEN)]
                values = read(left)
                found = user.recommend(6, exclude_seen=exclude_seen)
                assert list(found.columns) == ["rank", "item", "score"]
                assert found["rank"].tolist() == [1, 2, 3, 4, 5, 6]
                best = np.sort(values)[::-1][:6]
                np.testing.assert_allclose(found["score"], best, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(read(found["item"]), found["score"], rtol=1e-4, atol=1e-4)
        chosen = rating.fold_in(GIVEN).recommend(3, items=[5, 6, "new", 3])
        assert sorted(map(str, chosen["item"])) == ["5", "6", "new"]

    def test_is_deterministic_and_moves_no_generator(self, hybrid: LUNetRecommender) -> None:
        state = torch.random.get_rng_state()
        first, second = hybrid.fold_in(GIVEN), hybrid.fold_in(GIVEN)
        assert torch.equal(torch.random.get_rng_state(), state)
        np.testing.assert_array_equal(first.score(range(40)), second.score(range(40)))
        with torch.no_grad():
            np.testing.assert_array_equal(hybrid.fold_in(GIVEN).score(range(40)), first.score(range(40)))

    def test_errors_and_text(self, rating: LUNetRecommender) -> None:
        user = rating.fold_in(GIVEN)
        assert repr(user) == "FoldedUser(4 of 40 items)"
        with pytest.raises(ValueError, match="trained with gamma=1"):
            user.score([3])
        with pytest.raises(ValueError, match="k=0 must be a whole number"):
            user.recommend(0)
        assert user.predict("nothing").shape == (1,)
