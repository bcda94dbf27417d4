"""POWER, GAS, HEPMASS, MINIBOONE, BSDS300 in the layout of MAF's repository, small and synthetic.

What is expected is written here anew with pandas and counting, after the published code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lunet_fast.density import data
from lunet_fast.density.data import DataError, Rows
from lunet_fast.density.data_published import DATASETS, told_of_sizes
from lunet_fast.density.data_rows import TEST, TRAINING, VALIDATION

RNG = np.random.default_rng(0)


def parts_of(rows: Rows) -> list[np.ndarray]:
    assert rows.part is not None
    return [rows.values[rows.part == part].numpy() for part in (TRAINING, VALIDATION, TEST)]


def check(rows: Rows, expected: list[np.ndarray]) -> None:
    for found, wanted in zip(parts_of(rows), expected, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    parts = data.split(rows, 0)
    for found, wanted in zip((parts.training, parts.validation, parts.test), expected, strict=True):
        assert len(found) == len(wanted)


def tenths(values: np.ndarray) -> list[np.ndarray]:
    test = int(0.1 * len(values))
    rest = values[:-test]
    validation = int(0.1 * len(rest))
    return [rest[:-validation], rest[-validation:], values[-test:]]


def standardised(parts: list[np.ndarray]) -> list[np.ndarray]:
    known = np.vstack(parts[:2])
    return [(part - known.mean(axis=0)) / known.std(axis=0) for part in parts]


@pytest.mark.parametrize("inside", [True, False])
def test_power(tmp_path: Path, inside: bool) -> None:
    values = RNG.normal(5, 2, (237, 8)).round(2)
    folder = tmp_path / "power" if inside else tmp_path
    folder.mkdir(exist_ok=True)
    np.save(folder / "data.npy", values)
    rng = np.random.RandomState(42)
    expected = values.copy()
    rng.shuffle(expected)
    expected = np.delete(expected, 3, axis=1)
    expected = np.delete(expected, 1, axis=1)
    voltage = 0.01 * rng.rand(237, 1)
    active = 0.001 * rng.rand(237, 1)
    meters = rng.rand(237, 3)
    expected = expected + np.hstack((active, voltage, meters, np.zeros((237, 1))))
    check(data.read("power", data_dir=tmp_path), standardised(tenths(expected)))


def gas_frame() -> pd.DataFrame:
    """Sixteen sensors of which every second follows the one before."""
    base = RNG.normal(size=(300, 8)) * 3 + 1
    sensors = np.repeat(base, 2, axis=1) + RNG.normal(size=(300, 16)) * np.tile([0, 0.1], 8)
    names = ["Time", "Meth", "Eth", *(f"R{n}" for n in range(16))]
    return pd.DataFrame(np.hstack([RNG.normal(size=(300, 3)), sensors]), columns=names)


@pytest.mark.parametrize("suffix", ["npy", "csv", "parquet"])
def test_gas(tmp_path: Path, suffix: str) -> None:
    frame = gas_frame()
    (tmp_path / "gas").mkdir()
    path = tmp_path / "gas" / f"ethylene_CO.{suffix}"
    if suffix == "npy":
        np.save(path, frame.to_numpy())
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    wanted = frame.drop(columns=["Time", "Meth", "Eth"])
    while ((wanted.corr() > 0.98).to_numpy().sum(axis=1) > 1).any():
        several = (wanted.corr() > 0.98).to_numpy().sum(axis=1) > 1
        wanted = wanted.drop(columns=wanted.columns[np.where(several)[0][0]])
    assert wanted.shape == (300, 8)
    wanted = (wanted - wanted.mean()) / wanted.std()
    check(data.read("gas", data_dir=tmp_path), tenths(wanted.to_numpy()))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    gas_frame().to_pickle(tmp_path / "ethylene_CO.pickle")
    with pytest.raises(DataError, match="a pickle may run any program and is not read: convert it"):
        data.read("gas", data_dir=tmp_path)
    gas_frame().to_parquet(tmp_path / "ethylene_CO.parquet")
    assert data.read("gas", data_dir=tmp_path).features == 8


def hepmass_files(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Features 3, 7 and 20 are whole numbers of few values; the test file has a column more."""
    frames = []
    for count, more in ((400, 0), (150, 1)):
        values = RNG.normal(size=(count, 27 + more)) * 2 + 1
        values[:, [3, 7, 20]] = values[:, [3, 7, 20]].clip(-1, 2).round()
        label = (RNG.random(count) < 0.5).astype(float)
        names = ["# label", *(f"f{n}" for n in range(27)), *["mass"] * more]
        frames.append(pd.DataFrame(np.hstack([label[:, None], values]), columns=names))
    for name, frame in zip(("1000_train.csv", "1000_test.csv"), frames, strict=True):
        frame.to_csv(folder / name, index=False)
    return frames[0], frames[1]


def test_hepmass(tmp_path: Path) -> None:
    (tmp_path / "hepmass").mkdir()
    training, test = hepmass_files(tmp_path / "hepmass")
    training = training[training["# label"] == 1].drop(columns="# label")
    test = test[test["# label"] == 1].drop(columns=["# label", "mass"])
    shift, scale = training.mean(), training.std()
    training, test = (training - shift) / scale, (test - shift) / scale
    kept = [k for k in range(27) if Counter(training.iloc[:, k])[training.iloc[:, k].min()] <= 5]
    assert len(kept) == 24
    first, last = training.to_numpy()[:, kept], test.to_numpy()[:, kept]
    held = int(0.1 * len(first))
    check(data.read("hepmass", data_dir=tmp_path), [first[:-held], first[-held:], last])


def test_hepmass_with_a_header_of_another_width(tmp_path: Path) -> None:
    hepmass_files(tmp_path)
    expected = parts_of(data.read("hepmass", data_dir=tmp_path))
    file = tmp_path / "1000_test.csv"
    head, _, rows = file.read_text().partition("\n")
    file.write_text(head.removesuffix(",mass") + "\n" + rows)
    check(data.read("hepmass", data_dir=tmp_path), expected)
    lines = rows.splitlines()
    lines[10] += ",1"
    file.write_text("\n".join([head, *lines]))
    with pytest.raises(DataError, match="line 12: has 30 fields and the header 29"):
        data.read("hepmass", data_dir=tmp_path)


def test_miniboone(tmp_path: Path) -> None:
    values = RNG.normal(3, 2, (200, 43))
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", values)
    check(data.read("miniboone", data_dir=tmp_path), standardised(tenths(values)))


def test_bsds300(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    parts = [RNG.normal(size=(count, 63)).astype(np.float32) for count in (50, 10, 20)]
    (tmp_path / "BSDS300").mkdir()
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, part in zip(("train", "validation", "test"), parts, strict=True):
            file[name] = part
    check(data.read("bsds300", data_dir=tmp_path), parts)
    check(data.read("bsds300", data_dir=tmp_path / "BSDS300"), parts)


def test_hdf5_that_is_not_that(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "BSDS300.hdf5"
    other = tmp_path / "other.hdf5"
    part = np.zeros((20, 63), np.float32)
    for name in ("train", "validation", "test"):
        with h5py.File(other, "a") as file:
            file[name] = part

    def lying(file: object) -> None:
        file.create_dataset("train", (10**12, 63), "f4", chunks=(1, 63), fillvalue=1.0)  # type: ignore[attr-defined]

    def linked(file: object) -> None:
        file["train"] = h5py.ExternalLink("other.hdf5", "train")  # type: ignore[index]

    def outside(file: object) -> None:
        external = [(str(tmp_path / "secret"), 0, 20 * 63 * 4)]
        file.create_dataset("train", (20, 63), "f4", external=external)  # type: ignore[attr-defined]

    def virtual(file: object) -> None:
        layout = h5py.VirtualLayout((20, 63), "f4")
        layout[:] = h5py.VirtualSource("other.hdf5", "train", (20, 63))
        file.create_virtual_dataset("train", layout)  # type: ignore[attr-defined]

    for write, told in (
        (lying, "holds in 'train' numbers of 252,000,000,000,000 bytes"),
        (linked, "has no array 'train' of its own"),
        (outside, "'train' is no array in this file"),
        (virtual, "'train' is no array in this file"),
        (lambda file: file.create_group("train"), "'train' is no array"),
        (lambda file: file.create_dataset("train", data=[[b"x"]]), "not numbers"),
        (lambda file: None, "has no array 'train'"),
    ):
        path.unlink(missing_ok=True)
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(DataError, match=told):
            data.read("bsds300", data_dir=tmp_path)
    path.write_bytes(other.read_bytes()[:3000])
    with pytest.raises(DataError, match="the HDF5 file is damaged"):
        data.read("bsds300", data_dir=tmp_path)


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("middle", ["val.npy", "validation.npy", "valid.npy"])
def test_parts_that_are_there_already(tmp_path: Path, name: str, middle: str) -> None:
    parts = [RNG.normal(size=(count, 4)).astype(np.float32) for count in (30, 5, 8)]
    for file, part in zip(("train.npy", middle, "test.npy"), parts, strict=True):
        np.save(tmp_path / file, part)
    rows = data.read(name, data_dir=tmp_path)
    check(rows, parts)
    assert rows.source.count("SHA-256") == 3
    np.save(tmp_path / "test.npy", parts[2][:, :3])
    with pytest.raises(DataError, match="as many features"):
        data.read(name, data_dir=tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="name their folder with --data-dir DIR, which holds data.npy"
    ):
        data.read("power")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        data.read("power", data_dir=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no hepmass; put there 1000_train\.csv and 1000_test"):
        data.read("hepmass", data_dir=tmp_path)


def test_files_of_another_data_set(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", RNG.normal(size=(50, 43)))
    with pytest.raises(DataError, match="has 43 columns, expected 8: not the published file"):
        data.read("power", data_dir=tmp_path)
    np.save(tmp_path / "data.npy", np.ones((50, 8)))
    with pytest.raises(DataError, match="column 5 .* is constant"):
        data.read("power", data_dir=tmp_path)
    np.save(tmp_path / "data.npy", RNG.normal(size=(5, 43)))
    with pytest.raises(DataError, match="must have rows"):
        data.read("miniboone", data_dir=tmp_path)


def test_sizes_are_compared_with_the_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "data.npy", RNG.normal(size=(200, 43)))
    rows = data.read("miniboone", data_dir=tmp_path)
    assert "162 + 18 + 20 rows of 43 features, and the published figures are of 29,556" in told_of_sizes(
        "miniboone", rows
    )
    changed = replace(DATASETS["miniboone"], rows=(162, 18, 20))
    monkeypatch.setitem(DATASETS, "miniboone", changed)
    assert told_of_sizes("miniboone", rows) == ""


def test_published_sizes_are_those_of_the_splits() -> None:
    """Of the published counts of rows, where the parts are tenths."""
    for name, count in (("power", 2_049_280), ("gas", 1_052_065), ("miniboone", 36_488)):
        test = int(0.1 * count)
        validation = int(0.1 * (count - test))
        assert DATASETS[name].rows == (count - test - validation, validation, test)
