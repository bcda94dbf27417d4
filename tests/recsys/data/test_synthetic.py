from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lunet_fast.recsys.data import synthetic
from lunet_fast.recsys.data.ratings import read_ratings
from lunet_fast.recsys.data.synthetic import synthesize

parquet = pytest.importorskip("pyarrow.parquet")


class TestSynthesize:
    def test_has_the_numbers_asked_for_and_no_pair_twice(self, tmp_path: Path) -> None:
        heard: list[int] = []
        synthesize(tmp_path / "x.parquet", users=300, items=200, ratings=9000, seed=1, progress=heard.append)
        ratings = read_ratings(tmp_path / "x.parquet", scale=(0.5, 5))  # refuses a repeated pair
        assert (ratings.n_users, ratings.n_items, len(ratings)) == (300, 200, 9000)
        assert sum(heard) == 9000
        counts = np.bincount(ratings.user.numpy())
        assert counts.min() >= 20
        assert counts.max() <= 100
        assert set((ratings.rating * 2).int().tolist()) <= set(range(1, 11))
        assert bool((ratings.user.diff() >= 0).all())
        assert ratings.timestamp is not None
        assert 820_454_400 <= int(ratings.timestamp.min()) <= int(ratings.timestamp.max()) < 1_672_500_000

    def test_few_have_most(self, tmp_path: Path) -> None:
        synthesize(tmp_path / "x.parquet", users=2000, items=1000, ratings=100_000)
        ratings = read_ratings(tmp_path / "x.parquet")
        for index in (ratings.user, ratings.item):
            counts = np.sort(np.bincount(index.numpy()))[::-1]
            assert counts[: len(counts) // 10].sum() > 0.25 * len(ratings)

    def test_depends_on_the_seed_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = {}
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            path = tmp_path / f"{name}.parquet"
            synthesize(path, users=100, items=80, ratings=2500, seed=seed)
            made[name] = parquet.read_table(path)
        assert made["a"].equals(made["b"])
        assert not made["a"].equals(made["c"])

    def test_several_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(synthetic, "BLOCK_ROWS", 500)
        monkeypatch.setattr(synthetic, "ROW_GROUP", 300)
        synthesize(tmp_path / "x.parquet", users=100, items=80, ratings=2500)
        assert parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups > 5
        assert len(read_ratings(tmp_path / "x.parquet")) == 2500

    def test_as_dense_as_it_may_be(self, tmp_path: Path) -> None:
        """Every user has half of the items: the popular ones are drawn in vain most of the time."""
        synthesize(tmp_path / "x.parquet", users=30, items=400, ratings=6000)
        counts = np.bincount(read_ratings(tmp_path / "x.parquet").user.numpy())
        assert (counts == 200).all()

    def test_tells_the_error_of_the_truth(self, tmp_path: Path) -> None:
        values = synthesize(tmp_path / "x.parquet", users=300, items=200, ratings=9000)
        stored = json.loads(parquet.ParquetFile(tmp_path / "x.parquet").metadata.metadata[b"lunet_fast"])
        assert stored == values
        rating = read_ratings(tmp_path / "x.parquet").rating.double()
        assert values["variance"] == pytest.approx(float(rating.var(unbiased=False)))
        # The noise's variance, 1/48 of rounding to halves, less what clipping takes.
        assert 0.35 < values["truth_mse"] < 0.7**2 + 1 / 48 + 0.02

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"users": 0}, "users=0 must be at least 1"),
            ({"ratings": 9}, "ratings=9 must be at least one a user .* from 10 to 100"),
            ({"ratings": 101}, "from 10 to 100"),
            ({"seed": -1}, "seed=-1"),
        ],
    )
    def test_refuses(self, tmp_path: Path, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            synthesize(tmp_path / "x.parquet", **{"users": 10, "items": 20, "ratings": 50, **changes})
        with pytest.raises(ValueError, match=r"must end in \.parquet"):
            synthesize(tmp_path / "x.csv", users=10, items=20, ratings=50)
        assert not list(tmp_path.iterdir())
