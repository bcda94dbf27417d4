from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lunet_fast
from lunet_fast.recsys.data.ratings import from_frame
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from lunet_fast.training.files import CheckpointError
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

QUICK: dict[str, Any] = {
    name: value
    for name, value in quick_config().to_dict().items()
    if name
    in ("recipe", "members", "embedding_size", "item_history", "epochs", "batch_size", "learning_rate")
}


@pytest.fixture(scope="module")
def fitted() -> LUNetRecommender:
    """Users 0 to 59, items 0 to 39, ratings from 1 to 5."""
    return LUNetRecommender(**QUICK).fit(latent_frame(), scale=(1, 5))


def test_is_a_public_name() -> None:
    assert lunet_fast.LUNetRecommender is LUNetRecommender


class TestFit:
    def test_reads_a_file_as_it_is_told(self, fitted: LUNetRecommender, tmp_path: Path) -> None:
        frame = latent_frame()
        later = pd.concat([frame.iloc[:9].assign(rating=1.0), frame])
        file = tmp_path / "r.dat"
        later.to_csv(file, sep="|", header=False, index=False)
        with pytest.raises(ValueError, match="duplicates='latest'"):
            LUNetRecommender(**QUICK).fit(file, header=False)
        read = LUNetRecommender(**QUICK).fit(file, header=False, sep="pipe", duplicates="latest")
        expected = fitted.predict(frame["user"], frame["item"])
        np.testing.assert_array_equal(read.predict(frame["user"], frame["item"]), expected)
        again = LUNetRecommender(**QUICK).fit(later, duplicates="latest", sep="pipe")
        np.testing.assert_array_equal(again.predict(frame["user"], frame["item"]), expected)

    def test_takes_a_frame_a_file_and_a_table(self, fitted: LUNetRecommender, tmp_path: Path) -> None:
        frame = latent_frame()
        expected = fitted.predict(frame["user"], frame["item"])
        frame.to_csv(tmp_path / "r.csv", index=False)
        renamed = frame.rename(columns={"user": "u", "item": "i", "rating": "r"})
        columns: dict[str, Any] = {"user": "u", "item": "i", "rating": "r"}
        for recommender in (
            LUNetRecommender(**QUICK).fit(tmp_path / "r.csv"),
            LUNetRecommender(**QUICK).fit(str(tmp_path / "r.csv"), scale=(1, 5)),
            LUNetRecommender(**QUICK).fit(renamed, **columns),
            LUNetRecommender(**QUICK).fit(latent_ratings()),
        ):
            np.testing.assert_array_equal(recommender.predict(frame["user"], frame["item"]), expected)

    def test_learns_what_it_was_shown(self, fitted: LUNetRecommender) -> None:
        frame = latent_frame()
        error = fitted.predict(frame["user"], frame["item"]) - frame["rating"].to_numpy()
        assert float(np.mean(error**2)) < 0.6 * float(frame["rating"].var())

    def test_wrong_settings_are_told_before_the_data_are_read(self) -> None:
        with pytest.raises(ValueError, match="unknown setting 'epoch'"):
            LUNetRecommender(epoch=3)
        with pytest.raises(ValueError, match="recipe='great' is unknown"):
            LUNetRecommender("great")


@pytest.fixture(scope="module")
def hybrid() -> LUNetRecommender:
    return LUNetRecommender(**QUICK, gamma=0.3).fit(latent_frame(), scale=(1, 5))


class TestInteractions:
    def test_score_is_the_logit_of_the_pair(self, hybrid: LUNetRecommender) -> None:
        users, items = torch.tensor([3, 7, 7]), torch.tensor([1, 2, 3])
        with torch.no_grad():
            expected = hybrid.trained.model.interaction(users, items).numpy()
        np.testing.assert_array_equal(hybrid.score([3, 7, 7], [1, 2, 3]), expected)
        np.testing.assert_array_equal(hybrid.score("7", [2, 3]), expected[1:])
        assert hybrid.score([], []).shape == (0,)

    def test_unseen_ids_score_as_popular_as_the_item_is(self, hybrid: LUNetRecommender) -> None:
        counts = latent_frame()["item"].value_counts()
        n = int(counts[5])
        expected = [np.log((n + 1) / (60 - n + 1)), np.log(1 / 61)]
        np.testing.assert_allclose(hybrid.score(["nobody", 3], [5, "nothing"]), expected, rtol=1e-5)

    @pytest.mark.parametrize("exclude_seen", [True, False])
    def test_recommend_is_the_order_of_score(self, hybrid: LUNetRecommender, exclude_seen: bool) -> None:
        frame = latent_frame()
        found = hybrid.recommend([4, "nobody", 9], k=5, exclude_seen=exclude_seen)
        for user, rows in found.groupby("user"):
            seen = set(frame.loc[frame["user"] == user, "item"]) if exclude_seen else set()
            left = [item for item in range(40) if item not in seen]
            scores = hybrid.score(user, left)
            best = np.argsort(-scores, kind="stable")[:5]
            assert rows["item"].tolist() == [left[b] for b in best]
            np.testing.assert_allclose(rows["score"], scores[best], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(rows["score"], hybrid.score(user, rows["item"]), rtol=1e-5, atol=1e-5)

    def test_what_was_not_trained_is_refused(self, fitted: LUNetRecommender) -> None:
        with pytest.raises(ValueError, match="trained with gamma=1"):
            fitted.score([3], [1])
        clicks = LUNetRecommender(**QUICK, gamma=0.0).fit(latent_frame()[["user", "item"]], rating=None)
        assert len(clicks.recommend(3, k=4)) == 4
        with pytest.raises(ValueError, match="trained with gamma=0"):
            clicks.predict([3], [1])

    def test_survives_saving(self, hybrid: LUNetRecommender, tmp_path: Path) -> None:
        hybrid.save(tmp_path)
        loaded = LUNetRecommender.load(tmp_path)
        np.testing.assert_array_equal(loaded.score([3, 7], [1, 2]), hybrid.score([3, 7], [1, 2]))

    @pytest.mark.parametrize("gamma", [1.0, 0.5])
    def test_ordinal_ratings_are_within_the_scale_and_survive_saving(
        self, gamma: float, tmp_path: Path
    ) -> None:
        frame = latent_frame()
        model = LUNetRecommender(**QUICK, gamma=gamma, loss="ordinal").fit(frame)
        prediction = model.predict(frame["user"], frame["item"])
        assert 1 < prediction.min() < prediction.max() < 5
        assert np.mean((prediction - frame["rating"]) ** 2) < 0.8 * frame["rating"].var()
        model.save(tmp_path)
        loaded = LUNetRecommender.load(tmp_path)
        np.testing.assert_array_equal(loaded.predict(frame["user"], frame["item"]), prediction)
        if gamma == 1:
            found = loaded.recommend([3, 8], k=5)
            np.testing.assert_allclose(
                found["score"], loaded.predict(found["user"], found["item"]), rtol=1e-5
            )


class TestLeavesOut:
    """What the user's whole file holds, not the training part alone."""

    @pytest.mark.parametrize(
        ("split", "gamma"), [("random", 1.0), ("joint", 0.5), ("leave-one-out", 0.0), ("none", 1.0)]
    )
    def test_every_pair_of_the_file(self, split: str, gamma: float, tmp_path: Path) -> None:
        """Users 60 and 61 have a rating each, and item 40 and 41 too: some are in the tested part alone."""
        more = pd.DataFrame({"user": [60, 61, 5, 6], "item": [3, 41, 40, 41], "rating": [4, 2, 5, 1]})
        frame = pd.concat([latent_frame(), more])
        ratings = from_frame(frame, scale=(1, 5))
        train(ratings, quick_config(mlp=False, epochs=1, split=split, gamma=gamma), out=tmp_path / "run")
        loaded = LUNetRecommender.load(tmp_path / "run")
        rated = set(zip(frame["user"], frame["item"], strict=True))
        for k in (5, 42):
            found = loaded.recommend([*range(62), "nobody"], k=k)
            pairs = list(zip(found["user"], found["item"], strict=True))
            assert not rated & set(pairs)
            assert len(set(pairs)) == len(pairs)
            left = 42 - frame["user"].value_counts()
            expected = {user: min(k, left[user]) for user in range(62) if left[user]} | {"nobody": k}
            assert found["user"].value_counts().to_dict() == expected
        again = loaded.recommend([3, 60], k=42, exclude_seen=False)
        assert len(again) == 84

    def test_two_files(self, tmp_path: Path) -> None:
        ratings = latent_ratings()
        rows = torch.arange(len(ratings))
        parts = ratings.select(rows[rows % 3 > 0]), ratings.select(rows[rows % 3 == 0])
        train(parts[0], quick_config(mlp=False, epochs=1), test=parts[1], out=tmp_path / "run")
        found = LUNetRecommender.load(tmp_path / "run").recommend(range(60), k=40)
        assert len(found) == 60 * 40 - len(ratings)

    def test_what_it_is_told_to(self, hybrid: LUNetRecommender) -> None:
        first = hybrid.recommend([4, "nobody"], k=3)
        fewer = hybrid.recommend([4, "nobody"], k=40, exclude=[*first["item"], "unknown"])
        assert not set(fewer["item"]) & set(first["item"])
        some = hybrid.recommend("nobody", items=[1, 2, 3], exclude=[2])
        assert sorted(some["item"]) == [1, 3]
        new = hybrid.recommend("nobody", items=[1, "old", "new"], exclude=["old"])
        assert new["item"].tolist() == [1, "new"]

    def test_items_that_a_new_user_gives_and_training_has_none_of(self, tmp_path: Path) -> None:
        frame = pd.concat([latent_frame(), pd.DataFrame({"user": [5], "item": [40], "rating": [5]})])
        ratings = from_frame(frame, scale=(1, 5))
        training, rest = torch.where(ratings.item < 40)[0], torch.where(ratings.item == 40)[0]
        config = quick_config(mlp=False, epochs=1)
        train(ratings.select(training), config, test=ratings.select(rest), out=tmp_path / "run")
        user = LUNetRecommender.load(tmp_path / "run").fold_in({40: 5.0, 3: 4.0})
        assert sorted(user.recommend(41)["item"]) == [item for item in range(40) if item != 3]

    def test_no_more_memory_than_there_are_items(self, hybrid: LUNetRecommender) -> None:
        assert len(hybrid.recommend(range(60), k=10**9)) == 60 * 40 - 1200


class TestPredict:
    def test_in_the_ids_of_the_file(self) -> None:
        frame = latent_frame(text_ids=True)
        by_text = LUNetRecommender(**QUICK).fit(frame)
        ids = frame[["user", "item"]].head(50)
        indices = by_text.users.index(ids["user"]), by_text.items.index(ids["item"])
        model = by_text.trained.model
        expected = model(*(torch.from_numpy(side) for side in indices)).clamp(1, 5).detach().numpy()
        np.testing.assert_array_equal(by_text.predict(ids["user"], ids["item"]), expected)

    def test_accepts_what_people_pass(self, fitted: LUNetRecommender) -> None:
        expected = fitted.predict([3, 7], [1, 2])
        assert expected.dtype == np.float32
        assert expected.shape == (2,)
        for users, items in (
            (np.array([3, 7]), np.array([1, 2], dtype=np.int32)),
            (torch.tensor([3, 7]), torch.tensor([1, 2])),
            (["3", "7"], ["1", "2"]),
            ((3, "7"), (1, 2)),
        ):
            np.testing.assert_array_equal(fitted.predict(users, items), expected)

    def test_one_id_goes_with_each_of_the_others(self, fitted: LUNetRecommender) -> None:
        np.testing.assert_array_equal(fitted.predict(3, [1, 2, 5]), fitted.predict([3, 3, 3], [1, 2, 5]))
        np.testing.assert_array_equal(fitted.predict([3, 4], 5), fitted.predict([3, 4], [5, 5]))
        assert fitted.predict(3, 5).shape == (1,)
        assert fitted.predict([], []).shape == (0,)
        with pytest.raises(ValueError, match="users has 2 ids and items 3"):
            fitted.predict([1, 2], [1, 2, 3])

    def test_stays_within_the_scale(self) -> None:
        frame = latent_frame()
        narrow = LUNetRecommender(**{**QUICK, "epochs": 20, "l2_latent": 0.0}).fit(frame)
        predictions = narrow.predict(np.repeat(np.arange(60), 40), np.tile(np.arange(40), 60))
        assert predictions.min() == 1.0
        assert predictions.max() == 5.0

    def test_unseen_ids_fall_back_on_what_is_known(self, fitted: LUNetRecommender) -> None:
        frame = latent_frame()
        mean = frame["rating"].mean()
        rows = frame[frame["item"] == 4]["rating"]
        item_4 = (rows - mean).sum() / (len(rows) + 10)
        rows = frame[frame["user"] == 9]["rating"]
        user_9 = (rows - mean).sum() / (len(rows) + 10)
        predictions = fitted.predict([10**12, "nobody", 9, 9], ["nothing", 4, -3, 4])
        np.testing.assert_allclose(predictions[:3], [mean, mean + item_4, mean + user_9], rtol=1e-5)
        np.testing.assert_allclose(predictions[3:], fitted.predict(9, 4), rtol=1e-6)

    def test_does_not_depend_on_the_order_or_size_of_the_batch(self, fitted: LUNetRecommender) -> None:
        users, items = np.repeat(np.arange(60), 40), np.tile(np.arange(40), 60)
        order = np.random.default_rng(0).permutation(2400)
        many = np.tile(order, 5)  # more than one pass
        all_at_once = fitted.predict(users[many], items[many])
        np.testing.assert_allclose(all_at_once, fitted.predict(users, items)[many], rtol=0, atol=2e-6)

    def test_before_fit(self) -> None:
        with pytest.raises(RuntimeError, match="not trained yet"):
            LUNetRecommender().predict([1], [1])


class TestFiles:
    def test_save_and_load(self, fitted: LUNetRecommender, tmp_path: Path) -> None:
        fitted.save(tmp_path / "a" / "b")
        assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {
            "config.json",
            "model.safetensors",
        }
        loaded = LUNetRecommender.load(tmp_path / "a" / "b")
        users, items = np.repeat(np.arange(-1, 60), 40), np.tile(np.arange(40), 61)
        np.testing.assert_array_equal(loaded.predict(users, items), fitted.predict(users, items))
        assert (loaded.users, loaded.items) == (fitted.users, fitted.items)

    def test_a_loaded_one_can_be_fitted_again(self, fitted: LUNetRecommender, tmp_path: Path) -> None:
        fitted.save(tmp_path)
        loaded = LUNetRecommender.load(tmp_path)
        np.testing.assert_array_equal(
            loaded.fit(latent_frame(), scale=(1, 5)).predict([1, 2], [3, 4]), fitted.predict([1, 2], [3, 4])
        )

    def test_loads_a_run_folder(self, tmp_path: Path) -> None:
        ratings = latent_ratings()
        result = train(ratings, quick_config(mlp=False), out=tmp_path / "run")
        loaded = LUNetRecommender.load(tmp_path / "run")
        expected = result.trained.model(ratings.user, ratings.item).clamp(1, 5).detach().numpy()
        users, items = ratings.users.ids[ratings.user], ratings.items.ids[ratings.item]
        np.testing.assert_array_equal(loaded.predict(users, items), expected)

    def test_nothing_to_load(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
            LUNetRecommender.load(tmp_path)
        (tmp_path / "model.safetensors").write_text("not a model")
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            LUNetRecommender.load(tmp_path)

    def test_nothing_to_save(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="not trained yet"):
            LUNetRecommender().save(tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_repr() -> None:
    assert repr(LUNetRecommender(seed=3)) == "LUNetRecommender(recipe='auto', seed=3, not trained)"
