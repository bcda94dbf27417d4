"""Run folders in a hostile or busy place: links, races, temporary files, other people's data."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import Rows
from lunet_fast.density.training import train_density
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.model.training import train
from lunet_fast.training.files import RunFolder, RunFolderError, write_atomically, write_json
from tests.recsys.synthetic import latent_frame, quick_config

SHORT = DensityConfig(layers=1, input_bins=0, components=1, steps=2, round_steps=1)


def rows(**changes: Any) -> Rows:
    values = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    return replace(Rows("made up", values, torch.arange(40) % 2, source="a generator"), **changes)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Somebody's folder, with what a training would delete."""
    folder = tmp_path / "elsewhere"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("model.safetensors", "metrics.json", "checkpoints/lu-net.safetensors", "lu-net.safetensors"):
        (folder / name).write_text("precious")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("place", ["", "checkpoints", ".lock"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_links_are_refused_before_anything_is_deleted(
    place: str, options: dict[str, bool], elsewhere: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if place:
        run.mkdir()
    target = elsewhere / "model.safetensors" if place == ".lock" else elsewhere
    (run / place).symlink_to(target)
    before = contents(elsewhere)
    with pytest.raises(RunFolderError, match=r"is a link to .*elsewhere"):
        train_density(rows(), SHORT, out=run, **options)
    assert contents(elsewhere) == before
    assert (run / place).is_symlink()


def test_a_link_that_is_put_there_meanwhile_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(resume=False, overwrite=True)
    folder.checkpoints.rmdir()
    folder.checkpoints.symlink_to(elsewhere)
    before = contents(elsewhere)
    with folder.locked(), pytest.raises(RunFolderError, match="checkpoints is a link"):
        folder.begin({}, resume=False, overwrite=True)
    assert contents(elsewhere) == before


def test_of_two_trainings_that_race_the_later_does_not_wipe_the_finished_one(tmp_path: Path) -> None:
    """Both have found an empty folder, and one ends before the other begins."""
    late = RunFolder(tmp_path)
    late.prepare(resume=False, overwrite=False)
    train_density(rows(), SHORT, out=tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "metrics.json").read_bytes()
    with late.locked(), pytest.raises(RunFolderError, match="holds a finished training"):
        late.begin({}, resume=False, overwrite=False)
    assert ((tmp_path / "model.safetensors").read_bytes(), (tmp_path / "metrics.json").read_bytes()) == before
    with late.locked():
        late.begin({"a": 1}, resume=False, overwrite=True)
    assert not late.is_started()


def test_temporary_files_are_nobodys_and_as_public_as_the_umask_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link of the name that is drawn is not written through; and the umask of the process stays, so that
    threads which make files meanwhile get what theirs says."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    names = iter(["a", "b"])
    monkeypatch.setattr("secrets.token_hex", lambda n: next(names))
    (tmp_path / ".lunet-fast-a.txt").symlink_to(precious)
    target = tmp_path / "new.txt"
    with pytest.raises(FileExistsError, match="cannot write"):
        write_atomically(target, lambda file: file.write_text("x"))
    assert precious.read_text() == "precious"
    assert (tmp_path / ".lunet-fast-a.txt").is_symlink()
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was changed"))
    write_atomically(target, lambda file: file.write_text("x"))
    monkeypatch.undo()
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    "other",
    [
        rows(values=rows().values + 1e-3),
        rows(labels=1 - torch.arange(40) % 2),
        rows(label_names=("a", "b")),
        rows(part=(torch.arange(40) % 3).to(torch.int8)),
    ],
    ids=["values", "labels", "names", "parts"],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_density_is_resumed_on_its_own_data_alone(finished: bool, other: Rows, tmp_path: Path) -> None:
    train_density(rows(), SHORT, out=tmp_path)
    if not finished:
        (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunFolderError, match="rows_sha256=.*give the same settings and data"):
        train_density(other, SHORT, out=tmp_path, resume=True)
    train_density(rows(), SHORT, out=tmp_path, resume=True)


@pytest.mark.parametrize("finished", [False, True])
def test_a_recommender_is_resumed_on_its_own_ids_alone(finished: bool, tmp_path: Path) -> None:
    """The same indices under other names are other people."""

    def ratings(shift: int = 0) -> Ratings:
        frame = latent_frame(8, 6, 30)
        return from_frame(frame.assign(user=frame["user"] + shift), scale=(1, 5))

    config = quick_config(epochs=1, mlp=False)
    train(ratings(), config, out=tmp_path)
    if not finished:
        (tmp_path / "metrics.json").unlink()
    with pytest.raises(RunFolderError, match="ids_sha256="):
        train(ratings(1000), config, out=tmp_path, resume=True)
    train(ratings(), config, out=tmp_path, resume=True)


def test_a_folder_from_before_there_were_digests_is_resumed(tmp_path: Path) -> None:
    from lunet_fast.training.files import read_json

    train_density(rows(), SHORT, out=tmp_path)
    recorded = read_json(tmp_path / "config.json")
    del recorded["rows_sha256"]
    write_json(tmp_path / "config.json", recorded)
    train_density(rows(), SHORT, out=tmp_path, resume=True)
    write_json(tmp_path / "config.json", {**recorded, "layers": "\x1b[31m" * 100})
    with pytest.raises(RunFolderError, match=r"layers='\\x1b\[31m") as caught:
        train_density(rows(), SHORT, out=tmp_path, resume=True)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


WRITING = """
import sys, time
from pathlib import Path
from lunet_fast.__main__ import end_in_order
from lunet_fast.training.files import write_atomically

def slowly(file):
    file.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

end_in_order()
write_atomically(Path(sys.argv[1]), slowly)
"""


def test_sigterm_leaves_no_temporary_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITING, str(tmp_path / "out.csv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert [p.name for p in tmp_path.iterdir()] != []
        process.terminate()
        assert process.wait(30) == 143
    assert list(tmp_path.iterdir()) == []
