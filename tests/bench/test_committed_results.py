"""What is committed under ``benchmarks/results``: who made it, from which commit; and the scripts' frame."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import committed
from benchmarks import machine as frame
from lunet_fast.bench import quality
from tests.recsys.synthetic import latent_ratings

BENCHMARKS = frame.RESULTS.parent


class TestCommitted:
    def test_results_name_the_commit_that_made_them(self) -> None:
        files = [*frame.RESULTS.glob("*.json"), *frame.RESULTS.glob("sequence/*.json")]
        commits = {path.name: committed.commits(json.loads(path.read_text())) for path in files}
        assert not [name for name, every in commits.items() if any(each.endswith("-dirty") for each in every)]
        assert {name for name, every in commits.items() if "" in every} == committed.NAMELESS

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"machine": {"commit": "1a2b3c4-dirty"}},
                "some.json: measured with changes that commit 1a2b3c4",
            ),
            ({"machine": {"commit": "1"}, "rows": [{"commit": "2-dirty"}]}, "changes that commit 2 lacks"),
            ({"machine": {"commit": "1"}, "parts": {"a": {"commit": "3-dirty"}}}, "commit 3 lacks"),
            ({"machine": {}}, "some.json: names no commit"),
            ({"rows": []}, "some.json: names no commit"),
        ],
    )
    def test_what_no_commit_holds_is_not_quoted(
        self, tmp_path: Path, values: dict[str, Any], message: str
    ) -> None:
        (tmp_path / "some.json").write_text(json.dumps(values))
        with pytest.raises(SystemExit, match=message):
            committed.read_results(tmp_path / "some.json")

    def test_what_a_commit_holds_is_quoted(self, tmp_path: Path) -> None:
        values = {"machine": {"commit": "1"}, "rows": [{"commit": "2"}, {}], "parts": {"a": {}}}
        (tmp_path / "some.json").write_text(json.dumps(values))
        assert committed.read_results(tmp_path / "some.json") == values

    def test_a_page_is_not_filled_from_a_dirty_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        tables, figures = (importlib.import_module(name) for name in ("tables", "figures"))
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        (tmp_path / "fold-in.json").write_text('{"machine": {"commit": "1-dirty"}, "tested_users": 3}')
        with pytest.raises(SystemExit, match=r"fold-in\.json: measured with changes"):
            figures.FIGURES["fold-in-users"]()
        (tmp_path / "fold-in.json").write_text('{"machine": {"commit": "1"}, "tested_users": 3}')
        assert figures.FIGURES["fold-in-users"]() == "3"

    def test_the_readme_says_what_makes_each(self) -> None:
        text = (BENCHMARKS / "README.md").read_text()
        unknown = [path.name for path in frame.RESULTS.iterdir() if f"`{path.name}`" not in text]
        assert not unknown

    def test_the_readme_names_every_script(self) -> None:
        text = (BENCHMARKS / "README.md").read_text()
        scripts = [*BENCHMARKS.glob("*.py"), *(BENCHMARKS / "gpu").glob("*.py")]
        assert not [path.name for path in scripts if f"`{path.relative_to(BENCHMARKS)}`" not in text]


class TestImports:
    @pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
    def test_what_a_script_takes_from_the_library_is_there(self, script: Path) -> None:
        """Those inside of functions too, which are met only when a measurement is under way."""
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lunet_fast"):
                module = importlib.import_module(node.module or "")
                for name in (each.name for each in node.names):
                    if not hasattr(module, name):
                        importlib.import_module(f"{node.module}.{name}")


class TestFrame:
    @pytest.fixture
    def places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
        """The folders of results and of trials."""
        folders = tmp_path / "results", tmp_path / "trials"
        monkeypatch.setattr(frame, "RESULTS", folders[0])
        monkeypatch.setattr(frame, "TRIALS", folders[1])
        return folders

    @staticmethod
    def options(*words: str) -> argparse.Namespace:
        return frame.parser("a script", data=True).parse_args(words)

    def test_a_clean_tree_writes_results(
        self, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(frame, "commit", lambda: "1a2b3c4")
        words = ["--data-dir", "/some/place"]
        monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", *words, "--seeds", "3"])
        results = frame.open_results(self.options(*words))
        results.write("some", {"rows": [1]}, "# Some\n")
        content = json.loads((places[0] / "some.json").read_text())
        assert content["command"] == "python benchmarks/some.py --seeds 3"
        assert content["rows"] == [1]
        assert "commit" in content["machine"]
        assert (places[0] / "some.md").read_text() == "# Some\n"

    @pytest.mark.parametrize("commit", ["1a2b3c4-dirty", ""])
    def test_a_changed_tree_is_refused(
        self, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, commit: str
    ) -> None:
        monkeypatch.setattr(frame, "commit", lambda: commit)
        with pytest.raises(SystemExit, match="Commit first, or try --allow-dirty"):
            frame.open_results(self.options())
        assert not places[0].exists()

    def test_a_trial_writes_elsewhere(
        self, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(frame, "commit", lambda: "1a2b3c4-dirty")
        frame.open_results(self.options("--allow-dirty")).write("some", {})
        assert (places[1] / "some.json").is_file()
        assert not places[0].exists()


class TestKept:
    ROW: ClassVar[dict[str, Any]] = {"family": "LU-Net", "size": "M", "test": 1.0}

    def test_rows_of_density_are_valid_for_one_code(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        density = importlib.import_module("density")

        def kept(code: str) -> Any:
            results = frame.Results(tmp_path, {"commit": "1"}, "density.py", code)
            return density.Kept("density-digits", results, "family", "size")

        kept("a").add(self.ROW)
        kept("a").add({**self.ROW, "size": "L"})
        assert kept("a").has(family="LU-Net", size="M")
        assert not kept("a").has(family="LU-Net", size="S")
        assert not kept("b").has(family="LU-Net", size="M")
        kept("b").add({**self.ROW, "test": 2.0})
        content = json.loads((tmp_path / "density-digits.json").read_text())
        assert [(row["size"], row["test"], row["code"]) for row in content["rows"]] == [
            ("M", 2.0, "b"),
            ("L", 1.0, "a"),
        ]

    def test_the_code_is_that_of_the_script(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        importlib.import_module("density_report")
        names = {path.name for path in importlib.import_module("machine")._scripts()}
        assert {"machine.py", "density_flows.py"} <= names
        assert not names & {"density_report.py", "tables.py", "tables_of_densities.py", "committed.py"}


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_documents_and_results_do_not_make_a_tree_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lunet_fast.training import machine

    tree = {"lunet_fast/__init__.py": "", "benchmarks/results/some.json": "{}", "README.md": "", "a.py": ""}
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine.lunet_fast, "__file__", str(tmp_path / "lunet_fast" / "__init__.py"))
    assert machine.commit() == ""
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "All")
    clean = machine.commit()
    assert clean
    assert not clean.endswith("-dirty")
    (tmp_path / "benchmarks/results/some.json").write_text('{"new": 1}')
    (tmp_path / "README.md").write_text("more")
    assert machine.commit() == clean
    (tmp_path / "a.py").write_text("x = 1")
    assert machine.commit() == f"{clean}-dirty"


def test_time_to_quality_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("time_to_quality")
    monkeypatch.setattr(quality, "load", lambda name, data_dir: latent_ratings())
    monkeypatch.setattr(quality, "peers", lambda n_ratings, threads: [])
    monkeypatch.setattr(sys.modules["machine"], "TRIALS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["time_to_quality.py", "--allow-dirty", "--threads", "1"])
    script.main()
    content = json.loads((tmp_path / "time-to-quality.json").read_text())
    assert content.keys() == {"machine", "command", "versions", "trainings"}
    assert content["trainings"][0]["method"] == quality.OURS_BEST
    assert "latent, LU-Net, recipe best, 1 thread: " in capsys.readouterr().err
