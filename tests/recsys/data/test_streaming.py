from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lunet_fast.recsys.data import synthetic
from lunet_fast.recsys.data.ratings import RatingFileError
from lunet_fast.recsys.data.streaming import RatingStream
from lunet_fast.recsys.data.synthetic import synthesize
from tests.recsys.synthetic import latent_frame

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "ratings.parquet"
    latent_frame(ratings=1700, text_ids=True).to_parquet(path, row_group_size=128)
    return path


@pytest.fixture(scope="module")
def stream(path: Path) -> RatingStream:
    return RatingStream.open(path, buffer_rows=400)


def rows(batches: list[tuple[Tensor, Tensor, Tensor]]) -> Counter[tuple[int, int, float]]:
    return Counter(row for batch in batches for row in zip(*(c.tolist() for c in batch), strict=True))


class TestOpen:
    def test_statistics_are_those_of_the_training_part(self, stream: RatingStream) -> None:
        training, test = stream.in_memory()
        assert (stream.n_rows, stream.n_test) == (len(training), len(test))
        assert stream.n_rows + stream.n_test == 1700
        assert 0.15 < stream.n_test / 1700 < 0.25
        assert stream.mean == pytest.approx(float(training.rating.double().mean()))
        assert torch.equal(stream.user_count, torch.bincount(training.user, minlength=stream.n_users))
        sums = torch.zeros(stream.n_items, dtype=torch.float64)
        sums.index_add_(0, training.item, training.rating.double())
        torch.testing.assert_close(stream.item_sum, sums)
        assert stream.scale == (1.0, 5.0)

    def test_the_split_is_the_pairs_own(self, path: Path, stream: RatingStream, tmp_path: Path) -> None:
        """Neither the order of the rows nor the files nor what else is there changes a pair's part."""
        frame = pd.read_parquet(path)
        shuffled = frame.sample(frac=0.7, random_state=1)
        (tmp_path / "parts").mkdir()
        for place in range(3):
            shuffled[place::3].to_parquet(tmp_path / "parts" / f"{place}.parquet", row_group_size=50)
        parts = RatingStream.open(tmp_path / "parts")

        def tested(one: RatingStream) -> set[tuple[str, str]]:
            _, test = one.in_memory()
            return set(zip(one.users.ids[test.user], one.items.ids[test.item], strict=True))

        kept = set(zip(shuffled["user"], shuffled["item"], strict=True))
        assert tested(parts) == tested(stream) & kept

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("rating", float("nan"), "row 701"),
            ("rating", float("inf"), "row 701"),
            ("user", None, "row 701"),
            ("item", "", "row 701"),
        ],
    )
    def test_a_wrong_value_is_named(self, tmp_path: Path, column: str, value: object, message: str) -> None:
        frame = latent_frame(text_ids=True)
        frame[column] = frame[column].astype(object)
        frame.loc[700, column] = value
        if column == "rating":
            frame[column] = frame[column].astype(float)
        frame.to_parquet(tmp_path / "x.parquet", row_group_size=100)
        with pytest.raises(RatingFileError, match=rf"x\.parquet.*{message}"):
            RatingStream.open(tmp_path / "x.parquet")

    @pytest.mark.parametrize("wrong", [2**64 - 1, b"\xff"])
    def test_an_id_that_cannot_be_read(self, tmp_path: Path, wrong: object) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        ids = pa.array([wrong], pa.uint64() if isinstance(wrong, int) else pa.binary())
        parquet.write_table(pa.table({"user": ids, "item": [1], "rating": [1.0]}), tmp_path / "x.parquet")
        with pytest.raises(RatingFileError, match=r"x\.parquet, rows 1 to 1: a user id cannot be read"):
            RatingStream.open(tmp_path / "x.parquet", test_share=0.0)

    def test_a_file_that_is_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
        with pytest.raises(RatingFileError, match=r"x\.parquet"):
            RatingStream.open(tmp_path / "x.parquet")
        with pytest.raises(FileNotFoundError):
            RatingStream.open(tmp_path / "none.parquet")

    def test_a_file_that_changes_after_it_was_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        latent_frame().to_parquet(path)
        stream = RatingStream.open(path)
        latent_frame(seed=1, ratings=900).to_parquet(path)
        with pytest.raises(RatingFileError, match="changed"):
            list(stream.batches(0, 100))


class TestBatches:
    def test_an_epoch_is_the_training_part_in_another_order(self, stream: RatingStream) -> None:
        training, _ = stream.in_memory()
        expected = rows([(training.user, training.item, training.rating)])
        first, second = (list(stream.batches(epoch, 64)) for epoch in (0, 1))
        for batches in (first, second):
            assert [len(batch[0]) for batch in batches[:-1]] == [64] * (len(batches) - 1)
            assert rows(batches) == expected
        assert not torch.equal(first[0][0], second[0][0])
        again = list(stream.batches(0, 64))
        assert all(
            torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
        )

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 700), st.integers(0, 40), st.integers(1, 2000), st.integers(0, 3))
    def test_a_later_start_gives_the_rest(
        self, path: Path, batch_size: int, start: int, buffer_rows: int, epoch: int
    ) -> None:
        stream = RatingStream.open(path, buffer_rows=buffer_rows)
        whole = list(stream.batches(epoch, batch_size))[start:]
        rest = list(stream.batches(epoch, batch_size, start=start))
        assert len(whole) == len(rest)
        assert all(
            torch.equal(a, b) for x, y in zip(whole, rest, strict=True) for a, b in zip(x, y, strict=True)
        )

    def test_test_batches_and_pairs_of_some_users(self, stream: RatingStream) -> None:
        training, test = stream.in_memory()
        assert rows(list(stream.test_batches(50))) == rows([(test.user, test.item, test.rating)])
        users = torch.tensor([3, 17, 40])
        for found, part in ((stream.seen(users), training), (stream.test_pairs(users), test)):
            wanted = torch.isin(part.user, users)
            assert torch.equal(found[0], part.user[wanted])
            assert torch.equal(found[1], part.item[wanted])

    def test_closing_early_ends_the_reader(self, stream: RatingStream) -> None:
        import threading

        before = threading.active_count()
        batches = stream.batches(0, 16)
        next(batches)
        batches.close()
        assert threading.active_count() == before

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its peak memory")
    def test_memory_does_not_grow_with_the_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(synthetic, "ROW_GROUP", 8192)
        program = """
import sys
from lunet_fast.recsys.data import parquet_pieces
from lunet_fast.recsys.data.streaming import RatingStream
parquet_pieces.PIECE_ROWS = 8192
stream = RatingStream.open(sys.argv[1], buffer_rows=30_000)
rows = sum(len(batch[0]) for batch in stream.batches(0, 1000))
# Not getrusage, whose peak has the parent's in it.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, peak)
"""
        peaks = []
        for ratings in (300_000, 2_400_000):
            path = tmp_path / f"{ratings}.parquet"
            synthesize(path, users=4000, items=3000, ratings=ratings)
            done = subprocess.run(
                [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            count, kilobytes = map(int, done.stdout.split())
            assert 0.75 * ratings < count < 0.85 * ratings
            peaks.append(kilobytes)
        # The rows themselves would be 42 MB more as three tensors.
        assert peaks[1] - peaks[0] < 25_000


class TestBombs:
    """Files of few bytes that unpack to many, which reading them at once refuses too (test_ratings)."""

    def put(self, folder: Path, user: object, **settings: object) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        n = len(user)  # type: ignore[arg-type]
        table = pa.table({"user": user, "item": np.arange(n) // 1000, "rating": np.ones(n, np.float32)})
        parquet.write_table(table, folder / "bomb.parquet", **settings)
        return folder / "bomb.parquet"

    def test_many_rows_of_few_bytes(self, tmp_path: Path) -> None:
        path = self.put(tmp_path, np.zeros(10_000_000, np.int64))
        assert path.stat().st_size < 1 << 20
        with pytest.raises(
            RatingFileError, match="state 10,000,000 rows of 240,000,000 bytes, as no ratings do"
        ):
            RatingStream.open(path)
        (tmp_path / "good.parquet").write_bytes(
            self.put(tmp_path, np.arange(100), use_dictionary=False).read_bytes()
        )
        self.put(tmp_path, np.zeros(10_000_000, np.int64))
        with pytest.raises(RatingFileError, match=r"bomb\.parquet.* as no ratings do"):
            RatingStream.open(tmp_path)
        # As the message says.
        settings = {"compression": "none", "use_dictionary": False}
        assert len(RatingStream.open(self.put(tmp_path, np.zeros(100_000, np.int64), **settings))) == 100_000

    def test_a_large_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file may be larger than the limit, as it is read a page at a time; a page may not."""
        monkeypatch.setenv("LUNET_FAST_MAX_BYTES", str(1 << 20))
        users = np.arange(400_000)
        settings = {"compression": "none", "use_dictionary": False}
        path = self.put(tmp_path, users, data_page_size=1 << 18, **settings)
        assert path.stat().st_size > 1 << 20
        assert len(RatingStream.open(path)) == 400_000
        path = self.put(tmp_path, users, data_page_size=1 << 22, max_rows_per_page=400_000, **settings)
        with pytest.raises(
            RatingFileError, match="one of its pages is 3,200,0.. bytes, more than the 1,048,576"
        ):
            RatingStream.open(path)

    def test_a_long_text_named_often_is_kept_once(self, tmp_path: Path) -> None:
        import pyarrow as pa

        for length, refused in ((100_000, False), (200_000, True)):
            text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), ["x" * length])
            path = self.put(tmp_path, text.cast(pa.string()))
            pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
            pa.set_memory_pool(pool)
            try:
                if refused:
                    with pytest.raises(RatingFileError, match="user xxx.* more than 131,072 characters"):
                        RatingStream.open(path)
                else:
                    assert RatingStream.open(path).n_users == 1
            finally:
                pa.set_memory_pool(usual)
            assert 0 < pool.max_memory() < 10_000_000

    def test_texts_that_no_row_names(self, tmp_path: Path) -> None:
        """Of a dictionary, those alone are users that are in a row."""
        import pyarrow as pa

        names = pa.DictionaryArray.from_arrays(pa.array(np.arange(300) % 3 * 2), ["a", "b", "c", "d", "e"])
        stream = RatingStream.open(self.put(tmp_path, names))
        assert stream.users.ids.tolist() == ["a", "c", "e"]
