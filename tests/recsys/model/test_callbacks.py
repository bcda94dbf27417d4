"""What is told of each epoch, and may end a training; the number of epochs of recipe auto."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lunet_fast.recsys.model import auto
from lunet_fast.recsys.model.auto import auto_config, found_before
from lunet_fast.recsys.model.config import TrainConfig
from lunet_fast.recsys.model.training import train
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from lunet_fast.training.files import RunFolder, RunFolderError
from lunet_fast.training.loop import Interrupted, Stop
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

SHORT: dict[str, Any] = {"members": 1, "embedding_size": 4, "mlp": False, "split": "none"}


class TestCallbacks:
    def test_are_told_of_each_epoch_and_may_end_the_training(self) -> None:
        ratings, told = latent_ratings(), []
        config = quick_config(schedule="constant", split="random", mlp=False)

        def tell(epoch: int, figures: dict[str, float]) -> bool:
            told.append((epoch, figures))
            return epoch == 2

        result = train(ratings, config, callbacks=[tell, lambda epoch, figures: None])
        assert [epoch for epoch, _ in told] == [1, 2]
        assert [figures["train_loss"] for _, figures in told] == result.curve.train
        assert [figures["test_loss"] for _, figures in told] == result.curve.test
        assert result.metrics["epochs"] == 2
        whole = train(ratings, config.replace(epochs=2))
        for name, tensor in whole.trained.model.state_dict().items():
            assert torch.equal(tensor, result.trained.model.state_dict()[name]), name

    def test_hear_the_former_epochs_again_when_resumed(self, tmp_path: Path) -> None:
        ratings, config = latent_ratings(), quick_config(split="none", mlp=False)
        stop = Stop()
        heard: list[int] = []
        with pytest.raises(Interrupted):
            train(ratings, config, out=tmp_path, stop=stop, callbacks=[lambda *_: stop.ask() and None])
        done = train(
            ratings, config, out=tmp_path, resume=True, callbacks=[lambda epoch, _: heard.append(epoch)]
        )
        assert heard == [1, 2, 3, 4]
        assert len(done.curve.train) == 4

    def test_in_the_estimator(self) -> None:
        heard: list[int] = []
        model = LUNetRecommender("best", **{k: v for k, v in SHORT.items() if k != "split"}, epochs=5)
        model.fit(latent_frame(), callbacks=[lambda epoch, _: heard.append(epoch) or epoch == 1])
        assert heard == [1]
        for wrong in (print, [print, 3], "each"):
            with pytest.raises(TypeError, match=r"callbacks=.* must be a list of functions"):
                model.fit("no file is read", callbacks=wrong)  # type: ignore[arg-type]


class TestPatience:
    def test_takes_the_epoch_of_least_error(self) -> None:
        ratings, told = latent_ratings(), []
        given = {**SHORT, "strength": 1.0, "l2_latent": 0.0, "learning_rate": 0.3, "seed": 2}
        config = auto_config(ratings, **given, epochs=30, patience=2, told=told.append)
        search = auto._Search(ratings, config.replace(epochs=30), 4, "cpu")
        rest, part = search.folds[0]
        errors = train(rest, config.replace(epochs=30, split="none"), test=part).curve.test
        # At such a rate it begins to overfit soon.
        assert config.epochs < 28
        best = min(errors[: config.epochs + 2])
        assert errors[config.epochs - 1] == best
        assert f"{config.epochs} of at most 30 epochs" in " ".join(told)

    def test_where_it_cannot_be_is_told(self) -> None:
        with pytest.raises(ValueError, match=r"patience=3 looks at the error of ratings"):
            TrainConfig(patience=3, gamma=0.0)
        with pytest.raises(ValueError, match=r"patience"):
            TrainConfig(patience=0)
        with pytest.raises(ValueError, match=r"patience=3 is of recipe 'auto'"):
            train(latent_ratings(), quick_config(patience=3))


class TestFoundBefore:
    def begun(self, folder: Path, **changes: Any) -> TrainConfig:
        config = TrainConfig(recipe="auto", mlp=False, l2_latent=0.2, strength=0.31, **changes)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"dataset": "d", "users": 3, **config.to_dict()}))
        return config

    def test_is_what_the_training_began_with(self, tmp_path: Path) -> None:
        config = self.begun(tmp_path / "run", epochs=7, patience=2)
        given = {"seed": 0, "epochs": 20, "patience": 2}  # 7 were found, of at most 20
        assert found_before(tmp_path / "run", given) == config
        assert found_before(tmp_path, given) is None

    def test_other_settings_and_damaged_ones_are_told(self, tmp_path: Path) -> None:
        self.begun(tmp_path / "run", epochs=7)
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(RunFolderError, match=r"was trained with epochs=7, not 9: give the same settings"):
            found_before(folder.path, {"epochs": 9})
        recorded = json.loads(folder.config.read_text())
        folder.config.write_text(json.dumps({**recorded, "strength": "much"}))
        with pytest.raises(RunFolderError, match=r"strength.*start anew with overwrite=True"):
            found_before(folder.path, {})
        folder.config.write_text(json.dumps({**recorded, "recipe": "best"}))
        assert found_before(folder.path, {}) is None
