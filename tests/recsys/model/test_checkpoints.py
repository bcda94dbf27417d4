from __future__ import annotations

import errno
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.model import model_files
from lunet_fast.recsys.model.model_files import TrainedModel
from lunet_fast.recsys.model.schema import MODEL_FORMAT
from lunet_fast.recsys.model.training import train
from lunet_fast.training import files, schema
from lunet_fast.training.files import CheckpointError, RunFolder, RunFolderError, read_tensors, write_tensors
from lunet_fast.training.loop import Interrupted, Progress, Stop
from lunet_fast.training.run import Result
from lunet_fast.training.schema import CHECKPOINT_FORMAT
from tests.recsys.synthetic import latent_frame, latent_ratings, quick_config

TrainResult = Result[TrainedModel]
CONFIG = quick_config(epochs=3, mlp_epochs=2)
RUN_FILES = {"checkpoints", "config.json", "loss.png", "metrics.json", "model.safetensors"}


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    return latent_ratings()


@pytest.fixture(scope="module")
def whole(ratings: Ratings, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(ratings, CONFIG, out=out), out


class Interrupt(Progress):
    """Ends the training after an epoch of a phase, as Ctrl-C would."""

    def __init__(self, phase: str, epoch: int) -> None:
        self.at = (phase, epoch)
        self.seen: list[tuple[str, int]] = []

    def epoch(self, phase: str, epoch: int, train_loss: float, test_loss: float | None) -> None:
        self.seen.append((phase, epoch))
        if (phase, epoch) == self.at:
            raise KeyboardInterrupt


def untimed(path: Path) -> dict[str, object]:
    values = json.loads((path / "metrics.json").read_text())
    return {name: value for name, value in values.items() if "seconds" not in name}


def names(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()} - {".lock"}


class TestAtomicWrites:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "values.json"
        files.write_json(path, {"a": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(path, {"a": float("nan")})

        def half(temporary: Path) -> None:
            temporary.write_text("half a fi")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            files.write_atomically(path, half)
        assert files.read_json(path) == {"a": 1}
        assert names(tmp_path) == {"values.json"}

    def test_files_can_be_read_by_whom_the_umask_allows(self, tmp_path: Path) -> None:
        files.write_json(tmp_path / "ours.json", {})
        (tmp_path / "plain").touch()
        assert (tmp_path / "ours.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestTensorFiles:
    def test_same_content_same_bytes(self, tmp_path: Path) -> None:
        tensors = {name: torch.arange(3.0) for name in "cab"}
        for name in ("one", "two"):
            files.write_tensors(tmp_path / name, tensors, "kind", {"x": 1, "y": [2]})
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        read, header = files.read_tensors(tmp_path / "one", "kind")
        assert {name: t.tolist() for name, t in read.items()} == {name: [0.0, 1.0, 2.0] for name in "cab"}
        assert (header["x"], header["y"]) == (1, [2])

    def test_refuses_each_with_its_reason(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        good = {"lunet_fast": json.dumps({"format": "kind", "version": 1})}

        def refusal() -> str:
            with pytest.raises(CheckpointError) as caught:
                files.read_tensors(path, "kind")
            assert str(path) in str(caught.value)
            return str(caught.value)

        with pytest.raises(FileNotFoundError, match="no such file"):
            files.read_tensors(path, "kind")
        save_file({"a": torch.ones(50)}, path, metadata=good)
        files.read_tensors(path, "kind")
        path.write_bytes(path.read_bytes()[:-20])
        assert "not a whole safetensors file" in refusal()
        path.write_bytes(pickle.dumps({"a": 1}))
        assert "not a safetensors file but a pickle" in refusal()
        path.write_bytes(b"")
        assert "not a whole safetensors file" in refusal()
        save_file({"a": torch.ones(5)}, path)
        assert "is not a kind file" in refusal()
        save_file({"a": torch.ones(5)}, path, metadata={"lunet_fast": "{"})
        assert "the header is not JSON" in refusal()
        newer = {"lunet_fast": json.dumps({"format": "kind", "version": schema.FORMAT_VERSION + 1})}
        save_file({"a": torch.ones(5)}, path, metadata=newer)
        assert "update lunet-fast" in refusal()
        save_file({"a": torch.tensor([1.0, float("nan")])}, path, metadata=good)
        assert "'a' holds NaN" in refusal()


class TestModelFile:
    def test_round_trip_with_text_ids_and_titles(self, tmp_path: Path) -> None:
        ratings = from_frame(latent_frame(text_ids=True), scale=(0.5, 5))
        titles = [f"Title é {i}" if i % 2 else "" for i in range(ratings.n_items)]
        info = pd.DataFrame({"title": titles, "genres": ["Drama|War"] * ratings.n_items})
        model = train(ratings, quick_config(epochs=1, mlp=False)).trained.model
        written = model_files.TrainedModel(model, ratings.users, ratings.items, ratings.scale, info)
        model_files.save_model(tmp_path / "m", written)
        read = model_files.load_model(tmp_path / "m")
        assert (read.users, read.items, read.scale) == (ratings.users, ratings.items, (0.5, 5.0))
        assert read.model.config == model.config
        assert read.item_info is not None
        pd.testing.assert_frame_equal(read.item_info, info)
        assert torch.equal(read.model(ratings.user, ratings.item), model(ratings.user, ratings.item))

    def test_refuses_what_does_not_fit_together(
        self, whole: tuple[TrainResult, Path], tmp_path: Path
    ) -> None:
        tensors, header = files.read_tensors(whole[1] / "model.safetensors", MODEL_FORMAT)
        state = {name: value for name, value in header.items() if name not in ("format", "version")}
        path = tmp_path / "m"

        def refusal(tensors: dict[str, torch.Tensor], state: dict[str, object]) -> str:
            files.write_tensors(path, tensors, MODEL_FORMAT, state)
            with pytest.raises(CheckpointError) as caught:
                model_files.load_model(path)
            return str(caught.value)

        fewer = {name: t for name, t in tensors.items() if name != "model.weight"}
        assert "do not fit the model's settings" in refusal(fewer, state)
        assert "has 60 users but 59 user ids" in refusal(
            {**tensors, "users.ids": tensors["users.ids"][1:]}, state
        )
        assert "sorted and unique" in refusal({**tensors, "users.ids": tensors["users.ids"].flip(0)}, state)
        assert "'users.ids.text' is missing" in refusal(
            {name: t for name, t in tensors.items() if name != "users.ids"}, state
        )
        assert "layers=0" in refusal(tensors, {**state, "config": {**state["config"], "layers": 0}})
        assert "lacks 'scale'" in refusal(tensors, {"config": state["config"]})


class TestRunFolder:
    def test_holds_exactly_the_promised_files(self, whole: tuple[TrainResult, Path]) -> None:
        result, out = whole
        assert names(out) == RUN_FILES
        assert json.loads((out / "metrics.json").read_text()) == result.metrics
        config = json.loads((out / "config.json").read_text())
        assert config.items() >= CONFIG.to_dict().items()
        assert (config["dataset"], config["source"], config["users"]) == ("latent", "a data frame", 60)
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_two_runs_are_the_same_files(
        self, ratings: Ratings, whole: tuple[TrainResult, Path], tmp_path: Path
    ) -> None:
        train(ratings, CONFIG, out=tmp_path / "run")
        for name in ("model.safetensors", "config.json", "loss.png"):
            assert (tmp_path / "run" / name).read_bytes() == (whole[1] / name).read_bytes(), name
        assert untimed(tmp_path / "run") == untimed(whole[1])

    def test_is_not_overwritten_unasked(self, ratings: Ratings, tmp_path: Path) -> None:
        out = tmp_path / "run"
        config = CONFIG.replace(mlp=False, epochs=1)
        train(ratings, config, out=out)
        before = (out / "metrics.json").read_bytes()
        with pytest.raises(
            RunFolderError, match=r"holds a finished training: add resume=True .*overwrite=True"
        ):
            train(ratings, config, out=out)
        assert (out / "metrics.json").read_bytes() == before
        train(ratings, config.replace(seed=1), out=out, overwrite=True)
        assert json.loads((out / "metrics.json").read_text())["seed"] == 1
        with pytest.raises(RunFolderError, match="one of the two"):
            train(ratings, config, out=out, overwrite=True, resume=True)

    def test_replacing_leaves_nothing_of_the_former_training(self, ratings: Ratings, tmp_path: Path) -> None:
        out = tmp_path / "run"
        train(ratings, CONFIG, out=out)
        assert names(out / "checkpoints") == {"lu-net.safetensors", "mlp.safetensors", "decoder.safetensors"}
        with pytest.raises(KeyboardInterrupt):
            train(ratings, CONFIG, out=out, overwrite=True, progress=Interrupt("LU-Net", 0))
        assert names(out) == {"config.json", "checkpoints"}
        assert names(out / "checkpoints") == {"lu-net.safetensors"}  # the new one's

    def test_a_folder_that_cannot_be_made(self, ratings: Ratings, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunFolderError, match="cannot write into"):
            train(ratings, CONFIG, out=tmp_path / "file" / "run")


class TestResume:
    @pytest.mark.parametrize(
        ("phase", "epoch"),
        [("LU-Net", 0), ("LU-Net", 1), ("LU-Net", 2), ("MLP", 0), ("MLP", 1), ("decoder", 0), ("decoder", 1)],
    )
    def test_gives_the_weights_of_the_uninterrupted_training(
        self,
        ratings: Ratings,
        whole: tuple[TrainResult, Path],
        tmp_path: Path,
        phase: str,
        epoch: int,
    ) -> None:
        out = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            train(ratings, CONFIG, out=out, progress=Interrupt(phase, epoch), checkpoint_seconds=0)
        assert not (out / "metrics.json").exists()
        again = Interrupt("none", 0)
        train(ratings, CONFIG, out=out, resume=True, progress=again, checkpoint_seconds=0)
        for name in ("model.safetensors", "config.json", "loss.png"):
            assert (out / name).read_bytes() == (whole[1] / name).read_bytes(), name
        assert untimed(out) == untimed(whole[1])
        every = [
            ("LU-Net", 0),
            ("LU-Net", 1),
            ("LU-Net", 2),
            ("MLP", 0),
            ("MLP", 1),
            ("decoder", 0),
            ("decoder", 1),
        ]
        assert again.seen == every[every.index((phase, epoch)) + 1 :]  # no finished epoch is repeated

    def test_after_a_kill_while_writing_leaves_no_rest(self, ratings: Ratings, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(ratings, CONFIG, out=tmp_path, progress=Interrupt("LU-Net", 1), checkpoint_seconds=0)

        def killed(temporary: Path) -> None:
            temporary.rename(temporary.with_suffix(".kept"))  # what no clean-up of the writer can reach
            raise SystemExit

        for folder in (tmp_path, tmp_path / "checkpoints"):
            with pytest.raises(SystemExit):
                files.write_atomically(folder / "lu-net.safetensors", killed)
        train(ratings, CONFIG, out=tmp_path, resume=True)
        assert names(tmp_path) == RUN_FILES
        assert names(tmp_path / "checkpoints") == {
            "lu-net.safetensors",
            "mlp.safetensors",
            "decoder.safetensors",
        }

    def test_without_a_checkpoint_starts_from_the_beginning(
        self, ratings: Ratings, whole: tuple[TrainResult, Path], tmp_path: Path
    ) -> None:
        train(ratings, CONFIG, out=tmp_path / "run", resume=True)
        assert untimed(tmp_path / "run") == untimed(whole[1])

    def test_of_a_finished_training_does_nothing(
        self, ratings: Ratings, whole: tuple[TrainResult, Path]
    ) -> None:
        result, out = whole
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
        again = Interrupt("none", 0)
        stored = train(ratings, CONFIG, out=out, resume=True, progress=again)
        assert again.seen == []
        assert stored.metrics == result.metrics
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == times
        one, other = result.trained.model.state_dict(), stored.trained.model.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_of_another_training_is_refused(self, whole: tuple[TrainResult, Path], ratings: Ratings) -> None:
        with pytest.raises(RunFolderError, match="was trained with dropout=0.1, not 0.2"):
            train(ratings, CONFIG.replace(dropout=0.2), out=whole[1], resume=True)
        with pytest.raises(RunFolderError, match="was trained with ratings_sha256="):
            train(ratings.select(torch.randperm(len(ratings))), CONFIG, out=whole[1], resume=True)

    def test_from_a_damaged_checkpoint_is_refused(self, ratings: Ratings, tmp_path: Path) -> None:
        out = tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            train(ratings, CONFIG, out=out, progress=Interrupt("LU-Net", 1), checkpoint_seconds=0)
        file = RunFolder(out).checkpoints / "lu-net.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"lu-net\.safetensors: not a whole"):
            train(ratings, CONFIG, out=out, resume=True)

    def test_there_is_one_at_each_epochs_end(self, ratings: Ratings, tmp_path: Path) -> None:
        for epoch in range(2):
            stopper = Interrupt("LU-Net", epoch)
            with pytest.raises(KeyboardInterrupt):
                train(ratings, CONFIG, out=tmp_path, resume=True, progress=stopper, checkpoint_seconds=1e6)
            assert stopper.seen == [("LU-Net", epoch)]

    @pytest.mark.parametrize("hybrid", [False, True])
    def test_from_within_an_epoch(self, ratings: Ratings, tmp_path: Path, hybrid: bool) -> None:
        """Stopped after each of its steps, a training ends with the bytes and figures of the whole one."""
        settings = {"gamma": 0.5, "split": "joint"} if hybrid else {}
        config = CONFIG.replace(**settings, mlp_epochs=1, epochs=2)
        train(ratings, config, out=tmp_path / "whole")
        reasons: list[str] = []
        while not (tmp_path / "run" / "metrics.json").exists():
            stop = Stop()
            stop.asked = True
            try:
                train(ratings, config, out=tmp_path / "run", resume=True, stop=stop)
            except Interrupted as error:
                reasons.append(str(error))
        assert all("lu-net.safetensors holds" in reason or "up to epoch" in reason for reason in reasons)
        assert len(reasons) >= 10
        for name in ("model.safetensors", "config.json", "loss.png"):
            assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")

    def test_what_cannot_be_written_leaves_the_last_checkpoint(
        self, ratings: Ratings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that is full from the second epoch on."""
        out = tmp_path / "run"
        real = files.os.replace

        def full(source: Path, target: Path) -> None:
            if Path(target).exists():
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            real(source, target)

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match=r"lu-net\.safetensors: No space left.* holds .* up to epoch 1"):
            train(ratings, CONFIG, out=out)
        monkeypatch.undo()
        assert names(out / "checkpoints") == {"lu-net.safetensors"}  # and no half-written file
        again = Interrupt("none", 0)
        train(ratings, CONFIG, out=out, resume=True, progress=again)
        assert again.seen[0] == ("LU-Net", 1)

    def test_a_file_larger_than_the_system_allows(self, tmp_path: Path) -> None:
        """The writer of safetensors meets the limit in its own code, and its error must be an OSError."""
        program = f"""
import resource, signal
import torch
from pathlib import Path
from lunet_fast.training.files import write_tensors
from lunet_fast.training.schema import CHECKPOINT_FORMAT
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path({str(tmp_path / "x.safetensors")!r})
write_tensors(path, {{"small": torch.zeros(10)}}, CHECKPOINT_FORMAT, {{"state": {{}}}})
try:
    write_tensors(path, {{"large": torch.zeros(10**6)}}, CHECKPOINT_FORMAT, {{"state": {{}}}})
except OSError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert "x.safetensors" in done.stdout, done.stderr
        assert names(tmp_path) == {"x.safetensors"}
        assert list(files.read_tensors(tmp_path / "x.safetensors", CHECKPOINT_FORMAT)[0]) == ["small"]


class TestTwoTrainings:
    def test_the_second_into_one_folder_is_refused(self, ratings: Ratings, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.checkpoints.mkdir()
        config = CONFIG.replace(mlp=False, epochs=1)
        with folder.locked():
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(RunFolderError, match="another process is training in"):
                    train(ratings, config, out=tmp_path, **options)
        train(ratings, config, out=tmp_path)

    def test_the_lock_of_a_dead_process_stops_nobody(self, ratings: Ratings, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").mkdir()
        program = f"""
import os, signal
from pathlib import Path
from lunet_fast.training.files import RunFolder
with RunFolder(Path({str(tmp_path)!r})).locked():
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -signal.SIGKILL
        assert (tmp_path / ".lock").exists()
        train(ratings, CONFIG.replace(mlp=False, epochs=1), out=tmp_path)


def test_a_file_is_what_the_package_of_the_format_writes(tmp_path: Path) -> None:
    """Byte for byte, for every type, with names and texts that JSON must escape."""
    tensors = {
        "ä b": torch.arange(5),
        "a": torch.randn(3, 4),
        "a/t": torch.randn(3, 4).t(),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
        "double": torch.randn(2, dtype=torch.float64),
        **{str(t): torch.arange(3).to(t) for t in (torch.int32, torch.int16, torch.int8, torch.uint8)},
        **{str(t): torch.arange(3).to(t) for t in (torch.bfloat16, torch.float16, torch.bool)},
    }
    write_tensors(tmp_path / "ours", tensors, CHECKPOINT_FORMAT, {"state": {"text": 'a"\\ü\n'}})
    with safe_open(tmp_path / "ours", "pt") as content:
        metadata = content.metadata()
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    for mapped in (False, True):
        read, header = read_tensors(tmp_path / "ours", CHECKPOINT_FORMAT, mapped=mapped)
        assert header["state"] == {"text": 'a"\\ü\n'}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], t) for name, t in tensors.items())
