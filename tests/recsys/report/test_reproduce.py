from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.data.ratings import Ratings, from_frame
from lunet_fast.recsys.report.document import Document
from lunet_fast.recsys.report.reproduce import (
    EXPERIMENTS,
    Planned,
    Watcher,
    command_of,
    plan,
    reproduce,
    write_report,
)
from lunet_fast.recsys.report.results import Committed, Reproduction
from lunet_fast.training.files import RunFolderError
from lunet_fast.training.loop import Progress
from lunet_fast.training.run import Run
from tests.recsys.report.test_report import NASTY, Page, checked
from tests.recsys.synthetic import latent_frame

MACHINE = {"processor": "a <fast> one", "cores": 2, "torch": "2", "lunet_fast": "0.1.0", "date": "2026-01-01"}
QUICK = {"members": 1, "embedding_size": 4, "batch_size": 256, "epochs": 2, "mlp_epochs": 2}


def films(name: str, data_dir: Path | None = None) -> Ratings:
    """Stands for MovieLens: item ids have a gap, as there."""
    frame = latent_frame(ratings=600)
    frame["timestamp"] = np.arange(len(frame)) + 1
    frame["item"] = frame["item"].where(frame["item"] < 39, 3952)
    return from_frame(frame, scale=(1, 5), name=name)


def make(out: Path, results: Path | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"datasets": ["ml-100k"], "seeds": [0, 1], "overrides": QUICK, **changes}
    return reproduce(out, MACHINE, results=results, **settings)


def committed(folder: Path) -> Path:
    """A folder with a small file of each kind."""
    folder.mkdir()
    of = {"dataset": "ml-1m", "seed": 0, "command": "lunet-fast train"}
    run = {
        "split": "random",
        "epochs": 50,
        "train_seconds": 9.0,
        "parameters": 5,
    }
    run |= {
        "test_mse": 0.7571,
        "test_rmse": 0.8701,
        "reconstruction_error": 2e-11,
    }
    run |= {"reconstruction_error_relative": 4e-11}
    rows: list[dict[str, Any]] = [
        {
            "key": "a",
            "method": NASTY,
            "package": "p",
            "test_mse": 0.4,
            "test_mse_sd": 0.01,
            "test_rmse": 0.63,
        },
        {"key": "b", "method": "B", "package": "p", "hr@10": 0.3, "ndcg@10": 0.123, "full_ndcg@10": 0.05},
        {"key": "lunet-leaky", "method": "LU-Net, leaks", "package": "lunet_fast", "ndcg@10": 0.99},
        {"key": "c", "method": "C", "package": "p", "missing": f"not installed {NASTY}"},
    ]
    changes = [
        {"group": "", "name": "recipe best", "mse": 0.79, "mse_change": 0.0, "mse_change_error": 0.0},
        {"group": "f", "name": "identity", "mse": 0.7895, "mse_change": -0.0005, "mse_change_error": 0.0004},
        {"group": "f", "name": NASTY, "mse": 0.8, "mse_change": 0.01, "mse_change_error": None},
    ]
    ranked = [
        {"group": group, "name": name, "ndcg@10_seeds": [0.4]}
        | dict.fromkeys(("hr@10", "ndcg@10", "full_ndcg@10"), 0.4)
        | {f"{figure}_change": change for figure in ("hr@10", "ndcg@10", "full_ndcg@10")}
        for group, name, change in (("", "none", 0.0), ("f", "identity", 0.0047))
    ]
    files = {
        "reproduction": {
            "runs": [
                {**of, "experiment": "paper", "metrics": {**run, "mlp_test_mse": 0.7429}},
                {**of, "experiment": "best", "metrics": run},
            ]
        },
        "compare-ml-100k": {"machine": MACHINE, "seeds": [0], "command": "lunet-fast compare", "rows": rows},
        "ablation-ratings": {"machine": MACHINE, "rows": changes},
        "ablation-ranking": {"machine": MACHINE, "rows": ranked},
        "fold-in": {
            "machine": {**MACHINE, "commit": "abc-dirty"},
            "tested_users": 3,
            "ratings": [{"way": f"fold_in {NASTY}", "mse_1": 0.9, "mse_5": 0.81234, "ms_per_user": 1.0}],
            "ranking": [
                {"way": "w", "ms_per_user": 0.5}
                | {f"{key}_{n}": 0.5 for key in ("hr@10", "ndcg@10", "full_ndcg@10") for n in (1, 5)}
            ],
        },
        "time-to-quality": {
            "machine": MACHINE,
            "trainings": [
                {"method": "LU-Net, recipe best", "settings": "K = 8", "threads": 1, "seconds": 12.0}
                | {"test_mse": 0.7786, "ours_seconds": 12.0, "curve": [[1.0, 0.8]], "missing": ""},
                {"method": NASTY, "settings": "k = 1", "threads": 1, "seconds": 6.0}
                | {"test_mse": 0.7748, "ours_seconds": None, "curve": [], "missing": ""},
            ],
        },
    }
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / "inversion.md").write_text(
        f"# Title\n\nWhat comes back.\n\n| method | value |\n|---|---|\n| {'x' * 9} | 0.5 |\n"
    )
    return folder


@pytest.fixture(scope="module")
def films_in_place() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movielens, "load", films)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, films_in_place: None) -> Path:
    """A reproduction with all parts, and the folder of results it quotes."""
    folder = tmp_path_factory.mktemp("reproduce")
    make(folder / "out", committed(folder / "results"))
    return folder


def html(folder: Path) -> Page:
    return checked((folder / "report.html").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> list[str]:
    return (folder / "report.md").read_text(encoding="utf-8").splitlines()


def metrics(folder: Path, experiment: str, seed: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(
        (folder / "out" / "ml-100k" / experiment / f"seed-{seed}" / "metrics.json").read_text()
    )
    return values


class TestPlan:
    def test_every_seed_on_the_small_set_and_one_on_the_large(self) -> None:
        planned = plan(["ml-100k", "ml-1m"], [3, 4])
        assert len(planned) == 3 * len(EXPERIMENTS)
        assert {one.seed for one in planned if one.dataset == "ml-1m"} == {3}
        assert planned[0].folder == "ml-100k/paper/seed-3"

    def test_skipped(self) -> None:
        planned = plan(["ml-1m"], [0], ["ml-1m/paper", "ml-1m/hybrid"])
        assert [one.experiment for one in planned] == ["best", "ranking"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["ml-10m"], [0]), "datasets='ml-10m' is unknown: choose from ml-100k, ml-1m"),
            ((["ml-1m"], [0], ["ml-1m/all"]), "skip='ml-1m/all' is unknown"),
            ((["ml-1m"], []), "must not be empty"),
            ((["ml-1m"], [0, 0]), "once"),
        ],
    )
    def test_refused(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan(*arguments)

    def test_commands(self) -> None:
        assert command_of(Planned("ml-1m", "paper", 0), {}) == (
            "lunet-fast train --dataset ml-1m --recipe paper --seed 0"
        )
        assert command_of(Planned("ml-100k", "hybrid", 2), {"epochs": 1}) == (
            "lunet-fast train --dataset ml-100k --recipe best --seed 2 --gamma 0.1 "
            "--negatives-outside training --epochs 1"
        )


class TestReport:
    def test_figures_are_those_of_the_metrics_files(self, made: Path) -> None:
        lines, text = rows_of(made / "out"), html(made / "out").text
        for experiment, name in (("paper", "LU-Net, recipe paper"), ("best", "LU-Net, recipe best")):
            for key in ("test_mse", "test_rmse"):
                values = [metrics(made, experiment, seed)[key] for seed in (0, 1)]
                shown = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
                (row,) = [line for line in lines if line.startswith(f"| {name} |")]
                assert shown in row
                assert shown in text
        for experiment in ("ranking", "hybrid"):
            for key in ("hr@10", "ndcg@10", "full_hr@10", "full_ndcg@10"):
                values = [metrics(made, experiment, seed)[key] for seed in (0, 1)]
                assert f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" in text
        values = [metrics(made, "paper", seed)["mlp_test_mse"] for seed in (0, 1)]
        (row,) = [line for line in lines if line.startswith("| MLP control |")]
        assert f"{statistics.fmean(values):.4f}" in row
        for printed in ("0.9200", "0.8880", "0.7955", "0.0050"):
            assert printed in text

    def test_curves_are_those_of_the_training(self, made: Path) -> None:
        state = metrics(made, "best", 0)
        lines = [line for line in rows_of(made / "out") if line.startswith("| ML-100K: test loss, best |")]
        assert lines[0].endswith(f" {state['test_mse']:.4f} |")
        svg = [attrs for tag, attrs in html(made / "out").tags if tag == "svg"]
        assert len(svg) == 4  # two panels, and the two ablations

    def test_table_1_and_its_erratum(self, made: Path) -> None:
        assert "| ML-100K, the files | 60 | 40 | 600 | 0.2500 | 3,952 |" in rows_of(made / "out")
        assert "3,952 items that the paper gives ML-1M are its largest item id" in html(made / "out").text

    def test_groups_of_users_add_up(self, made: Path) -> None:
        file = made / "out" / "ml-100k" / "ranking" / "seed-0" / "activity.json"
        groups = json.loads(file.read_text())["groups"]
        assert sum(group["users"] for group in groups) == metrics(made, "ranking", 0)["full_users"]
        assert any(f"{groups[0]['least']} to {groups[0]['most']}" in line for line in rows_of(made / "out"))

    def test_result_files_are_quoted(self, made: Path) -> None:
        text = html(made / "out").text
        for part in (
            "0.7571 †",
            "0.7429 †",
            "0.4000 ± 0.0100",
            "0.1230",
            "What comes back.",
            "0.8123",
            "−0.0005",
        ):
            assert part in text
        assert "taken from reproduction.json" in text
        assert NASTY in text
        assert f"not installed {NASTY}" in text
        assert "adds nothing measurable" in text
        assert "NDCG@10 among all items by +0.0047 (one seed). Above zero it is ahead" in text
        # What was told of the held-out pairs is never the best.
        assert "**0.9900**" not in "\n".join(rows_of(made / "out"))
        assert "0.9900 ‡" in text

    def test_the_strongest_of_those_that_were_run_is_named(self, made: Path) -> None:
        text = html(made / "out").text
        assert f"the only other method run: {NASTY}, 0.400" in text
        assert "the only other method run: B, 0.123" in text

    def test_an_older_recipe_is_named_and_not_compared(self, made: Path) -> None:
        text = html(made / "out").text
        assert "Measured with an older recipe (K = 8)." in text
        assert "LU-Net, recipe best (older recipe)" in text
        assert "not in its training" not in text

    def test_commits_with_changes_are_warned_of(self, made: Path) -> None:
        text = html(made / "out").text
        assert "Measured with changes that were not committed: fold-in.json." in text
        assert "commit abc-dirty (with changes that were not committed)" in text

    def test_comparisons_stand_for_what_was_not_run(self, tmp_path: Path, films_in_place: None) -> None:
        run = {"key": "lunet-interactions", "seed": 0, "hr@10": 0.7, "ndcg@10": 0.44, "full_ndcg@10": 0.05}
        file = {"rows": [], "seeds": [0], "runs": [run, {"key": "mf", "seed": 0}]}
        (tmp_path / "compare-ml-1m.json").write_text(json.dumps(file))
        make(tmp_path / "out", tmp_path, seeds=[0], skip=[f"ml-100k/{name}" for name in EXPERIMENTS])
        text = html(tmp_path / "out").text
        assert "0.4400 †" in text
        assert "taken from compare-ml-1m.json" in text
        assert "ML-1M, LU-Net, interactions alone (γ = 0): not measured" not in text.replace("\u00a0", " ")

    def test_written_again_without_training(self, made: Path, tmp_path: Path) -> None:
        again = tmp_path / "out"
        again.mkdir()
        (again / "reproduction.json").write_bytes((made / "out" / "reproduction.json").read_bytes())
        write_report(again, Reproduction.load(again, Committed(made / "results")))
        for name in ("report.html", "report.md"):
            assert (again / name).read_bytes() == (made / "out" / name).read_bytes()
        (again / "reproduction.json").write_text('{"runs": 1}')
        with pytest.raises(ValueError, match="not what `lunet-fast reproduce` writes"):
            Reproduction.load(again, Committed(None))

    def test_places_of_this_machine_are_not_in_it(self, made: Path) -> None:
        for name in ("report.html", "report.md"):
            assert str(made) not in (made / "out" / name).read_text(encoding="utf-8")

    def test_what_is_absent_says_how_to_get_it(self, tmp_path: Path, films_in_place: None) -> None:
        make(tmp_path, seeds=[0], skip=[f"ml-100k/{name}" for name in ("paper", "best", "hybrid")])
        text = html(tmp_path).text
        for command in (
            "python benchmarks/ablation.py ratings",
            "python benchmarks/ablation.py ranking",
            "lunet-fast compare --dataset ml-1m",
            "python benchmarks/inversion.py",
            "lunet-fast reproduce --datasets ml-1m",
        ):
            assert f"not measured here: run {command}" in text

    def test_a_damaged_result_file_is_named(self, tmp_path: Path, films_in_place: None) -> None:
        (tmp_path / "reproduction.json").write_text("{")
        with pytest.raises(ValueError, match=r"reproduction\.json: not a JSON file"):
            make(tmp_path / "out", tmp_path, seeds=[0], skip=[f"ml-100k/{name}" for name in EXPERIMENTS])

    def test_a_trial_says_so(self, tmp_path: Path, films_in_place: None) -> None:
        make(tmp_path, seeds=[0], skip=[f"ml-100k/{n}" for n in ("best", "ranking", "hybrid")], epochs=1)
        assert "A trial." in html(tmp_path).text


class TestResume:
    def test_what_is_finished_is_not_trained_again(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr(Run, "fit", refuse)
        before = {name: (made / "out" / name).read_bytes() for name in ("report.html", "report.md")}
        make(made / "out", made / "results")
        assert {name: (made / "out" / name).read_bytes() for name in before} == before

    def test_an_interrupted_one_goes_on(self, tmp_path: Path, films_in_place: None) -> None:
        class Stopped(Watcher):
            count = 0
            finished: list[bool] = []  # noqa: RUF012

            def begins(self, number: int, total: int, planned: Planned, finished: bool) -> None:
                self.count += 1
                self.finished.append(finished)

            def progress(self) -> AbstractContextManager[Progress]:
                if self.count == 2:
                    raise KeyboardInterrupt
                return super().progress()

        watcher = Stopped()
        skip = ["ml-100k/paper", "ml-100k/hybrid"]
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, seeds=[0], skip=skip, watcher=watcher)
        assert not (tmp_path / "report.html").exists()
        file = tmp_path / "ml-100k" / "best" / "seed-0" / "metrics.json"
        written = file.stat().st_mtime_ns
        watcher.count, watcher.finished = 2, []
        make(tmp_path, seeds=[0], skip=skip, watcher=watcher)
        assert watcher.finished == [True, False]
        assert file.stat().st_mtime_ns == written

    def test_what_other_code_trained_is_refused(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lunet_fast.recsys.report.reproduce.code", lambda *_: "another")
        with pytest.raises(RunFolderError, match="holds a training by other code than today's"):
            make(made / "out", made / "results")

    def test_other_settings_are_refused(self, made: Path) -> None:
        with pytest.raises(RunFolderError, match="was trained with epochs=2, not 3"):
            make(made / "out", epochs=3)
