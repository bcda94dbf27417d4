from __future__ import annotations

import csv
import io
import json
import math
import os
import pickle
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lunet_fast.recsys.data.ratings import Ratings
from lunet_fast.recsys.evaluation import compare as module
from lunet_fast.recsys.evaluation.baselines import BASELINES
from lunet_fast.recsys.evaluation.compare import (
    FIGURES,
    METHODS,
    RANKING_FIGURES,
    RATING_FIGURES,
    compare,
    measure,
)
from lunet_fast.recsys.evaluation.comparison import csv_text, difference_table, draw, markdown, save
from lunet_fast.recsys.measures.protocols import Parts, evaluate_ranking
from lunet_fast.recsys.model.config import TrainConfig, recipe
from lunet_fast.recsys.model.sequence_config import settings_of
from lunet_fast.recsys.model.sequence_training import train_sequence
from lunet_fast.recsys.model.training import train
from tests.recsys.synthetic import cyclic_ratings, latent_ratings, paused_ratings, quick_config

RATINGS = latent_ratings()
QUICK = quick_config().to_dict()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Methods are measured in this process, ours with small settings; what was measured, in order."""
    calls: list[tuple[str, int]] = []

    def in_this_process(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
        calls.append((key, seed))
        return measure(pickle.loads(data.read_bytes()), key, seed, split, device)

    def small(name: str, n_ratings: int, **overrides: Any) -> Any:
        names = {"members", "embedding_size", "epochs", "batch_size"}
        if name == "sequence":
            names -= {"members", "batch_size"}
        return settings_of(name, n_ratings, **({n: QUICK[n] for n in names} | overrides))

    monkeypatch.setattr(module, "_in_a_process", in_this_process)
    monkeypatch.setattr(module, "settings_of", small)
    monkeypatch.setattr(module, "chosen", dict)
    return calls


def child(ending: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Has the process of a method run ``ending`` instead."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        run = module.subprocess.run
        monkeypatch.setattr(
            module.subprocess,
            "run",
            lambda command, **more: run([sys.executable, "-c", ending], **more),
        )

    return patch


class TestMethods:
    def test_every_baseline_and_ours(self) -> None:
        assert [key for key in METHODS if not METHODS[key].is_lu_net] == list(BASELINES)
        ours = {key: m.name for key, m in METHODS.items() if m.is_lu_net}
        assert ours["lunet-ratings"] == "LU-Net, ratings (gamma 1)"
        assert ours["lunet-interactions"] == "LU-Net, interactions (gamma 0)"
        assert ours["lunet-both"] == "LU-Net, both (gamma 0.1)"
        assert [METHODS[key].kind for key in ours] == [
            *("rating",) * 7,
            *("ranking", "ranking", "both"),
            *("ranking",) * 4,
        ]

    @pytest.mark.parametrize("key", [key for key in METHODS if METHODS[key].is_lu_net])
    def test_nobody_is_told_of_held_out_pairs(self, key: str) -> None:
        config = METHODS[key].config(100_000, 3)
        assert config.seed == 3
        if isinstance(config, TrainConfig):
            assert (config.negatives_outside == "known") == (key == module.LEAKY)
            assert not config.mlp
        else:  # whose negatives are drawn from all items
            assert key in module.ORDERED

    def test_settings_of_ours(self) -> None:
        assert METHODS["lunet-paper"].config(100_000, 0).recipe == "paper"
        both = METHODS["lunet-both"].config(1_000_209, 0)
        assert both == recipe("best", 1_000_209, gamma=0.1, mlp=False, negatives_outside="training")
        splits = {key: METHODS[key].config(1000, 0).split for key in METHODS if METHODS[key].is_lu_net}
        assert splits == {
            "lunet-paper": "random",
            "lunet-ratings": "random",
            "lunet-ratings-identity": "random",
            "lunet-ratings-one": "random",
            "lunet-sampled": "random",
            "lunet-sampled-ids": "random",
            "lunet-ids": "random",
            "lunet-interactions": "leave-one-out",
            "lunet-interactions-one": "leave-one-out",
            "lunet-both": "joint",
            "lunet-leaky": "leave-one-out",
            "lunet-sequence": "leave-one-out",
            "lunet-sequence-identity": "leave-one-out",
            "lunet-sequence-elapsed": "leave-one-out",
        }
        assert METHODS["lunet-sequence-elapsed"].config(1000, 0, "time").split == "time"
        assert METHODS["lunet-both"].config(1000, 0, "time").split == "joint"


class TestMeasure:
    def test_what_reads_the_order(self, here: list[tuple[str, int]]) -> None:
        keys = ["sequence-ease", "lunet-sequence", "lunet-sequence-identity"]
        result = compare(cyclic_ratings(), keys, [0])
        assert [row["key"] for row in result.rows] == keys
        for row in result.rows:
            assert "error" not in row
            assert 0 <= row["full_ndcg@10"] <= 1
        assert result.rows[0]["full_ndcg@10"] > 0.5, "the next of two neighbours"
        assert result.rows[2]["parameters"] < result.rows[1]["parameters"]
        assert "that read the order of a user's ratings" in markdown(result)

    def test_side_features_reach_ours(self, here: object) -> None:
        genres = pd.DataFrame({"genres": ["Drama", "War"] * (RATINGS.n_items // 2)})
        known = replace(RATINGS, item_info=genres)
        counts = {}
        for ratings in (RATINGS, known):
            rows = compare(ratings, ["lunet-ratings", "lunet-ids"], [0]).rows
            counts[ratings] = [row["parameters"] for row in rows]
        assert counts[known][0] > counts[RATINGS][0] == counts[RATINGS][1] == counts[known][1]

    def test_ratings_by_a_baseline(self) -> None:
        found = measure(RATINGS, "biases", 1)
        parts = Parts.of(RATINGS, "random", 1)
        assert parts.test is not None
        fitted = BASELINES["biases"].fit(parts.training, 1, "ml-100k")
        prediction = fitted.predict(parts.test.user, parts.test.item)
        assert prediction is not None
        mse = float((prediction.clamp(1, 5) - parts.test.rating).square().mean())
        assert found["test_mse"] == pytest.approx(mse, rel=1e-5)
        assert found["test_rmse"] == pytest.approx(math.sqrt(mse), rel=1e-5)
        assert found["parameters"] == 101
        assert found["train_seconds"] > 0
        assert not found.keys() & set(RANKING_FIGURES)
        errors = [float(word) for word in found["user_errors"].split()]
        assert len(errors) == parts.test.n_users
        assert sum(errors) / len(parts.test) == pytest.approx(mse, rel=1e-4)

    def test_rankings_by_a_baseline(self) -> None:
        found = measure(RATINGS, "ease", 2)
        parts = Parts.of(RATINGS, "leave-one-out", 2)
        fitted = BASELINES["ease"].fit(parts.training, 2, "ml-100k")
        values = evaluate_ranking(fitted.score_items, parts, 2).metrics  # type: ignore[arg-type]
        assert {name: found[name] for name in RANKING_FIGURES} == {n: values[n] for n in RANKING_FIGURES}
        assert not found.keys() & set(RATING_FIGURES)

    @pytest.mark.parametrize("key", [key for key in METHODS if METHODS[key].is_lu_net])
    def test_ours(self, key: str, here: object) -> None:
        found = measure(RATINGS, key, 0)
        method = METHODS[key]
        config = method.config(1200, 0)
        if isinstance(config, TrainConfig):
            values = train(RATINGS, config).metrics
        else:
            values = train_sequence(RATINGS, config).metrics
        expected = {"reconstruction_error_relative", "parameters"}
        expected |= set(RATING_FIGURES if method.kind != "ranking" else ())
        expected |= set(RANKING_FIGURES if method.kind != "rating" else ())
        assert {name: found[name] for name in expected} == {name: values[name] for name in expected}
        errors = {"user_errors"} if method.kind == "rating" else set()
        assert found.keys() - {"peak_memory_mb"} == expected | {"train_seconds"} | errors
        if errors:
            total = sum(float(word) for word in found["user_errors"].split())
            assert total / values["test_ratings"] == pytest.approx(values["test_mse"], rel=1e-4)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
    def test_peak_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit = module.BASELINES["popularity"].train

        def greedy(training: Ratings, seed: int, size: str) -> Any:
            torch.ones(25_000_000)
            return fit(training, seed, size)

        changed = replace(module.BASELINES["popularity"], train=greedy)
        monkeypatch.setitem(module.BASELINES, "popularity", changed)
        torch.ones(50_000_000)  # held before, and not counted
        assert 90 < measure(RATINGS, "popularity", 0)["peak_memory_mb"] < 180

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "missing", lambda baseline: "pip install it")
        assert measure(RATINGS, "mf", 0) == {"missing": "pip install it"}


class TestProcess:
    def data(self, folder: Path) -> Path:
        file = folder / "ratings.pickle"
        file.write_bytes(pickle.dumps(RATINGS))
        return file

    def test_measures_the_same(self, tmp_path: Path) -> None:
        found = module._in_a_process(self.data(tmp_path), "biases", 1, "leave-one-out", "cpu")
        expected = measure(RATINGS, "biases", 1)
        assert found["test_mse"] == expected["test_mse"]
        assert found.keys() == expected.keys()

    def test_computes_on_one_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        child("import os; os._exit(int(os.environ['OMP_NUM_THREADS']) + 40)")(monkeypatch)
        assert "code 41" in module._in_a_process(self.data(tmp_path), "biases", 0, "time", "cpu")["error"]

    def test_crash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")(monkeypatch)
        found = module._in_a_process(self.data(tmp_path), "biases", 0, "leave-one-out", "cpu")
        assert found == {"error": "its process was ended by SIGKILL, most likely for lack of memory"}

    def test_last_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        child("import sys; print('much'); sys.exit('the reason')")(monkeypatch)
        found = module._in_a_process(self.data(tmp_path), "biases", 0, "leave-one-out", "cpu")
        assert found == {"error": "its process ended with code 1: the reason"}

    @pytest.mark.parametrize(
        ("outcome", "told"),
        [
            (RuntimeError("of\nthe package"), "RuntimeError: of the package"),
            ({"test_mse": math.nan}, "test_mse is nan"),
        ],
    )
    def test_errors_are_outcomes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: object, told: str
    ) -> None:
        def fail(*arguments: object) -> object:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(module, "measure", fail)
        answer = tmp_path / "answer.json"
        module._main([str(self.data(tmp_path)), "biases", "0", "leave-one-out", "cpu", str(answer)])
        assert json.loads(answer.read_text()) == {"error": told}


class TestCompare:
    def test_means_and_spreads(self, here: list[tuple[str, int]]) -> None:
        told: list[dict[str, Any]] = []
        result = compare(RATINGS, ["popularity", "biases"], [2, 5], command="typed", done=told.append)
        assert here == [("biases", 2), ("biases", 5), ("popularity", 2), ("popularity", 5)]
        assert [(run["key"], run["seed"]) for run in told] == here
        biases, popularity = result.rows
        assert (biases["method"], biases["package"], biases["kind"]) == (
            "User and item biases",
            "ours",
            "rating",
        )
        values = [measure(RATINGS, "biases", seed)["test_mse"] for seed in (2, 5)]
        assert biases["test_mse"] == pytest.approx(statistics.fmean(values))
        assert biases["test_mse_sd"] == pytest.approx(statistics.stdev(values))
        assert "hr@10" not in biases
        assert popularity["kind"] == "ranking"
        assert "test_mse" not in popularity
        assert (result.dataset, result.command, result.seeds) == ("latent", "typed", [2, 5])
        assert result.machine["threads"] == 1

    def test_one_seed_has_no_spread(self, here: object) -> None:
        (row,) = compare(RATINGS, ["biases"], [0]).rows
        assert not [name for name in row if name.endswith("_sd")]

    def test_hybrid_has_both_kinds(self, here: object) -> None:
        (row,) = compare(RATINGS, ["lunet-both"], [0]).rows
        assert row["kind"] == "both"
        assert set(FIGURES) - {"peak_memory_mb"} <= row.keys()

    def test_goes_on(self, here: list[tuple[str, int]], tmp_path: Path) -> None:
        file = tmp_path / "compare-latent.json"

        def interrupt(run: dict[str, Any]) -> None:
            if run["key"] == "ease":
                raise KeyboardInterrupt

        keys = ["biases", "popularity", "ease"]
        with pytest.raises(KeyboardInterrupt):
            compare(RATINGS, keys, [0], file=file, done=interrupt)
        assert [row["key"] for row in json.loads(file.read_text())["rows"]] == [
            "biases",
            "popularity",
            "ease",
        ]
        here.clear()
        told: list[str] = []
        result = compare(
            RATINGS, [*keys, "lunet-ratings"], [0], file=file, done=lambda r: told.append(r["key"])
        )
        assert here == [("lunet-ratings", 0)]
        assert told == [*keys, "lunet-ratings"]
        assert [row["key"] for row in result.rows] == told
        content = json.loads(file.read_text())
        assert list(content) == [
            *("machine", "versions", "dataset", "split", "command", "seeds", "rows", "runs")
        ]
        assert content["rows"] == json.loads(json.dumps(result.rows))

    def test_methods_that_were_not_asked_for_are_kept(
        self, here: list[tuple[str, int]], tmp_path: Path
    ) -> None:
        file = tmp_path / "kept.json"
        compare(RATINGS, ["biases", "popularity"], [0], file=file)
        result = compare(RATINGS, ["ease"], [0], file=file)
        assert [row["key"] for row in result.rows] == ["ease"]
        here.clear()
        assert len(compare(RATINGS, ["biases", "popularity", "ease"], [0], file=file).rows) == 3
        assert here == []

    @pytest.mark.parametrize("what", ["data", "side features", "settings", "version", "processor", "code"])
    def test_other_inputs_are_measured_anew(
        self, here: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        file = tmp_path / "kept.json"
        key = "lunet-ratings" if what == "settings" else "popularity"
        compare(RATINGS, [key], [0], file=file)
        here.clear()
        ratings = RATINGS
        if what == "data":
            ratings = RATINGS.select(range(1, len(RATINGS)))
        elif what == "side features":
            ratings = replace(RATINGS, item_info=pd.DataFrame({"genres": ["Drama"] * RATINGS.n_items}))
        elif what == "settings":
            changed = replace(METHODS[key], overrides=(*METHODS[key].overrides, ("learning_rate", 0.1)))
            monkeypatch.setitem(METHODS, key, changed)
        elif what == "version":
            monkeypatch.setattr(module.lunet_fast, "__version__", "9")
        elif what == "code":
            monkeypatch.setattr(module, "code", lambda: "another")
        else:
            description = {**module.describe(), "processor": "another"}
            monkeypatch.setattr(module, "describe", lambda device: description)
        compare(ratings, [key], [0], file=file)
        assert here == [(key, 0)]

    def test_missing_and_failed_methods_are_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[str, int]] = []

        def outcome(data: Path, key: str, seed: int, split: str, device: str) -> dict[str, Any]:
            calls.append((key, seed))
            if key == "mf":
                return {"missing": 'MF needs cornac: pip install "lunet-fast[baselines]"'}
            if key == "biases" or seed == 1:
                return {"error": "ValueError: why"}
            return measure(RATINGS, "popularity", seed)

        monkeypatch.setattr(module, "_in_a_process", outcome)
        file = tmp_path / "compare.json"
        keys = ["biases", "mf", "popularity"]
        result = compare(RATINGS, keys, [0, 1], file=file)
        assert calls.count(("mf", 0)) == 1
        assert ("mf", 1) not in calls  # it is not there for the next seed either
        biases, mf, popularity = result.rows
        assert biases["error"] == "seed 0: ValueError: why"
        assert biases["seeds"] == []
        assert "pip install" in mf["missing"]
        assert popularity["seeds"] == [0]
        assert popularity["error"] == "seed 1: ValueError: why"
        assert popularity["hr@10"] > 0
        text = markdown(result)
        assert "| not installed |" in text
        assert "| failed |" in text
        assert '- MF needs cornac: pip install "lunet-fast[baselines]"' in text
        assert "- User and item biases failed, seed 0: ValueError: why" in text
        assert save(result, file)
        calls.clear()
        compare(RATINGS, keys, [0, 1], file=file)
        assert ("popularity", 0) not in calls
        assert {("biases", 0), ("biases", 1), ("mf", 0), ("popularity", 1)} == set(calls)

    def test_interactions_are_for_methods_that_rank(self, here: object) -> None:
        clicks = replace(RATINGS, rating=torch.ones_like(RATINGS.rating), scale=(1.0, 1.0), name="clicks")
        kinds = {METHODS[key].kind for key in module.allowed(clicks)}
        assert kinds == {"ranking"}
        described = replace(RATINGS, item_info=pd.DataFrame({"genres": ["Drama"] * RATINGS.n_items}))
        assert module.allowed(described) == list(METHODS)
        reads = ["bayesian-fm-side", "bayesian-svd++-side", "bayesian-svd++-side-mean"]
        assert module.allowed(RATINGS) == [key for key in METHODS if key not in reads]
        with pytest.raises(ValueError, match="'bayesian-fm-side' reads side features, and latent has none"):
            compare(RATINGS, ["bayesian-fm-side"], [0])
        assert [row["key"] for row in compare(clicks, ["lunet-interactions"], [0]).rows] == [
            "lunet-interactions"
        ]
        with pytest.raises(
            ValueError, match="'mf' learns from ratings, and those of clicks are all 1: choose"
        ):
            compare(clicks, ["mf"], [0])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["svd"], [0]), "methods 'svd' is unknown: choose from biases, knn"),
            (([], [0]), "methods is empty"),
            ((["biases"], []), "seeds must be one or more distinct numbers"),
            ((["biases"], [1, 1]), "got \\[1, 1\\]"),
            ((["biases"], [-1]), "at least 0"),
        ],
    )
    def test_wrong_arguments(self, here: list[object], arguments: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            compare(RATINGS, *arguments)
        assert here == []

    def test_data_that_cannot_be_split(self, here: list[object]) -> None:
        once = RATINGS.select([int((RATINGS.user == user).nonzero()[0]) for user in range(60)])
        with pytest.raises(ValueError, match="no user of these 60 ratings has 2 rows"):
            compare(once, ["biases", "popularity"], [0])
        assert here == []

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [1]}', '{"runs": [{"key": "ease"}]}'])
    def test_another_file(self, here: list[object], tmp_path: Path, content: str) -> None:
        file = tmp_path / "compare-x.json"
        file.write_text(content)
        with pytest.raises(ValueError, match="is no result of lunet-fast compare"):
            compare(RATINGS, ["popularity"], [0], file=file)
        assert file.read_text() == content


class TestGaps:
    """Rankings by the time since a user's last rating, and by one time for all."""

    def test_means_are_over_users(self, here: object) -> None:
        ratings = paused_ratings()
        result = compare(ratings, ["popularity", "ease", "lunet-sequence"], [0, 1])
        for row in result.rows:
            gaps = row["by_gap"]
            assert list(gaps) == ["up to a minute", "over a day"]
            assert [gap["users"] for gap in gaps.values()] == [40, 40], "20 of each in either run"
            for name in ("hr@10", "ndcg@10", "full_ndcg@10", "full_hr@10"):
                whole = sum(gap["users"] * gap[name] for gap in gaps.values()) / 80
                assert whole == pytest.approx(row[name])
        text = markdown(result)
        assert "## By the time since the user's last rating in training" in text
        lines = [line for line in text.splitlines() if line.startswith("| over a day |")]
        assert len(lines) == 3
        assert any("**" in line for line in lines)

    def test_gaps_of_other_users_do_not_count(self) -> None:
        """One group's figures are those of ranking its users alone."""
        ratings = paused_ratings()
        parts = Parts.of(ratings, "leave-one-out", 0)
        fitted = BASELINES["ease"].fit(parts.training, 0, "ml-100k")
        whole = evaluate_ranking(fitted.score_items, parts).gaps  # type: ignore[arg-type]
        assert parts.held_out is not None
        assert parts.candidates is not None
        for rest, name in ((1, "up to a minute"), (0, "over a day")):
            some = parts.held_out.user % 2 == rest
            alone = replace(
                parts,
                held_out=parts.held_out.select(some),
                candidates=parts.candidates[some],
                gaps=None if parts.gaps is None else parts.gaps[some],
            )
            ranking = evaluate_ranking(fitted.score_items, alone)  # type: ignore[arg-type]
            assert list(ranking.gaps) == [name]
            assert whole[name] == ranking.gaps[name]
            assert ranking.gaps[name]["ndcg@10"] == pytest.approx(ranking.metrics["ndcg@10"])

    def test_by_one_time(self, here: list[tuple[str, int]], tmp_path: Path) -> None:
        ratings = cyclic_ratings()
        assert ratings.timestamp is not None
        # All users at once, not one after the other.
        ratings = replace(ratings, timestamp=(ratings.timestamp - 1_000_000) % 1000 + 1)
        file = tmp_path / "c.json"
        result = compare(ratings, ["popularity", "lunet-sequence"], [0], split="time", file=file)
        assert [row["key"] for row in result.rows] == ["popularity", "lunet-sequence"]
        assert all(0 <= row["full_ndcg@10"] <= 1 for row in result.rows)
        assert "after one time" in markdown(result)
        assert set(module.allowed(ratings, "time")) == {k for k, m in METHODS.items() if m.kind == "ranking"}
        here.clear()
        compare(ratings, ["popularity"], [0], file=file)
        assert here == [("popularity", 0)], "another split is another measurement"
        with pytest.raises(ValueError, match="'biases' predicts ratings, and split='time'"):
            compare(ratings, ["biases"], [0], split="time")
        with pytest.raises(ValueError, match="split='random' is unknown: choose one of leave-one-out, time"):
            compare(ratings, ["ease"], [0], split="random")


class TestShown:
    @pytest.fixture
    def result(self, here: object) -> module.Comparison:
        keys = ["biases", "ease", "popularity", "lunet-both", "lunet-leaky"]
        return compare(RATINGS, keys, [0, 1], command="lunet-fast compare --dataset x")

    def test_markdown(self, result: module.Comparison) -> None:
        text = markdown(result)
        lines = text.splitlines()
        assert lines[0] == "# Recommenders on latent, seeds 0, 1"
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 2 + 5
        assert len({line.count("|") for line in table}) == 1
        mse, spread = result.rows[0]["test_mse"], result.rows[0]["test_mse_sd"]
        assert f"| {mse:.4f} ± {spread:.4f} |" in table[2]
        assert "| LU-Net, both (gamma 0.1) | lunet_fast |" in text
        # The best is bold, whosever it is, but one that was told of the held-out pairs.
        fair = [row["ndcg@10"] for row in result.rows if "ndcg@10" in row and row["key"] != "lunet-leaky"]
        assert f"| **{max(fair):.4f} ± " in text
        assert "nobody is told of held-out pairs" in text
        assert "`lunet-fast compare --dataset x`" in text

    def test_differences(self, here: object) -> None:
        described = replace(RATINGS, item_info=pd.DataFrame({"genres": ["Drama", "War"] * 20}))
        result = compare(described, ["biases", "lunet-ids", "lunet-ratings", "lunet-ratings-one"], [0, 1])
        assert [row["side"] for row in result.rows] == [False, True, True, False]
        over = {row["key"]: row["over_best"] for row in result.rows if "over_best" in row}
        assert len(over) == 2, "one less than the rows of each table"
        for key, each in over.items():
            mse = {row["key"]: row["test_mse"] for row in result.rows}
            assert each["mse"] == pytest.approx(mse[key] - mse[each["key"]], abs=1e-4)
            assert each["low"] <= each["mse"] <= each["high"]
        text = markdown(result)
        assert "## Differences of the MSE, paired over users" in text
        assert len(difference_table(result)) == 2
        assert "are read by: LU-Net, ratings (gamma 1), LU-Net, ratings, one member." in text

    def test_csv(self, result: module.Comparison) -> None:
        rows = list(csv.DictReader(io.StringIO(csv_text(result))))
        assert [row["key"] for row in rows] == [row["key"] for row in result.rows]
        assert float(rows[0]["test_mse"]) == result.rows[0]["test_mse"]
        assert float(rows[1]["full_ndcg@10_sd"]) == result.rows[1]["full_ndcg@10_sd"]
        assert rows[0]["hr@10"] == ""
        assert rows[0]["seeds"] == "0 1"

    def test_csv_runs_no_formula(self, result: module.Comparison) -> None:
        failed = replace(result, rows=[{"key": "mf", "method": "MF", "error": "=1+1: x", "seeds": []}])
        (row,) = csv.DictReader(io.StringIO(csv_text(failed)))
        assert row["error"] == "'=1+1: x"

    def test_files(self, result: module.Comparison, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        written = save(result, tmp_path / "compare-latent.json")
        assert [path.name for path in written] == [f"compare-latent.{end}" for end in ("md", "csv", "png")]
        assert written[2].read_bytes().startswith(b"\x89PNG")
        assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in written)

    def test_picture_of_one_kind_and_of_nothing(self, result: module.Comparison, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        ranking = replace(result, rows=result.rows[1:3])
        assert draw(ranking, tmp_path / "a.png") == [tmp_path / "a.png"]
        failed = replace(result, rows=[{"key": "mf", "method": "MF", "error": "x", "seeds": []}])
        assert draw(failed, tmp_path / "b.png") == []
        assert not (tmp_path / "b.png").exists()
