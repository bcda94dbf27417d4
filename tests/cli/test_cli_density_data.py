"""``lunet-fast density data``: fetch, verify and describe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.invoke import run, squeezed
from tests.density import test_data_packages

made_up = test_data_packages.made_up


class TestFetch:
    def test_tells_where_it_is(self, made_up: Path) -> None:
        for name, counted in (
            ("shuttle", "20 rows of 2 integers from 0 to 19, 2 classes"),
            ("fashion-mnist", "15 rows of 4"),
        ):
            result = run("density", "data", "fetch", name, "--data-dir", made_up)
            assert result.exit_code == 0, result.output
            assert result.stdout.startswith(f"{name}: {made_up}\n")
            assert counted in result.stdout
        result = run("density", "data", "fetch", "shuttle", "--data-dir", made_up, "--quiet")
        assert result.stdout == f"shuttle: {made_up}\n"

    def test_the_cache_is_looked_into(self, made_up: Path, tmp_path: Path) -> None:
        kept = tmp_path / "kept" / "r-cran-mlbench"
        kept.mkdir(parents=True)
        (kept / "Shuttle.rda").write_bytes((made_up / "Shuttle.rda").read_bytes())
        result = run("density", "data", "fetch", "shuttle", "--cache", tmp_path / "kept")
        assert result.exit_code == 0, result.output
        assert str(kept) in result.stdout

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("moons",), "NAME moons: fetched can be fashion-mnist, letter"),
            (("shuttle",), "apt-get is not on this machine"),
            (("shuttle", "--cache", __file__), "is a file: name a folder"),
            (("shuttle", "--data-dir", "/nowhere"), "/nowhere does not hold Shuttle.rda"),
        ],
    )
    def test_refusals(self, made_up: Path, arguments: tuple[str, ...], told: str) -> None:
        result = run("density", "data", "fetch", *arguments)
        assert result.exit_code == 2
        assert squeezed(told) in squeezed(result.stderr)


class TestVerify:
    def test_by_name(self, made_up: Path) -> None:
        result = run("density", "data", "verify", "shuttle", "--data-dir", made_up)
        assert result.exit_code == 0, result.output
        assert "SHA-256" in result.stdout
        assert result.stdout.endswith("All right: 20 rows of 2 integers from 0 to 19, 2 classes\n")
        file = made_up / "Shuttle.rda"
        file.write_bytes(file.read_bytes()[:-40])
        result = run("density", "data", "verify", "shuttle", "--data-dir", made_up)
        assert result.exit_code == 1
        assert str(file) in result.stderr
        file.unlink()
        result = run("density", "data", "verify", "shuttle")
        assert result.exit_code == 2
        assert "lunet-fast density data fetch shuttle" in result.stderr

    def test_own_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_text("a,kind\n1.5,u\n2,v\n")
        result = run("density", "data", "verify", path, "--label-column", "kind")
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("All right: 2 rows of 1 real numbers, 2 classes\n")
        result = run("density", "data", "verify", path)
        assert result.exit_code == 1
        assert "line 2: column 'kind' holds 'u'" in result.stderr
        assert run("density", "data", "verify", tmp_path / "y.csv").exit_code == 2

    def test_published(self, tmp_path: Path) -> None:
        np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(200, 43)))
        result = run("density", "data", "verify", "miniboone", "--data-dir", tmp_path)
        assert result.exit_code == 1
        assert "not the same data" in result.stderr
        assert run("density", "data", "verify", "power").exit_code == 2


class TestDescribe:
    def test_table(self, made_up: Path) -> None:
        result = run("density", "data", "describe", "shuttle", "--data-dir", made_up)
        assert result.exit_code == 0, result.output
        text = squeezed(result.stdout)
        for part in (
            "rows20",
            "features2",
            "integersfrom0to19",
            "testrows,aspublished5",
            "down10",
            "up10",
            "00199.5",
        ):
            assert part in text, part

    def test_json(self, made_up: Path) -> None:
        result = run("density", "data", "describe", "shuttle", "--data-dir", made_up, "--json")
        found = json.loads(result.stdout)
        assert (found["rows"], found["features"], found["levels"], found["image"]) == (20, 2, 20, None)
        assert found["published_parts"] == {"training": 15, "validation": 0, "test": 5}
        assert found["classes"] == {"down": 10, "up": 10}
        assert found["columns"][0] == {
            "lowest": 0,
            "highest": 19,
            "mean": 9.5,
            "std": pytest.approx(5.766, abs=1e-3),
        }

    def test_pictures(self, made_up: Path) -> None:
        result = run("density", "data", "describe", "fashion-mnist", "--data-dir", made_up)
        assert result.exit_code == 0, result.output
        assert "pictures2x2" in squeezed(result.stdout)
        assert "column" not in result.stdout

    def test_a_name_that_would_steer_the_terminal(self, tmp_path: Path) -> None:
        path = tmp_path / "\x1b[31m.csv"
        path.write_text("a,kind\n1.5,\x1b[32m[bold]u\n2,v\n")
        result = run("density", "data", "describe", path, "--label-column", "kind")
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
        assert "[bold]u" in result.stdout
