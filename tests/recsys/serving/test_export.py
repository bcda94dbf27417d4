from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lunet_fast.recsys.serving import export
from lunet_fast.recsys.serving.export import export_vectors, item_vectors, user_vectors
from lunet_fast.recsys.serving.recommend import LUNetRecommender
from tests.cli.invoke import FORMULA, run, save_model

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    save_model(folder)
    return folder


def test_two_vectors_are_what_the_network_gets(folder: Path) -> None:
    """x of pairs that training had not, so that the network's read-out of them is the prediction."""
    trained = LUNetRecommender.load(folder).trained
    model, K = trained.model, trained.model.config.members
    every = torch.cartesian_prod(torch.arange(60), torch.arange(40))
    users, items = every[~model.interactions.contains(*every.T)].T
    with torch.no_grad():
        x = model.output(users, items).x
        halves = [user_vectors(model, users), item_vectors(model, items, model.histories())]
    joined = torch.cat([half.view(len(users), K, -1) for half in halves], dim=-1).transpose(0, 1)
    assert joined.dtype == torch.float32
    torch.testing.assert_close(joined, x)


def test_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROWS", 25)
    recommender = LUNetRecommender.load(folder)
    model = recommender.trained.model
    written = export_vectors(recommender, tmp_path / "a" / "b")
    assert [(each.path.name, each.rows, each.size) for each in written] == [
        ("users.parquet", 60, 8),
        ("items.parquet", 40, 8),
    ]
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"users.parquet", "items.parquet"}
    users, items = (parquet.read_table(each.path) for each in written)
    assert users.schema.names == ["id", "vector", "training_ratings"]
    assert items.schema.names == ["id", "vector", "training_ratings", "title"]
    assert str(users.schema.field("vector").type) == "fixed_size_list<element: float not null>[8]"
    assert json.loads(users.schema.metadata[b"lunet_fast"]) == {"members": 2, "embedding_size": 4}
    for table, ids, vectors, counts in (
        (users, recommender.users, user_vectors(model, torch.arange(60)), model.interactions.user_counts),
        (items, recommender.items, item_vectors(model, torch.arange(40)), model.interactions.item_counts),
    ):
        assert table["id"].to_pylist() == ids.ids.tolist()
        found = np.array(table["vector"].to_pylist(), np.float32)
        np.testing.assert_allclose(found, vectors, rtol=1e-5, atol=1e-7)
        assert table["training_ratings"].to_pylist() == counts.tolist()
    assert items["title"].to_pylist()[:2] == [FORMULA, "Film 1, uncut"]


def test_text_ids_without_titles(tmp_path: Path) -> None:
    recommender = save_model(tmp_path / "run", titles=False, text_ids=True)
    _, items = export_vectors(recommender, tmp_path)
    table = parquet.read_table(items.path)
    assert table.schema.names == ["id", "vector", "training_ratings"]
    assert table["id"].to_pylist()[0] == "item-0, vol. 2"


class TestCommand:
    def test_writes_both(self, folder: Path, tmp_path: Path) -> None:
        result = run("export", "--run", folder, "--out", tmp_path / "v")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines() == [
            f"{tmp_path / 'v' / 'users.parquet'}: 60 vectors of 8 numbers",
            f"{tmp_path / 'v' / 'items.parquet'}: 40 vectors of 8 numbers",
        ]

    def test_refusals(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        result = run("export", "--run", folder, "--out", tmp_path / "file")
        assert result.exit_code == 2
        assert "is a file: name a folder" in result.stderr
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        result = run("export", "--run", folder, "--out", tmp_path / "v")
        assert result.exit_code == 2
        assert result.stderr == "Error: writing Parquet needs pyarrow: pip install pyarrow\n"
        assert not (tmp_path / "v").exists()
