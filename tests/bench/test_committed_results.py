"""What is committed under ``benchmarks/results``: who made it, from which commit; and the scripts' frame."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine as frame
from lunet_fast.bench import quality
from tests.recsys.synthetic import latent_ratings

BENCHMARKS = frame.RESULTS.parent

#: Results of today that name no commit. May only shrink: whoever measures one again takes it out.
NAMELESS = {"density-plane.json", "fuzz-ratings.json"}


def commit_of(path: Path) -> str:
    found = json.loads(path.read_text()).get("machine", {}).get("commit", "")
    return str(found)


class TestCommitted:
    def test_results_name_the_commit_that_made_them(self) -> None:
        commits = {path.name: commit_of(path) for path in frame.RESULTS.glob("*.json")}
        assert not [name for name, commit in commits.items() if commit.endswith("-dirty")]
        assert {name for name, commit in commits.items() if not commit} == NAMELESS

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
