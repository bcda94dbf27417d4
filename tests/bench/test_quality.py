"""Time to a test error: ours, peers on the same part, and packages that are not there."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict

import pytest
import torch

from lunet_fast.bench import quality
from lunet_fast.bench.quality import Peer, Timed, compare, first_reached
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.evaluation.peer_settings import settings_for
from tests.recsys.synthetic import latent_ratings, quick_config


class TestTimeToQuality:
    def test_ours(self) -> None:
        config = quick_config(mlp=False)
        (found,) = compare(latent_ratings(), config, [], threads=[1])
        assert (found.dataset, found.method, found.threads) == ("latent", quality.OURS_BEST, 1)
        assert len(found.curve) == config.epochs
        assert found.curve[-1] == (found.seconds, found.test_mse)
        assert [seconds for seconds, _ in found.curve] == sorted(seconds for seconds, _ in found.curve)
        assert found.curve[0][0] > 0
        assert json.loads(json.dumps(asdict(found)))["test_mse"] == found.test_mse

    def test_a_peer_is_measured_on_the_same_test_part(self) -> None:
        ratings = latent_ratings()
        mean = ratings.rating.mean()

        def fit(training_part: Ratings, test: Ratings, seed: int, threads: int) -> Timed:
            assert torch.equal(test.rating, ratings.select(random_split(ratings, 0).test).rating)
            return Timed(2.5, mean.expand(len(test)))

        def absent(*_: object) -> Timed:
            raise quality.Unavailable("not here")

        against = [Peer("mean", "none", [1, 7], fit), Peer("absent", "none", [1], absent)]
        heard: list[quality.Quality] = []
        found = compare(ratings, quick_config(mlp=False), against, threads=[1], told=heard.append)
        assert heard == found
        ours, peer, other_threads, missing = found
        test = ratings.select(random_split(ratings, 0).test)
        assert peer.test_mse == pytest.approx((test.rating - mean).square().mean().item())
        assert peer.seconds == 2.5
        assert peer.ours_seconds == first_reached(ours.curve, peer.test_mse or 0.0)
        assert other_threads.ours_seconds is None  # ours was not trained with as many
        assert missing.missing == "not here"
        assert missing.seconds is missing.test_mse is None
        assert quality.line(missing) == "latent, absent, 1 thread: missing, not here"

    def test_first_reached(self) -> None:
        curve = [(1.0, 0.9), (2.0, 0.8), (3.0, 0.85)]
        assert first_reached(curve, 0.8) == 2.0
        assert first_reached(curve, 0.95) == 1.0
        assert first_reached(curve, 0.7) is None

    def test_no_threads_are_refused(self) -> None:
        for threads in ([], [1, 0]):
            with pytest.raises(ValueError, match="threads must be one or more numbers of at least 1, got"):
                compare(latent_ratings(), quick_config(), [], threads=threads)

    def test_a_package_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(name: str) -> None:
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(importlib, "import_module", fail)
        part = latent_ratings()
        with pytest.raises(quality.Unavailable, match="needs cornac, which cannot be imported.*pip install"):
            quality.fit_cornac(part, part, 0, 1)

    def test_cornac(self) -> None:
        pytest.importorskip("cornac")
        self.learns(lambda a, b: quality.fit_cornac(a, b, 0, 1))

    @pytest.mark.parametrize("key", ["bayesian-fm", "bayesian-svd++"])
    def test_myfm(self, key: str) -> None:
        if importlib.util.find_spec("myfm") is None:  # importorskip would meet its import of pkg_resources
            pytest.skip("could not import 'myfm'")
        self.learns(lambda a, b: quality.fit_myfm(key, a, b, 0))

    @staticmethod
    def learns(fit: object) -> None:
        """Better than the mean, also where a user and an item have no training row."""
        ratings = latent_ratings()
        split = random_split(ratings, 0)
        train_rows = split.train[(ratings.user[split.train] != 3) & (ratings.item[split.train] != 5)]
        training_part, test = ratings.select(train_rows), ratings.select(split.test)
        fitted = fit(training_part, test)  # type: ignore[operator]
        assert fitted.seconds > 0
        assert fitted.prediction.shape == test.rating.shape
        error = (fitted.prediction - test.rating).square().mean().item()
        assert error < 0.7 * test.rating.var().item()


def test_peers_have_the_settings_of_the_nearest_data() -> None:
    small, large = (quality.peers(count)[0].settings for count in (100_000, 1_000_209))
    assert small.startswith(f"k = {settings_for('mf', 'ml-100k')['factors']}, rate ")
    assert large == "k = 200, rate 0.01, L2 0.05, 30 epochs"
    assert [len(peer.threads) for peer in quality.peers(100_000)] == [2, 1, 1]
