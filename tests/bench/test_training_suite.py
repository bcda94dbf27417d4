from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lunet_fast.bench import training
from lunet_fast.bench.contest import CheckFailed, Contest, Spec, compete
from lunet_fast.bench.machine import Rates
from lunet_fast.bench.training import OURS, Peer, Problem, Way, build, compare, draw, first_reached
from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.data.splits import random_split
from lunet_fast.recsys.model.config import TrainConfig, recipe
from tests.recsys.synthetic import latent_ratings, quick_config

CPU = torch.device("cpu")
SPEC = Spec(training.SUITE, training.STEP, 8, 32, "recipe paper")


def tiny(name: str, **changes: object) -> TrainConfig:
    return recipe(name, 100_000, embedding_size=4, mlp_embedding_size=4, mlp_hidden=(8, 6), **changes)


def contest(config: TrainConfig, **more: object) -> Contest:
    return build(SPEC, CPU, config=config, ratings=draw(30, 40, 300), **more)  # type: ignore[arg-type]


class TestSpecs:
    def test_the_recipes_and_batches(self) -> None:
        assert [str(spec) for spec in training.specs("quick")] == [
            "training step, D = 32, B = 128, recipe paper",
            "training step, D = 32, B = 4096, recipe paper",
        ]
        assert training.specs("all")[:2] == training.specs("quick")
        assert {spec.detail for spec in training.specs("all")} == {"recipe paper", "recipe best"}

    def test_contests_run_on_the_threads_of_the_trainer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "RATINGS", 500)
        monkeypatch.setattr(training, "SHAPE", (30, 40))
        monkeypatch.setattr(training, "ROWS", (16,))
        monkeypatch.setattr(torch, "set_num_threads", heard := [].append)  # type: ignore[attr-defined]
        before = torch.get_num_threads()
        given = training.contests(training.specs("quick"), "quick", CPU, torch.float32)
        assert str(next(given).spec) == "training step, D = 32, B = 16, recipe paper"
        assert heard.__self__ == [1]
        assert next(given, None) is None
        assert heard.__self__ == [1, before]


class TestDraw:
    def test_distinct_pairs_by_the_seed(self) -> None:
        drawn = draw(5, 7, 35)
        assert len({*zip(drawn.user.tolist(), drawn.item.tolist(), strict=True)}) == 35
        assert set(drawn.rating.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
        assert torch.equal(drawn.rating, draw(5, 7, 35).rating)
        assert not torch.equal(drawn.rating, draw(5, 7, 35, seed=1).rating)

    @pytest.mark.parametrize("count", [0, 36])
    def test_no_more_than_there_are(self, count: int) -> None:
        with pytest.raises(ValueError, match=f"count must be from 1 to 35, the number of pairs, got {count}"):
            draw(5, 7, count)


class TestStep:
    @pytest.mark.parametrize(
        "config",
        [
            tiny("paper"),
            tiny("paper", layers=1, dropout=0.0),
            tiny("best", members=3),
            tiny("best", members=2, layers=3, dropout=0.2),
        ],
        ids=["paper", "affine", "best", "deep"],
    )
    def test_each_way_is_its_model_in_float64(self, config: TrainConfig) -> None:
        found = contest(config)
        found.check()
        assert OURS in found.runs
        assert "nn.Linear MLP" in found.runs
        assert found.runs.keys() == found.errors.keys() == found.parameters.keys()
        assert max(found.errors.values()) < 3e-6
        # L U has as many parameters as a dense matrix, so the two models are of one size.
        assert found.parameters[OURS] == found.parameters["nn.Linear MLP"]

    def test_the_control_takes_part_in_recipe_paper(self) -> None:
        control = "MLP control of table 2"
        assert control in contest(tiny("paper")).runs
        found = contest(tiny("best"))
        assert control not in found.runs
        assert "recipe paper" in found.missing[control]

    def test_a_step_trains(self) -> None:
        problem = Problem.of(tiny("paper", dropout=0.0), draw(30, 40, 300), CPU)
        ways: list[Way] = []

        def kept(problem: Problem) -> Way:
            ways.append(training.CONTENDERS[OURS](problem))
            return ways[0]

        run = build(SPEC, CPU, config=problem.config, ratings=problem.ratings, contenders={OURS: kept}).runs[
            OURS
        ]
        generator = torch.Generator()
        losses = []
        for _ in range(2):
            losses.append(ways[0].objective(problem.all, generator)[0].item())
            for _ in range(300):
                run()
        assert losses[1] < 0.9 * losses[0]

    def test_a_wrong_way_is_not_timed(self) -> None:
        def wrong(problem: Problem) -> Way:
            way = training.CONTENDERS[OURS](problem)

            def objective(batch: training.Batch, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
                loss, error = way.objective(batch, g)
                return 1.001 * loss, error

            return replace(way, objective=objective)

        found = contest(tiny("paper"), contenders={OURS: training.CONTENDERS[OURS], "wrong": wrong})
        with pytest.raises(CheckFailed, match=r"wrong has relative error 0\.001"):
            found.check()

    def test_a_compiler_that_fails_is_missing_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(function: object, **options: object) -> object:
            def call(*args: object) -> object:
                raise RuntimeError("no compiler\nand more")

            return call

        monkeypatch.setattr(torch, "compile", failing)
        found = contest(tiny("paper"), contenders={training.COMPILED: training._compiled})
        assert found.missing == {training.COMPILED: "torch.compile failed: RuntimeError: no compiler"}
        assert found.runs == {}

    def test_rows_are_kept(self) -> None:
        rows = compete(contest(tiny("paper")), 0.01, Rates(1e12, 1e12), CPU, memory=False)
        ours = next(row for row in rows if row.ours)
        assert ours.parameters is not None
        assert ours.floor > 0
        assert training.samples_per_second(ours) == pytest.approx(32 / ours.median)

    def test_other_precision_and_too_few_ratings_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"dtype must be torch.float32, .* got torch.bfloat16"):
            build(SPEC, CPU, torch.bfloat16)
        with pytest.raises(ValueError, match="ratings must be at least one batch, 32, got 20"):
            build(SPEC, CPU, config=tiny("paper"), ratings=draw(10, 10, 20))


class TestTimeToQuality:
    def test_ours(self) -> None:
        config = quick_config(mlp=False)
        (found,) = compare(latent_ratings(), config, [], threads=[1])
        assert (found.dataset, found.method, found.threads) == ("latent", training.OURS_BEST, 1)
        assert len(found.curve) == config.epochs
        assert found.curve[-1] == (found.seconds, found.test_mse)
        assert [seconds for seconds, _ in found.curve] == sorted(seconds for seconds, _ in found.curve)
        assert found.curve[0][0] > 0
        assert json.loads(json.dumps(asdict(found)))["test_mse"] == found.test_mse

    def test_a_peer_is_measured_on_the_same_test_part(self) -> None:
        ratings = latent_ratings()
        mean = ratings.rating.mean()

        def fit(training_part: Ratings, test: Ratings, seed: int, threads: int) -> training.Fitted:
            assert torch.equal(test.rating, ratings.select(random_split(ratings, 0).test).rating)
            return training.Fitted(2.5, mean.expand(len(test)))

        def absent(*_: object) -> training.Fitted:
            raise training.Unavailable("not here")

        against = [Peer("mean", "none", [1, 7], fit), Peer("absent", "none", [1], absent)]
        heard: list[training.Quality] = []
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
        assert training.line(missing) == "latent, absent, 1 thread: missing, not here"

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
        with pytest.raises(training.Unavailable, match="needs cornac, which cannot be imported.*pip install"):
            training.fit_cornac(part, part, 0, 1)

    def test_cornac(self) -> None:
        pytest.importorskip("cornac")
        self.learns(lambda a, b: training.fit_cornac(a, b, 0, 1))

    @pytest.mark.parametrize("implicit", [False, True])
    def test_myfm(self, implicit: bool) -> None:
        if importlib.util.find_spec("myfm") is None:  # importorskip would meet its import of pkg_resources
            pytest.skip("could not import 'myfm'")
        self.learns(lambda a, b: training.fit_myfm(a, b, 0, implicit=implicit))

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

    def test_the_command_writes_json(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(training, "load", lambda name, data_dir: latent_ratings())
        monkeypatch.setattr(training, "peers", lambda n_ratings, threads: [])
        file = tmp_path / "quality.json"
        training.main(["--threads", "1", "--out", str(file)])
        content = json.loads(file.read_text())
        assert content.keys() == {"machine", "versions", "trainings"}
        assert content["trainings"][0]["method"] == training.OURS_BEST
        assert "latent, LU-Net, recipe best, 1 thread: " in capsys.readouterr().err


def test_peers_have_the_settings_of_the_nearest_data() -> None:
    small, large = (training.peers(count)[0].settings for count in (100_000, 1_000_209))
    assert small == "k = 100, rate 0.005, L2 0.08, 100 epochs"
    assert large == "k = 200, rate 0.01, L2 0.05, 30 epochs"
    assert [len(peer.threads) for peer in training.peers(100_000)] == [2, 1, 1]
