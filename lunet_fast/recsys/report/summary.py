"""The head of the report: the figures that matter, and how to read the rest."""

from __future__ import annotations

import math

from lunet_fast.recsys.data.datasets import dataset_title
from lunet_fast.recsys.report.document import Highlight, literal, signed
from lunet_fast.recsys.report.results import Findings, Reproduction, dagger, finite, mean
from lunet_fast.recsys.report.run import PRINTED, TABLE_2


def highlights(results: Findings) -> list[Highlight]:
    cards = []
    for data in results.datasets:
        error = results.mean(data, "best", "test_mse")
        if error is not None:
            name, printed = dataset_title(data), PRINTED[dataset_title(data)]
            less = (1 - error.value / printed) * 100
            beside = f"the paper prints {printed:.4f}: {abs(less):.0f} % {'less' if less > 0 else 'more'}"
            what = f"test MSE on {name}, recipe `best`{dagger(results.of(data, 'best'))}"
            strongest = results.strongest(data, "test_mse")
            cards.append(Highlight(f"{error.value:.3f}", what, "; ".join(filter(None, [beside, strongest]))))
    for data in results.datasets:
        hits, gain = (results.mean(data, "ranking", name) for name in ("hr@10", "ndcg@10"))
        if hits is not None and gain is not None:
            what = (
                f"NDCG@10 on {dataset_title(data)}, each user's latest item among 100 others; HR@10 "
                f"{hits.value:.3f}{dagger(results.of(data, 'ranking'))}"
            )
            beside = results.strongest(data, "ndcg@10") or "the paper prints none"
            cards.append(Highlight(f"{gain.value:.3f}", what, beside))
    relative = _relative_error(results)
    if relative is not None:
        what = "relative squared error of f⁻¹(f(x)) in float32, recipe `best`"
        cards.append(Highlight(f"{relative:.0e}".replace("e-0", "e-"), what, "the paper prints 0.0000"))
    return cards


def _relative_error(results: Findings) -> float | None:
    """The largest mean of a data set."""
    means = [results.mean(data, "best", "reconstruction_error_relative") for data in results.datasets]
    return max((m.value for m in means if m is not None), default=None)


def reading(found: Reproduction, results: Findings) -> list[str]:
    """How to read the report, a sentence or two each."""
    return [
        *_beside_paper(results),
        *_nonlinearity(found),
        *_beside_control(results),
        *_invertibility(results),
        *_beside_others(results),
    ]


def _beside_paper(results: Findings) -> list[str]:
    parts = []
    for data in results.datasets:
        best, paper = (results.mean(data, name, "test_mse") for name in ("best", "paper"))
        printed = PRINTED[dataset_title(data)]
        if best is None:
            continue
        kept = "" if paper is None else f", recipe `paper`, its own protocol, {paper.value:.4f}"
        parts.append(f"{dataset_title(data)}: printed {printed:.4f}{kept}, recipe `best` {best.value:.4f}")
        if best.value > 0.98 * printed:
            return ["**Not clearly better than the paper.** Test MSE. " + "; ".join(parts) + "."]
    if not parts:
        return []
    return [
        "**Far better than the paper.** Test MSE. " + "; ".join(parts) + ". Recipe `best` adds what the "
        "paper does not have: histories (who rated what, from the training part), genres and the users' "
        "age, gender and occupation, a penalty on z, and the mean of several networks."
    ]


def _affine(found: Reproduction) -> list[tuple[str, float, float]]:
    """From the committed files (what stands for f, change of the MSE by it, its standard error)."""
    rows = (found.committed.json("ablation-ratings.json") or {}).get("rows", [])
    return [
        (str(row["name"]), row["mse_change"], row["mse_change_error"])
        for row in rows
        if str(row.get("name", "")).startswith(("identity", "affine")) and finite(row.get("mse_change_error"))
    ]


def _nonlinearity(found: Reproduction) -> list[str]:
    changes = _affine(found)
    if not changes:
        return []
    told = "; ".join(f"{literal(name)}: {signed(gap)} ± {error:.4f}" for name, gap, error in changes)
    # A hundredth of what separates recipe best from the paper's figure is nothing one could use.
    gains = any(gap > max(2 * error, 0.001) for _, gap, error in changes)
    heading = "earns little" if gains else "adds nothing measurable to accuracy"
    return [
        f"**The nonlinearity of f {heading}.** Change of the MSE with something simpler in its place, "
        f"ML-100K: {told} (± standard error over seeds). Below zero is better.{_ranked_without(found)}"
    ]


def _ranked_without(found: Reproduction) -> str:
    """What f = identity changes in ranking, from the committed files; "" where it was not measured."""
    names = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "full_ndcg@10": "NDCG@10 among all items"}
    for row in (found.committed.json("ablation-ranking.json") or {}).get("rows", []):
        if row.get("name") == "identity" and all(finite(row.get(f"{key}_change")) for key in names):
            told = ", ".join(f"{name} by {signed(row[f'{key}_change'])}" for key, name in names.items())
            seeds = len(row.get("ndcg@10_seeds", [])) or 1
            over = "one seed" if seeds == 1 else f"means over {seeds} seeds"
            return f" In ranking, f = identity changes {told} ({over}). Above zero it is ahead of LU-Net."
    return ""


def _beside_control(results: Findings) -> list[str]:
    parts, gaps = [], []
    for data, controls in results.controls.items():
        mlp, paper = mean(controls, "mlp_test_mse"), results.mean(data, "paper", "test_mse")
        if mlp is not None and paper is not None:
            gaps.append(mlp.value - paper.value)
            parts.append(f"{dataset_title(data)} {mlp.text()} against {paper.text()} of recipe `paper`")
    if not parts:
        return []
    # Half of the printed gap decides.
    again = "not found again" if max(gaps) < (TABLE_2[0][2] - TABLE_2[1][2]) / 2 else "found again"
    return [
        f"**The paper's gap to an MLP is {again}.** Regularised as well, the MLP control has a test "
        "MSE of " + "; ".join(parts) + "; the paper prints 0.9200 against 0.8880."
    ]


def _invertibility(results: Findings) -> list[str]:
    relative = _relative_error(results)
    if relative is None:
        return []
    length = math.sqrt(relative)
    verdict = "is exact to rounding" if length < 1e-4 else "has lost digits"
    return [
        f"**Invertibility {verdict}.** f⁻¹(f(x)) is off by {length:.0e} of the length of x, in float32: its "
        "rounding, 1e-07, as it has grown on the way through the layers and back."
    ]


def _beside_others(results: Findings) -> list[str]:
    parts = []
    for data in results.datasets:
        for name, key, experiment in (("test MSE", "test_mse", "best"), ("NDCG@10", "ndcg@10", "ranking")):
            ours, others = results.mean(data, experiment, key), results.others(data, key)
            if ours is None or not others:
                continue
            best, spread = others[0][key], others[0].get(f"{key}_sd") or 0.0
            ahead = ours.value < best if key == "test_mse" else ours.value > best
            near = abs(ours.value - best) < max((ours.spread or 0.0) + spread, 0.01 * best)
            place = "level with" if near else "ahead of" if ahead else "behind"
            what = "the only other method run" if len(others) == 1 else f"the best of {len(others)}"
            parts.append(
                f"{dataset_title(data)}, {name}: {ours.value:.4f}, {place} {literal(others[0]['method'])} "
                f"({what}) with {best:.4f}"
            )
    if not parts:
        return []
    return [
        "**Beside the strongest of the other methods that were run.** "
        + "; ".join(parts)
        + ". Level: closer "
        "than the standard deviations of both over the seeds together, or than one part in a hundred."
    ]
