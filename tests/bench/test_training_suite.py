from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lunet_fast.bench import training
from lunet_fast.bench.contest import CheckFailed, Contest, Spec, compete
from lunet_fast.bench.machine import Rates
from lunet_fast.bench.training import OURS, Problem, Way, build, draw
from lunet_fast.recsys.model.config import TrainConfig, recipe

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
