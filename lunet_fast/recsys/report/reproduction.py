"""What the report on the paper's experiments says: trainings and committed results in, a document out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.report.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Column,
    Curve,
    Details,
    Document,
    Dot,
    Dots,
    Heading,
    Highlight,
    NotMeasured,
    Panel,
    Panels,
    Paragraph,
    Picture,
    Row,
    Section,
    Table,
    Warned,
    from_markdown,
    literal,
    signed,
)
from lunet_fast.recsys.report.run import TABLE_2

PRINTED = {data: mse for model, data, mse, _ in TABLE_2 if "invertible" in model}
"""The test MSE that the paper prints for its invertible model, by data set."""

TABLE_1: dict[str, dict[str, float]] = {
    "ml-100k": {"users": 943, "items": 1_682, "ratings": 100_000},
    "ml-1m": {"users": 6_040, "items": 3_952, "ratings": 1_000_209, "density": 0.0447},
}
"""The paper's table 1."""

NAMES = {
    "paper": "LU-Net, recipe paper",
    "best": "LU-Net, recipe best",
    "ranking": "LU-Net, interactions alone (γ\u00a0=\u00a00)",
    "hybrid": "LU-Net, hybrid (γ\u00a0=\u00a00.1)",
}
"""The experiments, as tables call them."""

STRONGEST = 3
"""How many of the other methods stand in table 2 and in the table of ranking."""

FIGURES = {"ml-100k": "Figures 3 and 4", "ml-1m": "Figures 5 and 6"}

# (in print, what holds and what we do)
ERRATA = (
    (
        "(2.2): f⁻¹(z) = U⁻¹L⁻¹(φ⁻¹(z − b))",
        "The bias belongs outside of φ⁻¹: f⁻¹(z) = U⁻¹L⁻¹(φ⁻¹(z) − b). So it is computed, and tested against "
        "f in float64.",
    ),
    (
        "(2.9) with α = 1, β = 0 is the base configuration",
        "That is softplus, whose values are all positive: it is not onto the real line and has no inverse "
        "there. `GeneralizedLeakySoftplus` asks for β > 0; the recipes use (2.6).",
    ),
    (
        "Every non-singular matrix has one LU factorisation, without pivoting",
        "Only where no leading principal minor is zero; a swap of two coordinates has none. Layers are "
        "trained as L and U and need no pivot; `LUDense.from_linear` turns a given matrix into one with a "
        "permutation of its rows, which it keeps.",
    ),
    (
        "(2.12) and (2.14) read one output as a rating and as a probability",
        "A number cannot be both. Two read-outs of the one latent vector z = f(x): a rating, and the logit "
        "of an interaction.",
    ),
    (
        "Table 1: ML-1M has 3,952 items, density 0.0447",
        "3,952 is the largest id. 3,706 items have ratings, and 0.0447 is the density with those; with 3,952 "
        "it would be 0.0419.",
    ),
    (
        "No preprocessing is needed",
        "The ids have gaps, the films of ML-100K are in Latin-1, the columns of ML-1M are separated by `::`. "
        "Reading the files takes care of that, and checks their sums.",
    ),
    (
        "Ranking is measured among 100 random items",
        "Such metrics can put methods in another order than a ranking of all items does (Krichene and "
        "Rendle, KDD 2020). Both are reported.",
    ),
    (
        "Not printed: D, the number of layers, α, γ, the size of the embeddings, the read-out, the "
        "negatives, which 80/20 split, any HR, NDCG or Precision, a formula of the reconstruction error",
        "Chosen on a validation part of the training data and written down for each training at the end of "
        "this report. The reconstruction error is the mean of ‖f⁻¹(f(x)) − x‖² over the test pairs, and the "
        "same relative to the mean of ‖x‖².",
    ),
)


class Losses(NamedTuple):
    """Loss by epoch of a training: of its own batches, and of the test part (empty without one)."""

    train: Sequence[float]
    test: Sequence[float]


@dataclass(frozen=True)
class Run:
    """One training."""

    experiment: str
    """A key of NAMES."""
    dataset: str
    seed: int
    metrics: Mapping[str, Any]
    """The content of its ``metrics.json``."""
    command: str = ""
    """What a user types for it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Losses] = field(default_factory=dict)
    """By phase, ``LU-Net`` or ``MLP``."""
    groups: Sequence[Mapping[str, Any]] = ()
    """Ranking by the users' activity: ``least``, ``most``, ``users``, ``metrics``."""
    file: str = ""
    """The file of results that it was taken from; empty for a training of this reproduction."""


@dataclass
class Committed:
    """A folder of result files, some of which may be absent. Remembers which were used."""

    folder: Path | None
    used: dict[str, Any] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        """The content of ``name``, None where it is absent; ``ValueError`` where it is damaged."""
        path = self._path(name)
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error}): make it again or take it away") from error
        self.used[name] = values.get("machine", {}) if isinstance(values, dict) else {}
        return values

    def text(self, name: str) -> str | None:
        path = self._path(name)
        if path is None:
            return None
        self.used.setdefault(name, {})
        return path.read_text(encoding="utf-8")

    def picture(self, name: str, alt: str) -> list[Block]:
        path = self._path(name)
        return [] if path is None else [Picture(path.read_bytes(), alt, name)]

    def _path(self, name: str) -> Path | None:
        path = None if self.folder is None else self.folder / name
        return path if path is not None and path.is_file() else None

    def trainings(self) -> list[Run]:
        """The trainings for ratings by a recipe, as it is, that ``table2.json`` and ``ml-1m.json`` hold."""
        found = []
        for name in ("table2.json", "ml-1m.json"):
            values = self.json(name) or {}
            for run in values.get("runs", []):
                if run.get("recipe") in ("paper", "best") and run.get("split") == "random":
                    command = run.get("command", "")
                    found.append(
                        Run(run["recipe"], run["dataset"], run["seed"], run, command=command, file=name)
                    )
        return found


@dataclass(frozen=True)
class Reproduction:
    """All that the report is about."""

    runs: Sequence[Run]
    data: Mapping[str, Mapping[str, Any]]
    """By data set what ``Ratings.describe`` gives, ``largest_item`` and ``source``."""
    committed: Committed
    machine: Mapping[str, Any]
    command: str
    trial: bool = False
    """Whether the trainings were cut short, so that no figure means anything."""


class Mean(NamedTuple):
    """Over the seeds."""

    value: float
    spread: float | None
    """Standard deviation over the seeds; None for one seed."""

    def text(self, digits: int = 4) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


def mean(runs: Iterable[Run], name: str) -> Mean | None:
    """Of a metric over runs; None where none of them has it."""
    values = [float(run.metrics[name]) for run in runs if run.metrics.get(name) is not None]
    if not values:
        return None
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def document(found: Reproduction) -> Document:
    """The report."""
    content = _Content(found)
    subtitle = (
        "S. Tamim, A. Radid, K. Rhofir, “Invertible Neural Networks for Matrix Factorization in "
        f"Recommendation Systems” (2026), run again by lunet-fast {literal(found.machine['lunet_fast'])} on "
        f"{literal(found.machine['date'])}"
    )
    return Document(
        "LU-Net for recommendation: the paper's experiments, run again",
        subtitle,
        content.highlights(),
        content.reading(),
        [
            Section("The data", content.data_sets()),
            Section("Rating prediction", content.ratings()),
            Section("Ranking", content.ranking()),
            Section("Loss by epoch", content.losses()),
            Section("What makes it good", content.ablations()),
            Section("Beside other methods", content.comparison()),
            Section("What invertibility buys", content.inversion()),
            Section("Users who come later", content.fold_in()),
            Section("Time", content.time()),
            Section("Where the paper is wrong or silent", content.errata()),
            Section("How this was made", content.provenance()),
        ],
    )


class _Content:
    """The sections, which share what was found."""

    def __init__(self, found: Reproduction) -> None:
        self.found, self.committed = found, found.committed
        published = self.committed.trainings()
        self.runs: dict[tuple[str, str], list[Run]] = {}
        for run in found.runs:
            self.runs.setdefault((run.dataset, run.experiment), []).append(run)
        # What was not run here is taken from the committed files, and marked.
        here = set(self.runs)
        for run in published:
            if (run.dataset, run.experiment) not in here:
                held = self.runs.setdefault((run.dataset, run.experiment), [])
                if run.seed not in [other.seed for other in held]:
                    held.append(run)
        places = [(data, experiment) for data in TABLE_1 for experiment in NAMES]
        self.runs = {key: self.runs[key] for key in places if key in self.runs}
        self.controls: dict[str, list[Run]] = {}
        for data in TABLE_1:
            for source in (found.runs, published):
                runs = [r for r in source if r.dataset == data and "mlp_test_mse" in r.metrics]
                if runs and data not in self.controls:
                    self.controls[data] = runs
        self.compared = {data: self.committed.json(f"compare-{data}.json") for data in TABLE_1}

    def of(self, data: str, experiment: str) -> list[Run]:
        return self.runs.get((data, experiment), [])

    def others(self, data: str, key: str) -> list[dict[str, Any]]:
        """The rows of the comparison that are not LU-Net's and have ``key``, the best first."""
        rows = (self.compared[data] or {}).get("rows", [])
        rows = [row for row in rows if not _is_ours(row) and _finite(row.get(key))]
        return sorted(rows, key=lambda row: row[key], reverse="mse" not in key)

    # Summary ------------------------------------------------------------------------------------------------

    def highlights(self) -> list[Highlight]:
        cards = []
        for data in TABLE_1:
            error = mean(self.of(data, "best"), "test_mse")
            if error is not None:
                title, printed = dataset_title(data), PRINTED[dataset_title(data)]
                less = (1 - error.value / printed) * 100
                cards.append(
                    Highlight(
                        f"{error.value:.3f}",
                        f"test MSE on {title}, recipe `best`{_dagger(self.of(data, 'best'))}",
                        f"the paper prints {printed:.4f}: {abs(less):.0f} % {'less' if less > 0 else 'more'}",
                    )
                )
        for data in TABLE_1:
            hits, gain = (mean(self.of(data, "ranking"), name) for name in ("hr@10", "ndcg@10"))
            if hits is not None and gain is not None:
                others = self.others(data, "ndcg@10")
                beside = "the paper prints none"
                if others:
                    best = others[0]
                    beside = f"best of the others: {literal(best['method'])}, {best['ndcg@10']:.3f}"
                    if _finite(best.get("hr@10")):
                        beside += f" (HR@10 {best['hr@10']:.3f})"
                what = (
                    f"NDCG@10 on {dataset_title(data)}, each user's latest item among 100 others; HR@10 "
                    f"{hits.value:.3f}"
                )
                cards.append(Highlight(f"{gain.value:.3f}", what, beside))
                break
        relative = self._relative_error()
        if relative is not None:
            cards.append(
                Highlight(
                    f"{relative:.0e}".replace("e-0", "e-"),
                    "relative squared error of f⁻¹(f(x)) in float32, recipe `best`",
                    "the paper prints 0.0000",
                )
            )
        return cards

    def _relative_error(self) -> float | None:
        """The largest mean of a data set."""
        means = [mean(self.of(data, "best"), "reconstruction_error_relative") for data in TABLE_1]
        return max((m.value for m in means if m is not None), default=None)

    def reading(self) -> list[Block]:
        blocks: list[Block] = []
        if self.found.trial:
            blocks.append(
                Warned("**A trial.** The trainings were cut short with `--epochs`: no figure here counts.")
            )
        items = [*self._beside_paper(), *self._nonlinearity(), *self._beside_control()]
        items += [*self._invertibility(), *self._beside_others()]
        return [*blocks, Bullets(items)] if items else blocks

    def _beside_paper(self) -> list[str]:
        parts = []
        for data in TABLE_1:
            best, paper = (mean(self.of(data, name), "test_mse") for name in ("best", "paper"))
            printed = PRINTED[dataset_title(data)]
            if best is None:
                continue
            kept = "" if paper is None else f", recipe `paper`, its own protocol, {paper.value:.4f}"
            parts.append(
                f"{dataset_title(data)}: printed {printed:.4f}{kept}, recipe `best` {best.value:.4f}"
            )
            if best.value > 0.98 * printed:
                return ["**Not clearly better than the paper.** Test MSE. " + "; ".join(parts) + "."]
        if not parts:
            return []
        return [
            "**Far better than the paper.** Test MSE. " + "; ".join(parts) + ". Recipe `best` adds what the "
            "paper does not have: histories (who rated what, from the training part), genres and the users' "
            "age, gender and occupation, a penalty on z, and the mean of several networks."
        ]

    def affine(self) -> list[tuple[str, float, float]]:
        """From the committed files (what stands for f, change of the MSE by it, its standard error)."""
        rows = (self.committed.json("ablation-ratings.json") or {}).get("rows", [])
        found = []
        for row in rows:
            name = str(row.get("name", ""))
            if name.startswith(("identity", "affine")) and _finite(row.get("mse_change_error")):
                found.append((name, row["mse_change"], row["mse_change_error"]))
        if found:
            return found
        straight = (self.committed.json("table2-affine.json") or {}).get("runs", [])
        bent = {(r.seed): r.metrics["test_mse"] for r in self.committed.trainings() if _is_best_100k(r)}
        gaps = [run["test_mse"] - bent[run["seed"]] for run in straight if run["seed"] in bent]
        if len(gaps) < 2:
            return []
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        return [("one layer, so f affine", statistics.fmean(gaps), error)]

    def _nonlinearity(self) -> list[str]:
        found = self.affine()
        if not found:
            return []
        told = "; ".join(f"{literal(name)}: {signed(gap)} ± {error:.4f}" for name, gap, error in found)
        # A hundredth of what separates recipe best from the paper's figure is nothing one could use.
        gained = [gap for _, gap, error in found if gap > max(2 * error, 0.001)]
        if gained:
            return [
                "**The nonlinearity of f earns little.** Change of the MSE with something simpler in its "
                f"place, ML-100K: {told}. Below zero is better."
            ]
        return [
            "**The nonlinearity of f adds nothing measurable to accuracy.** Change of the MSE with something "
            f"simpler in its place, ML-100K: {told}. Below zero is better."
        ]

    def _beside_control(self) -> list[str]:
        parts, gaps = [], []
        printed = TABLE_2[0][2] - TABLE_2[1][2]
        for data, controls in self.controls.items():
            mlp, paper = mean(controls, "mlp_test_mse"), mean(self.of(data, "paper"), "test_mse")
            if mlp is not None and paper is not None:
                gaps.append(mlp.value - paper.value)
                parts.append(f"{dataset_title(data)} {mlp.text()} against {paper.text()} of recipe `paper`")
        if not parts:
            return []
        # Half of the printed gap decides.
        found = "not found again" if max(gaps) < printed / 2 else "found again"
        return [
            f"**The paper's gap to an MLP is {found}.** Regularised as well, the MLP control has a test "
            "MSE of " + "; ".join(parts) + "; the paper prints 0.9200 against 0.8880."
        ]

    def _invertibility(self) -> list[str]:
        relative = self._relative_error()
        if relative is None:
            return []
        length = math.sqrt(relative)
        told = (
            f"f⁻¹(f(x)) is off by {length:.0e} of the length of x, in float32: its rounding, 1e-07, as it "
            "has grown on the way through the layers and back"
        )
        if length < 1e-4:
            return [f"**Invertibility is exact to rounding.** {told}."]
        return [f"**Invertibility has lost digits.** {told}."]

    def _beside_others(self) -> list[str]:
        parts = []
        for data in TABLE_1:
            for name, key, experiment, digits in (
                ("test MSE", "test_mse", "best", 4),
                ("NDCG@10", "ndcg@10", "ranking", 3),
            ):
                ours, others = mean(self.of(data, experiment), key), self.others(data, key)
                if ours is None or not others:
                    continue
                best, spread = others[0][key], others[0].get(f"{key}_sd")
                ahead = ours.value < best if key == "test_mse" else ours.value > best
                noise = (ours.spread or 0.0) + (float(spread) if spread is not None else 0.0)
                near = abs(ours.value - best) < max(noise, 0.01 * best)
                place = "level with" if near else "ahead of" if ahead else "behind"
                parts.append(
                    f"{dataset_title(data)}, {name}: {ours.value:.{digits}f}, {place} "
                    f"{literal(others[0]['method'])} with {best:.{digits}f}"
                )
        if not parts:
            return []
        return [
            "**Beside the best of the other methods.** "
            + "; ".join(parts)
            + ". Level: closer than the standard deviations of both over the seeds together, or than one "
            "part in a hundred."
        ]

    # The paper's tables -------------------------------------------------------------------------------------

    def data_sets(self) -> list[Block]:
        rows = []
        for data, printed in TABLE_1.items():
            title = dataset_title(data)
            cells = [f"{printed[name]:,}" for name in ("users", "items", "ratings")]
            cells.append(f"{printed['density']:.4f}" if "density" in printed else "—")
            rows.append(Row([Cell(f"{title}, paper"), *map(Cell, cells), Cell("")]))
            own = self.found.data.get(data)
            if own is not None:
                cells = [f"{own[name]:,}" for name in ("users", "items", "ratings")]
                largest = own.get("largest_item")
                cells += [f"{own['density']:.4f}", "" if largest is None else f"{largest:,}"]
                rows.append(Row([Cell(f"{title}, the files"), *map(Cell, cells)], ours=True))
        columns = [Column("", number=False)]
        columns += [Column(name) for name in ("users", "items", "ratings", "density", "largest item id")]
        note = "Density: ratings / (users × items). Items are those that have a rating."
        blocks: list[Block] = [Table("Table 1: the data sets", columns, rows, note)]
        missing = [data for data in TABLE_1 if data not in self.found.data]
        if missing:
            blocks.append(
                NotMeasured(" and ".join(map(dataset_title, missing)), _reproduce_command(*missing))
            )
        blocks.append(
            Paragraph(
                "**Erratum.** The 3,952 items that the paper gives ML-1M are its largest item id. 3,706 "
                "items have ratings, and the density of 0.0447 is computed with those: 1,000,209 / (6,040 × "
                "3,706)."
            )
        )
        return blocks

    def ratings(self) -> list[Block]:
        rows: list[tuple[str, bool, dict[str, list[Cell]]]] = []

        def printed(model: str) -> dict[str, list[Cell]]:
            return {
                data: [Cell(f"{mse:.4f}", mse), Cell(f"{mse**0.5:.4f}", mse**0.5), Cell(f"{error:.4f}")]
                for data in TABLE_1
                for name, title, mse, error in TABLE_2
                if name.endswith(model) and title == dataset_title(data)
            }

        rows.append(("paper: classic MLP", False, printed("classic MLP")))
        rows.append(("paper: invertible model", False, printed("invertible model")))
        control = {}
        for data, runs in self.controls.items():
            mse, error = mean(runs, "mlp_test_mse"), mean(runs, "mlp_reconstruction_error")
            if mse is not None:
                lost = Cell("" if error is None else f"{error.value:.4f}")
                control[data] = [_cell(mse, runs), Cell(f"{mse.value**0.5:.4f}", mse.value**0.5), lost]
        rows.append(("MLP control", True, control))
        for experiment in ("paper", "best"):
            ours = {}
            for data in TABLE_1:
                runs = self.of(data, experiment)
                mse, rmse = mean(runs, "test_mse"), mean(runs, "test_rmse")
                if mse is not None and rmse is not None:
                    error = mean(runs, "reconstruction_error")
                    lost = Cell("" if error is None else f"{error.value:.1e}")
                    ours[data] = [_cell(mse, runs), _cell(rmse, runs), lost]
            rows.append((NAMES[experiment], True, ours))
        names = dict.fromkeys(
            row["method"] for data in TABLE_1 for row in self.others(data, "test_mse")[:STRONGEST]
        )
        for name in names:
            theirs = {}
            for data in TABLE_1:
                for row in self.others(data, "test_mse"):
                    if row["method"] == name:
                        theirs[data] = [*(_row_cell(row, k) for k in ("test_mse", "test_rmse")), Cell("")]
            rows.append((literal(name), False, theirs))
        columns = [Column("model", number=False)]
        for data in TABLE_1:
            title = dataset_title(data)
            columns += [Column(name, best="lowest", group=title) for name in ("test MSE", "RMSE")]
            columns.append(Column("reconstruction error", group=title))
        blank = [Cell(""), Cell(""), Cell("")]
        table = Table(
            "Table 2: test error of the 80/20 split, and reconstruction of the embeddings",
            columns,
            [
                Row([Cell(name), *(cell for data in TABLE_1 for cell in cells.get(data, blank))], ours)
                for name, ours, cells in rows
                if cells
            ],
            "± is the standard deviation over the seeds; a row without it is of one seed, or as published. "
            "Predictions are clipped to the scale; the weights are those of the last epoch, and nothing is "
            "chosen on the test part. Reconstruction error: mean of ‖f⁻¹(f(x)) − x‖² in float32; of the MLP, "
            "which has no inverse, that of a decoder trained for it. The paper's RMSE are the roots of its "
            "MSE." + self._dagger_note("paper", "best"),
        )
        blocks: list[Block] = [
            Paragraph(
                "Recipe `paper` is the paper's protocol: Adam at 0.001, batches of 128, 50 epochs, a linear "
                "read-out of z = f(x). Recipe `best` is the same invertible network with histories, biases, "
                "genres and the users' age, gender and occupation, a penalty on z and the mean of several "
                "members. Other methods have the ratings alone, and the comparison below tells what the "
                "further data are worth. The control is an MLP on concatenated "
                "embeddings, with the budget of recipe `paper`."
            ),
            table,
        ]
        if not names:
            blocks.append(NotMeasured("Other methods", _compare_command("ml-100k")))
        return blocks

    def ranking(self) -> list[Block]:
        blocks: list[Block] = [
            Paragraph(
                "Each user's most recent item is held out (leave-one-out) and ranked: among 100 items drawn "
                "from those the user never rated, as in the paper, and among all items that the user has not "
                "rated, which is what a recommender does. The items without interaction that training draws "
                "may include the held-out one, as they would in use."
            )
        ]
        columns = [Column("model", number=False)]
        for group in ("100 candidates", "all items"):
            names = ("HR@10", "NDCG@10", "Precision@10")
            columns += [Column(name, best="highest", group=group) for name in names]
        columns.append(Column("test MSE", best="lowest"))
        for data in TABLE_1:
            title = dataset_title(data)
            rows = []
            for experiment in ("ranking", "hybrid"):
                runs = self.of(data, experiment)
                if not runs:
                    blocks.append(NotMeasured(f"{title}, {NAMES[experiment]}", _reproduce_command(data)))
                    continue
                cells = [_cell(mean(runs, name), runs) for name in ("hr@10", "ndcg@10")]
                cells.append(_tenth(cells[0]))
                cells += [_cell(mean(runs, name), runs) for name in ("full_hr@10", "full_ndcg@10")]
                cells += [_tenth(cells[3]), _cell(mean(runs, "test_mse"), runs)]
                rows.append(Row([Cell(NAMES[experiment]), *cells], ours=True))
            for row in self.others(data, "ndcg@10")[:STRONGEST]:
                cells = [_row_cell(row, "hr@10"), _row_cell(row, "ndcg@10")]
                cells.append(_tenth(cells[0]))
                cells += [_row_cell(row, "full_hr@10"), _row_cell(row, "full_ndcg@10")]
                cells += [_tenth(cells[3]), Cell("")]
                rows.append(Row([Cell(literal(row["method"])), *cells]))
            if rows:
                note = (
                    "With one relevant item a user, Precision@10 is a tenth of HR@10. The hybrid learns "
                    "ratings too, from 80 % of what leave-one-out leaves (split `joint`); its test MSE is of "
                    "the other 20 %. ± is the standard deviation over the seeds."
                )
                blocks.append(Table(f"{title}: leave-one-out", columns, rows, note))
        blocks += self._test_lists()
        blocks += self._activity()
        return blocks

    def _test_lists(self) -> list[Block]:
        """Precision (2.16) of the 80/20 test part."""
        rows = []
        for data in TABLE_1:
            for experiment in ("paper", "best", "hybrid"):
                runs = [r for r in self.of(data, experiment) if "precision@10" in r.metrics]
                if runs:
                    how = "interaction" if experiment == "hybrid" else "predicted rating"
                    cells = [_cell(mean(runs, name), runs) for name in ("precision@10", "recall@10")]
                    name = f"{dataset_title(data)}: {NAMES[experiment]}"
                    rows.append(Row([Cell(name), Cell(how), *cells], ours=True))
        if not rows:
            return []
        columns = [
            Column("model", number=False),
            Column("ranked by", number=False),
            *(Column(name) for name in ("Precision@10", "Recall@10")),
        ]
        note = (
            "Lists of 10 of all items that the user has not rated in training; relevant are the user's test "
            "ratings, whatever their value. The hybrid's test part is a fifth of what leave-one-out leaves. "
            "To rank by predicted rating is weak: it likes rare items that a few people rated high."
        )
        return [
            Heading("Precision of lists, (2.16)"),
            Table("The 80/20 test part, all items ranked", columns, rows, note),
        ]

    def _activity(self) -> list[Block]:
        rows = []
        for data in TABLE_1:
            for experiment in ("ranking", "hybrid"):
                runs = [run for run in self.of(data, experiment) if run.groups]
                for third in zip(*(run.groups for run in runs), strict=False):
                    least, most = min(g["least"] for g in third), max(g["most"] for g in third)
                    cells = [Cell(f"{dataset_title(data)}: {NAMES[experiment]}")]
                    cells += [Cell(f"{least:,} to {most:,}"), Cell(f"{third[0]['users']:,}")]
                    for name in ("full_hr@10", "full_ndcg@10", "coverage@10"):
                        cells.append(Cell(f"{statistics.fmean(g['metrics'][name] for g in third):.4f}"))
                    rows.append(Row(cells, ours=True))
        blocks: list[Block] = [Heading("By how active users are")]
        if not rows:
            return [*blocks, NotMeasured("Users by activity", _reproduce_command("ml-100k"))]
        columns = [Column("model", number=False)]
        columns += [Column(n) for n in ("ratings known", "users", "HR@10", "NDCG@10", "coverage@10")]
        note = (
            "All items ranked; users in thirds by the number of their ratings that are known. Coverage is "
            "the share of all items in somebody's first ten."
        )
        return [*blocks, Table("Full ranking by activity", columns, rows, note)]

    def losses(self) -> list[Block]:
        blocks: list[Block] = []
        for data in TABLE_1:
            title = dataset_title(data)
            curves: dict[str, list[Curve]] = {"train": [], "test": []}
            for look, (name, experiment, phase) in enumerate(
                (("best", "best", "LU-Net"), ("paper", "paper", "LU-Net"), ("MLP", "paper", "MLP"))
            ):
                first = next((r for r in self.of(data, experiment) if phase in r.losses), None)
                if first is not None:
                    for part in curves:
                        values = getattr(first.losses[phase], part)
                        if values:
                            curves[part].append(Curve(name, values, look))
            if not curves["train"]:
                blocks.append(NotMeasured(f"{FIGURES[data]}, {title}", _reproduce_command(data)))
                continue
            missing = (
                []
                if len(curves["train"]) == 3
                else [NotMeasured(f"{title}, the curves of recipe paper", _reproduce_command(data))]
            )
            panels = [
                Panel(f"{title}: training loss", curves["train"]),
                Panel(f"{title}: test loss", curves["test"], ("printed", PRINTED[title])),
            ]
            caption = (
                f"{FIGURES[data]} of the paper, {title}: mean squared error by epoch of the first seed. "
                "“best” and “paper” are the two recipes of LU-Net, “MLP” is the control; the dotted line is "
                "the test MSE that the paper prints for its invertible model."
            )
            blocks += [Panels(caption, panels), *missing]
        return blocks

    # From committed files -----------------------------------------------------------------------------------

    def ablations(self) -> list[Block]:
        blocks: list[Block] = [
            Paragraph(
                "Recipe `best` with fewer members than it has (for time), one thing changed at a time, "
                "ML-100K, measured on a validation part of the training data, mean over seeds. ± is "
                "the standard error of the change."
            )
        ]
        for kind, title, keys in (
            ("ratings", "Rating prediction", {"mse": "MSE"}),
            (
                "ranking",
                "Ranking (γ = 0)",
                {"ndcg@10": "NDCG@10", "hr@10": "HR@10", "full_ndcg@10": "NDCG@10, all items"},
            ),
        ):
            found = self.committed.json(f"ablation-{kind}.json")
            blocks.append(Heading(title))
            if found is None:
                blocks.append(NotMeasured(title, f"python benchmarks/ablation.py {kind}"))
            else:
                blocks += _ablation(title, found["rows"], keys)
        return blocks

    def comparison(self) -> list[Block]:
        blocks: list[Block] = []
        for data, found in self.compared.items():
            title = dataset_title(data)
            if found is None:
                blocks.append(NotMeasured(f"{title}, other methods", _compare_command(data)))
                continue
            blocks += _comparison(title, found)
            alt = f"{title}: test MSE and NDCG@10 of each method over its training time"
            blocks += self.committed.picture(f"compare-{data}.png", alt)
        return blocks

    def inversion(self) -> list[Block]:
        blocks: list[Block] = []
        rows = []
        for (data, experiment), runs in self.runs.items():
            error, relative = (mean(runs, f"reconstruction_error{name}") for name in ("", "_relative"))
            if error is not None and relative is not None:
                rows.append(
                    Row(
                        [
                            Cell(f"{dataset_title(data)}: {NAMES[experiment]}{_dagger(runs)}"),
                            Cell(f"{error.value:.1e}"),
                            Cell(f"{relative.value:.1e}"),
                        ],
                        ours=True,
                    )
                )
        if rows:
            columns = [Column("model", number=False), Column("mean ‖f⁻¹(f(x)) − x‖²"), Column("relative")]
            blocks.append(Table("A round trip through f, in float32", columns, rows))
        return blocks + self._file(
            "inversion", "What the inverse is good for", "python benchmarks/inversion.py"
        )

    def fold_in(self) -> list[Block]:
        what = "Users and items that training has not seen"
        return self._file("fold-in", what, "python benchmarks/fold_in.py")

    def _file(self, name: str, what: str, command: str) -> list[Block]:
        """A result file as its own Markdown tells it; from its JSON where there is no Markdown."""
        text, values = self.committed.text(f"{name}.md"), self.committed.json(f"{name}.json")
        if text is None and values is None:
            return [NotMeasured(what, command)]
        assert self.committed.folder is not None
        if text is not None:
            blocks = from_markdown(text, self.committed.folder)
        else:
            blocks = _tables_of(values)
        if not any(isinstance(block, Picture) for block in blocks):
            blocks += self.committed.picture(f"{name}.png", f"{what}: figure of {name}")
        return blocks

    def time(self) -> list[Block]:
        rows = []
        for (data, experiment), runs in self.runs.items():
            took, size = mean(runs, "train_seconds"), mean(runs, "parameters")
            if took is not None and size is not None:
                cells = [f"{dataset_title(data)}: {NAMES[experiment]}{_dagger(runs)}"]
                cells += [f"{runs[0].metrics['epochs']}", f"{size.value:,.0f}", took.text(0)]
                rows.append(Row([*map(Cell, cells)], ours=True))
        for data, runs in self.controls.items():
            took, size = mean(runs, "mlp_train_seconds"), mean(runs, "mlp_parameters")
            if took is not None and size is not None:
                epochs = runs[0].config.get("mlp_epochs", "")
                cells = [f"{dataset_title(data)}: MLP control{_dagger(runs)}", f"{epochs}"]
                rows.append(Row([*map(Cell, [*cells, f"{size.value:,.0f}", took.text(0)])], ours=True))
        columns = [Column("training", number=False)]
        columns += [Column(name) for name in ("epochs", "parameters", "seconds")]
        note = "One thread of the machine named at the end, which had other work too." + self._dagger_note(
            *NAMES
        )
        blocks: list[Block] = [Table("Time of the trainings", columns, rows, note)] if rows else []
        blocks.append(Heading("Beside other packages"))
        found = self.committed.json("time-to-quality.json")
        if found is None:
            command = "python benchmarks/time_to_quality.py"
            return [*blocks, NotMeasured("Whole trainings beside other packages", command)]
        rows = []
        for row in found["trainings"]:
            name = Cell(literal(row["method"]))
            if row.get("missing"):
                rows.append(
                    Row([name, Cell(str(row["threads"])), Cell(literal(row["missing"])), *[Cell("")] * 2])
                )
                continue
            after = row["ours_seconds"]
            reached = "" if row["curve"] else "never" if after is None else f"{after:.1f}"
            took, error = row["seconds"], row["test_mse"]
            figures = [Cell(str(row["threads"])), Cell(f"{took:.1f}", took), Cell(f"{error:.4f}", error)]
            rows.append(Row([name, *figures, Cell(reached)], ours=_is_ours(row)))
        columns = [
            Column("method", number=False),
            Column("threads"),
            Column("training, s", best="lowest"),
            Column("test MSE", best="lowest"),
            Column("our training had it after, s"),
        ]
        return [*blocks, Table("Whole trainings, ML-100K, seed 0", columns, rows, _machine(found["machine"]))]

    # The rest -----------------------------------------------------------------------------------------------

    def errata(self) -> list[Block]:
        rows = [Row([Cell(_kept(printed)), Cell(holds)]) for printed, holds in ERRATA]
        columns = [Column("in print", number=False), Column("what holds, and what we do", number=False)]
        return [
            Paragraph("None of this touches the idea; each changes what one computes or how one reads it."),
            Table("Errata", columns, rows),
        ]

    def provenance(self) -> list[Block]:
        found = self.found
        blocks: list[Block] = [
            Code(found.command),
            Paragraph(_machine(found.machine)),
            Paragraph(
                "The data is GroupLens Research's: F. M. Harper and J. A. Konstan, “The MovieLens Datasets”, "
                "ACM TiiS 5(4):19, 2015."
            ),
            Heading("Settings of every training"),
        ]
        here = [(key, [r for r in runs if not r.file]) for key, runs in self.runs.items()]
        for (data, experiment), runs in here:
            if not runs:
                continue
            seeds = ", ".join(str(run.seed) for run in runs)
            summary = f"{dataset_title(data)}: {NAMES[experiment]}, seed{'s' * (len(runs) > 1)} {seeds}"
            blocks.append(Details(summary, list(_settings(runs))))
        taken = [
            Row([Cell(f"`{name}`"), Cell(literal(m.get("date", ""))), Cell(literal(m.get("commit", "")))])
            for name, m in sorted(self.committed.used.items())
        ]
        if taken:
            columns = [Column(name, number=False) for name in ("file", "measured on", "at commit")]
            blocks += [Heading("Result files that this report quotes"), Table("", columns, taken)]
        return blocks

    def _dagger_note(self, *experiments: str) -> str:
        quoted = {
            run.file for data in TABLE_1 for name in experiments for run in self.of(data, name) if run.file
        } | {run.file for runs in self.controls.values() for run in runs if run.file}
        if not quoted:
            return ""
        files = " and ".join(f"`{name}`" for name in sorted(quoted))
        return f" †: not run here, but taken from {files}."


def _settings(runs: Sequence[Run]) -> Iterable[Block]:
    # Where the data lay is no setting.
    first = {n: v for n, v in runs[0].config.items() if n != "source"}
    common = {n: v for n, v in first.items() if all(run.config.get(n) == v for run in runs)}
    yield Code("\n".join(run.command for run in runs))
    yield Paragraph("Settings that the seeds share:")
    yield Code(json.dumps(common, indent=1, ensure_ascii=False))
    own = sorted({n for run in runs for n in run.config} - common.keys() - {"source"})
    if own:
        lines = [json.dumps({n: run.config.get(n) for n in own}, ensure_ascii=False) for run in runs]
        yield Paragraph("and those of each:")
        yield Code("\n".join(lines))


def _ablation(title: str, rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> list[Block]:
    first = next(iter(keys))
    lines = []
    for n, row in enumerate(rows):
        cells = [Cell(literal(row["group"])), Cell(literal(row["name"]))]
        for key in keys:
            if not _finite(row.get(key)):
                cells += [Cell(""), Cell("")]
                continue
            error, change = row.get(f"{key}_change_error"), row.get(f"{key}_change")
            spread = f" ± {error:.4f}" if _finite(error) else ""
            told = f"{signed(row[f'{key}_change'])}{spread}" if n and _finite(change) else ""
            cells += [Cell(f"{row[key]:.4f}", row[key]), Cell(told)]
        lines.append(Row(cells, ours=not n))
    sense: Any = "lowest" if first == "mse" else "highest"
    columns = [Column("", number=False), Column("change", number=False)]
    for heading in keys.values():
        columns += [Column(heading, best=sense), Column("change")]
    changed = [row for row in rows[1:] if _finite(row.get(f"{first}_change"))]
    sizes = sorted(abs(row[f"{first}_change"]) for row in changed)
    blocks: list[Block] = []
    if sizes:
        # So wide that nine of ten changes are within.
        limit = _round_up(max(sizes[int(0.9 * (len(sizes) - 1))], 1e-4))
        shown = [
            Dot(
                f"{row['group']}: {row['name']}" if row["group"] else str(row["name"]),
                row[f"{first}_change"],
                row.get(f"{first}_change_error"),
            )
            for row in changed
        ]
        caption = (
            f"{title}: change of {keys[first]} against the row without a change, with its standard error. "
            "Hollow: within two standard errors of none."
        )
        blocks.append(Dots(caption, shown, "left" if first == "mse" else "right", limit))
    table = Table(f"Ablation: {title.lower()}", columns, lines)
    return [*blocks, Details(f"All {len(lines)} rows", [table])]


def _comparison(title: str, found: Mapping[str, Any]) -> list[Block]:
    measures: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "test_mse": ("test MSE", "lowest", "{:.4f}".format),
        "test_rmse": ("RMSE", "lowest", "{:.4f}".format),
        "hr@10": ("HR@10", "highest", "{:.4f}".format),
        "ndcg@10": ("NDCG@10", "highest", "{:.4f}".format),
        "full_ndcg@10": ("NDCG@10, all items", "highest", "{:.4f}".format),
        "reconstruction_error_relative": ("reconstruction, relative", "", "{:.0e}".format),
        "train_seconds": ("training, s", "", "{:,.1f}".format),
        "peak_memory_mb": ("memory, MB", "", "{:,.0f}".format),
        "parameters": ("parameters", "", "{:,.0f}".format),
    }
    rows, left_out = [], []
    for row in found["rows"]:
        reason = row.get("missing") or row.get("error")
        if reason:
            left_out.append(f"{literal(row['method'])}: {literal(reason)}")
            continue
        package = str(row.get("package", ""))
        package = {"lunet_fast": "this one", "ours": "written here"}.get(package, package)
        cells = [Cell(literal(row["method"])), Cell(literal(package))]
        for key, (_, best, form) in measures.items():
            value = row.get(key)
            if not _finite(value):
                cells.append(Cell(""))
                continue
            spread = f" ± {row[f'{key}_sd']:.4f}" if best and _finite(row.get(f"{key}_sd")) else ""
            # One that was told of the held-out pairs does not compete.
            # Nor does the error of one that is measured on another test part.
            competes = best and not _leaks(row) and not (row.get("kind") == "both" and "test" in key)
            cells.append(Cell(form(value) + spread, value if competes else None))
        rows.append(Row(cells, ours=_is_ours(row)))
    columns = [Column("method", number=False), Column("package", number=False)]
    columns += [Column(heading, best=best) for heading, best, _ in measures.values()]  # type: ignore[arg-type]
    seeds = ", ".join(str(seed) for seed in found.get("seeds", []))
    note = (
        f"Seeds {seeds}; ± is the standard deviation over them. HR and NDCG: leave-one-out, among 100 "
        f"candidates and among all items. MSE of a method that does both: of the test part that "
        f"leave-one-out leaves. `{found['command']}`. "
        if found.get("command")
        else f"Seeds {seeds}. "
    )
    blocks: list[Block] = [
        Table(f"{title}: methods", columns, rows, note + _machine(found.get("machine", {})))
    ]
    return [*blocks, Bullets(left_out)] if left_out else blocks


def _tables_of(values: Any, name: str = "") -> list[Block]:
    """JSON as tables: of lists of flat objects, and of single values."""
    if isinstance(values, list) and values and all(isinstance(row, dict) for row in values):
        keys = dict.fromkeys(
            key for row in values for key, v in row.items() if not isinstance(v, dict | list)
        )
        numeric = {key: all(_finite(row.get(key, 0.0)) for row in values) for key in keys}
        columns = [Column(literal(key.replace("_", " ")), number=numeric[key]) for key in keys]
        rows = [Row([Cell(_value(row.get(key, ""))) for key in keys]) for row in values]
        return [Table(literal(name), columns, rows)]
    if isinstance(values, dict):
        plain = {k: v for k, v in values.items() if not isinstance(v, dict | list)}
        blocks: list[Block] = []
        if plain:
            pairs = [Row([Cell(literal(key.replace("_", " "))), Cell(_value(v))]) for key, v in plain.items()]
            blocks.append(Table(literal(name), [Column("", number=False), Column("value")], pairs))
        for key, inner in values.items():
            if isinstance(inner, dict | list) and key not in ("machine", "runs", "versions"):
                blocks += _tables_of(inner, f"{name} {key}".strip().replace("_", " "))
        return blocks
    return []


def _value(value: Any) -> str:
    if isinstance(value, bool) or not _finite(value):
        return literal("" if value is None else value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _cell(value: Mean | None, runs: Sequence[Run], digits: int = 4) -> Cell:
    if value is None:
        return Cell("")
    return Cell(value.text(digits) + _dagger(runs), value.value)


def _row_cell(row: Mapping[str, Any], key: str) -> Cell:
    """Of a row of a comparison."""
    if not _finite(row.get(key)):
        return Cell("")
    spread = row.get(f"{key}_sd")
    return Cell(Mean(row[key], spread if _finite(spread) else None).text(), row[key])


def _tenth(hits: Cell) -> Cell:
    """Precision@10 from HR@10: each user has one relevant item."""
    return hits if hits.value is None else Cell(f"{hits.value / 10:.4f}", hits.value / 10)


def _dagger(runs: Sequence[Run]) -> str:
    return " †" if any(run.file for run in runs) else ""


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ours(row: Mapping[str, Any]) -> bool:
    """Whether a row of a comparison is one of LU-Net's."""
    return str(row.get("method", "")).lower().startswith(("lu-net", "lunet"))


def _leaks(row: Mapping[str, Any]) -> bool:
    return row.get("key") == "lunet-leaky"


def _is_best_100k(run: Run) -> bool:
    return (run.dataset, run.experiment) == ("ml-100k", "best")


def _kept(text: str) -> str:
    """House text in which nothing but a backquote is a mark."""
    return text.replace("*", "\\*")


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * m for m in (1, 2, 5, 10) if unit * m >= value * (1 - 1e-9))


def _machine(machine: Mapping[str, Any]) -> str:
    told = [literal(machine["processor"])] if machine.get("processor") else []
    if machine.get("cores"):
        told.append(f"{machine['cores']} cores")
    for name in ("python", "torch", "numpy", "lunet_fast"):
        if machine.get(name):
            told.append(f"{literal(name)} {literal(machine[name])}".replace("lunet\\_fast", "lunet-fast"))
    if machine.get("commit"):
        told.append(f"commit {literal(machine['commit'])}")
    if machine.get("date"):
        told.append(literal(machine["date"]))
    return ", ".join(told) + "." if told else ""


def _compare_command(data: str) -> str:
    return f"lunet-fast compare --dataset {data} --seeds 0 1 2 --out benchmarks/results"


def _reproduce_command(*data: str) -> str:
    return f"lunet-fast reproduce --datasets {' '.join(data)}"
