"""One search for every method: what is tried, what is chosen, and what the test part has to say: nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pandas as pd
import pytest
import torch

from lunet_fast.recsys.evaluation import peer_settings
from lunet_fast.recsys.evaluation import search as module
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.evaluation.compare import METHODS
from lunet_fast.recsys.evaluation.peer_settings import SETTINGS, Setting, settings_for
from lunet_fast.recsys.evaluation.ranges import Choice, Range
from lunet_fast.recsys.evaluation.search import Trial, search, searchable
from lunet_fast.recsys.evaluation.tuning import RANGES
from lunet_fast.recsys.measures.protocols import Parts
from lunet_fast.recsys.model.auto import SAMPLED_TRIAL
from lunet_fast.recsys.model.sequence_config import settings_of
from lunet_fast.training.files import write_json
from tests.recsys.synthetic import latent_ratings, quick_config

RATINGS = latent_ratings()


class TestRanges:
    @pytest.mark.parametrize("where", [*RANGES.values(), Range(2, 48, log=True), Range(0.1, 9.0, log=True)])
    def test_what_is_drawn_lies_inside(self, where: Range | Choice) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = [where.drawn(study.ask(), "x") for _ in range(50)]
        assert len(set(drawn)) > 1
        assert all(where.holds(value) for value in drawn)

    @pytest.mark.parametrize(
        ("where", "value", "end"),
        [
            (Range(1, 100, log=True), 1, "low"),
            (Range(1, 100, log=True), 10, ""),
            (Range(1, 100, log=True), 99, "high"),
            (Range(0.1, 10.0, log=True), 0.105, "low"),
            (Range(0.0, 0.3), 0.0, ""),  # there is nothing below
            (Range(0.0, 0.3), 0.3, "high"),
            (Choice((8, 16, 32)), 32, "high"),
            (Choice((8, 16, 32)), 16, ""),
            (Choice(("cosine", "msd")), "msd", ""),
        ],
    )
    def test_ends(self, where: Range | Choice, value: Any, end: str) -> None:
        assert where.end(value) == end

    def test_what_a_range_does_not_hold(self) -> None:
        assert not Range(1, 9).holds(2.0)
        assert not Range(1, 9).holds(10)
        assert not Range(0, 9).holds(True)
        assert Range(0.5, 9.0).holds(2)
        assert not Choice((1, 2)).holds(1.0)
        assert not Choice(("a",)).holds("b")


class TestSettings:
    def test_what_is_declared_lies_well_inside_its_range(self) -> None:
        for key, own in SETTINGS.items():
            for name, setting in own.items():
                if setting.range is None:
                    continue
                for value in (setting.small, setting.large):
                    assert setting.range.holds(value), (key, name)

    def test_every_method_of_others_has_settings(self) -> None:
        assert {baseline.settings_key for baseline in BASELINES.values()} == SETTINGS.keys()
        assert {method.settings_key for method in METHODS.values()} <= {*SETTINGS, *METHODS}

    def test_the_file_of_the_package_is_one_of_a_search(self) -> None:
        """Also of a method that is not installed here."""
        for key in SETTINGS:
            settings_for(key, "ml-100k")
        for key, settings in peer_settings.chosen().items():
            assert key in searchable()
            if METHODS[key].is_lu_net:
                assert settings.items() <= METHODS[key].config(100_000, 0).to_dict().items()
                assert all(RANGES[name].holds(value) for name, value in settings.items())

    def test_what_was_chosen_is_used_for_data_of_that_size(
        self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def given(**methods: dict[str, Any]) -> None:
            write_json(
                tmp_path / "chosen.json", {"methods": {k: {"settings": v} for k, v in methods.items()}}
            )
            peer_settings.chosen.cache_clear()

        monkeypatch.setattr(peer_settings, "CHOSEN", tmp_path / "chosen.json")
        try:
            assert settings_for("ease", "ml-100k") == {"l2": SETTINGS["ease"]["l2"].small}
            given(ease={"l2": 77.0}, **{"lunet-ids": {"epochs": 9}})
            assert settings_for("ease", "ml-100k") == {"l2": 77.0}
            assert settings_for("ease", "ml-1m") == {"l2": SETTINGS["ease"]["l2"].large}
            assert METHODS["lunet-ids"].config(100_000, 0).epochs == 9
            assert METHODS["lunet-ids"].config(1_000_000, 0).epochs != 9
            assert METHODS["lunet-ids"].config(100_000, 0, searched=False).epochs != 9
            for wrong in ({"l2": 1e9}, {"l2": "77"}, {"l3": 1.0}):
                given(ease=wrong)
                with pytest.raises(ValueError, match="which no search could have chosen"):
                    settings_for("ease", "ml-100k")
            (tmp_path / "chosen.json").write_text("[]")
            peer_settings.chosen.cache_clear()
            with pytest.raises(ValueError, match=r"not what benchmarks/search\.py writes"):
                settings_for("ease", "ml-100k")
        finally:
            monkeypatch.undo()
            peer_settings.chosen.cache_clear()


class TestSearch:
    @pytest.fixture(autouse=True)
    def as_if_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "chosen", dict)

    def test_what_another_search_has_chosen_is_not_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "chosen", lambda: {"ease": {"l2": 123.0}, "biases": {"l2_user": 3.0}})
        found = search(RATINGS, "ease", seconds=0)
        assert [trial.settings["l2"] for trial in found.trials[:2]] == [found.first["l2"], 123.0]
        assert [trial.full for trial in found.trials] == [False] * 3 + [True] * 3
        assert found.value == max(trial.value or 0.0 for trial in found.trials[3:])

    @pytest.mark.parametrize("key", ["biases", "ease"])
    def test_the_best_in_full_is_chosen(self, key: str) -> None:
        told: list[Trial] = []
        found = search(RATINGS, key, seconds=0.2, told=told.append)
        sign = 1 if key == "biases" else -1
        assert (found.measure, found.direction) == (
            ("test_mse", "minimize") if key == "biases" else ("ndcg@10", "maximize")
        )
        assert found.trials == told
        assert told[0].settings == found.first == {n: s.small for n, s in SETTINGS[key].items()}
        full = [trial for trial in told if trial.full]
        assert [trial.settings for trial in full[:1]] == [found.first]
        assert len(full) == 1 + module.FINALISTS
        values = [sign * trial.value for trial in full if trial.value is not None]
        assert sign * found.value == min(values)
        assert found.settings == full[values.index(min(values))].settings
        tried = [trial for trial in told if not trial.full]
        assert sum(trial.cpu_seconds for trial in tried[:-1]) < 0.2 or len(tried) == 2
        best = min(sign * trial.value for trial in tried[1:] if trial.value is not None)
        assert sign * full[1].value == best  # type: ignore[operator]

    def test_a_value_at_an_end_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The best l2 for these ratings is far below this range."""
        where = Range(50.0, 60.0)
        monkeypatch.setitem(SETTINGS, "biases", {n: Setting(50.0, 50.0, where) for n in SETTINGS["biases"]})
        assert search(RATINGS, "biases", seconds=0).at_ends["l2_user"] == "low"

    @pytest.mark.parametrize("key", ["biases", "bayesian-fm"])
    def test_the_test_part_is_never_read(self, key: str) -> None:
        if missing(BASELINES[key]) is not None:
            pytest.skip("not installed")
        test = Parts.of(RATINGS, "random", 0).test
        assert test is not None
        place = RATINGS.user * RATINGS.n_items + RATINGS.item
        hidden = torch.isin(place, test.user * RATINGS.n_items + test.item)
        changed = replace(RATINGS, rating=torch.where(hidden, 6 - RATINGS.rating, RATINGS.rating))
        found = [search(ratings, key, seconds=0) for ratings in (RATINGS, changed)]
        assert [t.value for t in found[0].trials] == [t.value for t in found[1].trials]

    def test_cheap_in_trials_and_dear_in_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        fit = BASELINES["popularity"].train

        def counted(training: Any, seed: int, settings: Any) -> Any:
            asked.append(settings["samples"])
            found = fit(training, seed, settings)
            return replace(found, predict=lambda users, items: torch.full((len(users),), 3.0))

        stand_in = replace(BASELINES["bayesian-fm"], package="ours", train=counted)
        monkeypatch.setitem(BASELINES, "bayesian-fm", stand_in)
        samples = SETTINGS["bayesian-fm"]["samples"]
        search(RATINGS, "bayesian-fm", seconds=0)
        assert asked == [samples.in_search] * 2 + [samples.small] * 2

    def test_a_training_that_fails_is_a_trial(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit = BASELINES["biases"].train

        def fails_at_first(training: Any, seed: int, settings: Any) -> Any:
            if settings["l2_user"] == SETTINGS["biases"]["l2_user"].small:
                raise FloatingPointError("why")
            return fit(training, seed, settings)

        monkeypatch.setitem(BASELINES, "biases", replace(BASELINES["biases"], train=fails_at_first))
        found = search(RATINGS, "biases", seconds=0)
        assert found.trials[0].error == "FloatingPointError: why"
        assert found.trials[0].value is None
        assert found.settings == found.trials[1].settings

        def fails(training: Any, seed: int, settings: Any) -> Any:
            raise FloatingPointError("why")

        monkeypatch.setitem(BASELINES, "biases", replace(BASELINES["biases"], train=fails))
        with pytest.raises(ValueError, match="no training has succeeded; the last one: FloatingPointError"):
            search(RATINGS, "biases", seconds=0)

    def test_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lunet_fast.recsys.evaluation import compare

        quick = quick_config().to_dict()
        small = {name: quick[name] for name in ("epochs", "embedding_size", "batch_size")}

        def quickly(name: str, n_ratings: int, **more: Any) -> Any:
            if "inference" in more:  # another row's
                return settings_of(name, n_ratings, **more)
            return quick_config(**{**small, **more, "members": 6})

        monkeypatch.setattr(compare, "settings_of", quickly)
        described = replace(RATINGS, item_info=pd.DataFrame({"genres": ["Drama", "War"] * 20}))
        seen: list[int] = []
        trained = module.train

        def counted(ratings: Any, config: Any) -> Any:
            seen.append(config.members)
            assert config.side_features
            return trained(ratings, config.replace(epochs=1))

        monkeypatch.setattr(module, "train", counted)
        found = search(described, "lunet-ratings", seconds=0)
        assert seen == [module.MEMBERS] * 2 + [6, 6]
        assert found.settings.keys() == found.first.keys() == module._ranges("lunet-ratings").keys()

    def test_samples_of_a_trial_and_in_full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int]] = []
        trained = module.train

        def counted(ratings: Any, config: Any) -> Any:
            seen.append((config.epochs, config.members))
            return trained(ratings, config.replace(epochs=8, members=4))

        monkeypatch.setattr(module, "train", counted)
        found = search(RATINGS, "lunet-sampled", seconds=0)
        base = module._config("lunet-sampled", len(RATINGS), 0)
        cheap = SAMPLED_TRIAL["epochs"], SAMPLED_TRIAL["members"]
        assert seen == [cheap] * 2 + [(base.epochs, base.members)] * 2
        assert found.settings.keys() == {"embedding_size", "history_power", "noise"}

    def test_what_cannot_be_searched(self) -> None:
        for key in ("popularity", "mf-mean", "lunet-both", "lunet-paper", "svd"):
            with pytest.raises(ValueError, match=f"{key!r} has no settings to search: choose from biases, "):
                search(RATINGS, key, seconds=1)
