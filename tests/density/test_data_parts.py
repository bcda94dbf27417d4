"""Parts as published, one class of labelled rows, images with their test images."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lunet_fast.density import data, pictures
from lunet_fast.density.config import DensityConfig
from lunet_fast.density.data import DataError, Rows
from lunet_fast.density.data_rows import TEST, TRAINING, VALIDATION
from lunet_fast.density.model import DensityModel, build_flow
from lunet_fast.density.preprocessing import Preprocessing
from tests.density.test_data import idx


def numbered(count: int, part: list[int] | None = None) -> Rows:
    values = torch.arange(count, dtype=torch.float32).unsqueeze(-1)
    return Rows("numbers", values, part=None if part is None else torch.tensor(part, dtype=torch.int8))


def test_parts_are_those_of_the_publisher() -> None:
    marks = [TRAINING] * 12 + [VALIDATION] * 3 + [TEST] * 5
    for seed in (0, 1):
        parts = data.split(numbered(20, marks), seed)
        assert parts.training.values.flatten().tolist() == list(range(12))
        assert parts.validation.values.flatten().tolist() == [12, 13, 14]
        assert parts.test.values.flatten().tolist() == [15, 16, 17, 18, 19]


def test_validation_rows_are_drawn_where_none_are_published() -> None:
    rows = numbered(40, [TRAINING] * 30 + [TEST] * 10)
    first, second = (data.split(rows, seed) for seed in (0, 1))
    for parts in (first, second):
        assert parts.test.values.flatten().tolist() == list(range(30, 40))
        assert len(parts.validation) == 3
        both = torch.cat([parts.training.values, parts.validation.values]).flatten()
        assert both.sort().values.tolist() == list(range(30))
    assert not torch.equal(first.validation.values, second.validation.values)


def test_parts_that_cannot_be() -> None:
    rows = numbered(20, [TRAINING] * 20)
    with pytest.raises(DataError, match="none of its 20 rows is one of the publisher's test rows"):
        data.split(rows, 0)
    rows = numbered(20, [TRAINING] * 5 + [TEST] * 15)
    with pytest.raises(DataError, match="has 5 rows: at least 10"):
        data.split(rows, 0)
    with pytest.raises(DataError, match="--test-file must not be given"):
        data.split(rows, 0, numbered(3))


def test_one_class() -> None:
    rows = Rows("pets", torch.arange(6.0).unsqueeze(-1), torch.tensor([0, 1, 2, 1, 0, 1]))
    named = Rows("pets", rows.values, rows.labels, label_names=("cat", "dog, small", "eel"))
    for each, label in ((rows, "1"), (named, "dog, small")):
        found = data.of_class(each, label)
        assert found.values.flatten().tolist() == [1, 3, 5]
        assert found.labels is None
        assert found.label_names is None
        assert data.split_name(found.name) == ("pets", label)
    assert data.split_name("pets") == ("pets", None)
    with pytest.raises(DataError, match="has no class 1; --class must be one of cat, dog, small, eel"):
        data.of_class(named, "1")
    with pytest.raises(DataError, match="has no labels"):
        data.of_class(numbered(3), "1")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, count in (("train", 30), ("t10k", 7)):
        pixels, marks = np.full((count, 2, 2), count), np.arange(count) % 3
        for kind, content, pack in (("images-idx3", pixels, True), ("labels-idx1", marks, False)):
            packed = gzip.compress(idx(content)) if pack else idx(content)
            (tmp_path / f"{name}-{kind}-ubyte{'.gz' if pack else ''}").write_bytes(packed)
    for file in tmp_path.glob("*labels*"):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    return tmp_path / "train-images-idx3-ubyte.gz"


def test_images_are_tested_on_those_beside_them(images: Path) -> None:
    rows = data.read(str(images))
    parts = data.split(rows, 0)
    assert (len(parts.training), len(parts.validation), len(parts.test)) == (27, 3, 7)
    assert set(parts.test.values.flatten().tolist()) == {7.0}
    assert parts.test.labels is not None
    assert parts.test.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert rows.source.count("SHA-256") == 4
    assert len(data.split(data.of_class(rows, "2"), 0).test) == 2


def test_what_images_are_is_known_by_their_content(images: Path) -> None:
    source = data.read(str(images)).source
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes()), compresslevel=1))
    assert data.read(str(images)).source == source
    labels = images.with_name("train-labels-idx1-ubyte.gz")
    labels.write_bytes(gzip.compress(idx(np.zeros(30))))
    assert data.read(str(images)).source != source


def test_test_images_of_another_kind(images: Path) -> None:
    test = images.with_name("t10k-images-idx3-ubyte.gz")
    test.write_bytes(gzip.compress(idx(np.zeros((7, 2, 3)))))
    with pytest.raises(DataError, match=r"has images of \(2, 3\) pixels"):
        data.read(str(images))
    test.write_bytes(gzip.compress(idx(np.zeros((7, 2, 2)))))
    images.with_name("t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="must both have labels"):
        data.read(str(images))


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("conditional", [False, True])
def test_interpolation_of_any_number_of_rows(count: int, conditional: bool) -> None:
    values = torch.randint(0, 17, (count, 4)).float()
    rows = Rows("few", values, torch.zeros(count, dtype=torch.int64), 17, (2, 2))
    config = DensityConfig(layers=1, input_bins=0, components=1, conditional=conditional)
    shares = torch.ones(3) / 3 if conditional else None
    model = DensityModel(build_flow(config, 4, 3), Preprocessing(17), 4, shares)
    found = pictures.interpolation(model, rows)
    assert found.shape == (min(pictures.SIDE, count // 2), pictures.SIDE, 4)


def test_levels_that_float32_cannot_tell_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0, 1], [2, 3]]))
    with pytest.raises(DataError, match="more than the 16777216 that float32 tells apart"):
        data.read(str(tmp_path / "x.npy"), levels=1 << 25)
