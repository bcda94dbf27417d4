"""What ``inversion.py`` has measured, in words, tables and a picture: inversion.md and inversion.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lunet_fast.training.figures import new_figure, plain
from lunet_fast.training.files import write_figure
from machine import where

PLAIN = {
    "spread": "spread of the members' predictions",
    "user variance": "variance of the user's training ratings",
    "ends": "nearness of the prediction to an end of the scale",
    "|x|²": "‖x‖², negative",
    "|z|²": "‖z‖², negative",
    "counts": "log n_u + log n_i, training ratings of the two",
}
DENSITY = {
    "log p": "log p, z = f(x) normal",
    "log p, x": "log p without f, x normal",
    "flow": "log p by a flow trained for it on x",
}
COMBINED = {
    "plain together": "the plain ones together",
    "plain and log p": "these and log p, z = f(x) normal",
    "plain and log p, x": "these and log p without f, x normal",
    "plain and flow": "these and log p by the flow",
}


def figure(path: Path, curves: dict[str, Tensor]) -> None:
    """The mean squared error of the predictions kept, by the share kept."""
    styles = {
        "plain together": ("all plain measures, fitted", "#111111", "-"),
        "flow": (DENSITY["flow"], "#2a9d5c", "-"),
        "log p": (DENSITY["log p"], "#1f5f99", "-"),
        "log p, x": (DENSITY["log p, x"], "#7fb4dd", "--"),
        "user variance": (PLAIN["user variance"], "#d1662b", "-"),
        "spread": (PLAIN["spread"], "#a05fb4", "-"),
        "ends": (PLAIN["ends"], "#b59a2a", "-"),
        "counts": (PLAIN["counts"], "#888888", "-"),
    }
    drawn = new_figure(7.6, 5.0)
    axes = drawn.add_subplot()
    total = float(next(iter(curves.values()))[-1])
    axes.axhline(total, color="#bbbbbb", linewidth=1.2, label="at random")
    for name, (label, colour, line) in styles.items():
        curve = curves[name].numpy()
        share = 100 * np.arange(1, len(curve) + 1) / len(curve)
        # Fewer than 5 % are too few predictions for a steady mean.
        shown = share >= 5
        axes.plot(share[shown], curve[shown], line, color=colour, linewidth=1.8, label=label)
    axes.set_title(
        "Leaving out the predictions that a measure trusts least, ML-100K", loc="left", fontsize=11
    )
    axes.set_xlabel("predictions kept, %")
    axes.set_ylabel("mean squared error of those kept")
    plain(axes, grid="y")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    write_figure(path, drawn)


def markdown(results: dict[str, Any]) -> str:
    net, identity = results["mean"]["LU-Net"], results["mean"]["identity"]
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        "# What the inverse is good for in the recommender",
        "",
        f"ML-100K, recipe `best`, means of seeds {seeds}; {where(results)}, {results['cpu_seconds']} s of "
        f"processor time. Test MSE {net['test_mse']:.4f}, with f = identity {identity['test_mse']:.4f}: the "
        "model of column *identity* is trained the same way, with f held at x -> x.",
        *_recovered(net["recovery"]),
        *_confident(results["runs"], net, identity),
        *_backwards(net, identity),
        *_held_out(results["held_out"]),
    ]
    return "\n".join(lines) + "\n"


def _recovered(back: dict[str, float]) -> list[str]:
    lines = [
        "",
        "## The embeddings, back from z",
        "",
        "All test pairs, every member: x = f⁻¹(z), and its two halves. With f = identity z is x, and "
        "there is nothing to recover.",
        "",
        "| | float32 | float64 |",
        "|---|---|---|",
    ]
    for name, what in (
        ("relative", "mean ‖f⁻¹(z) − x‖² over mean ‖x‖²"),
        ("largest", "largest relative error ‖f⁻¹(z) − x‖ / ‖x‖"),
        ("largest_user", "of the user's half"),
        ("largest_item", "of the item's half"),
    ):
        lines.append(f"| {what} | {back[f'{name}_float32']:.1e} | {back[f'{name}_float64']:.1e} |")
    lines += [
        "",
        f"The nearest of all users' vectors to the user's half got back is the pair's user for "
        f"{100 * back['user_named_by_recovered']:.2f} % of the pairs; to the user's half of z itself, "
        f"without f⁻¹, for {100 * back['user_named_by_z']:.2f} %.",
    ]
    return lines


def _confident(runs: list[Any], net: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Density as confidence",
        "",
        "Area: the mean over all shares kept of the MSE of the surest predictions (lower is better; what "
        f"knows nothing has the test MSE, one that knows the errors {net['perfect_area']:.3f}). ρ: "
        "Spearman's rank correlation of the confidence with the squared error and with the item's number of "
        "training ratings (popularity; novelty is its opposite).",
        "",
        "| confidence, higher is surer | area | by seed | area, identity | MSE of the surest 80 % | 50 % "
        "| ρ with error | ρ with popularity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, group in (("", {**PLAIN, **DENSITY}), ("fitted: ", COMBINED)):
        for name, label in group.items():
            row, other = net["confidence"][name], identity["confidence"][name]
            seeds = " ".join(f"{run['LU-Net']['confidence'][name]['area']:.4f}" for run in runs)
            lines.append(
                f"| {title}{label} | {row['area']:.4f} | {seeds} | {other['area']:.4f} | "
                f"{row['mse_80']:.4f} | {row['mse_50']:.4f} | "
                f"{row['spearman_error']:+.3f} | {row['spearman_popularity']:+.3f} |"
            )
    nats = ", ".join(
        f"{net['nats_a_coordinate'][name]:+.4f} ({label.removeprefix('log p').strip(', ')})"
        for name, label in DENSITY.items()
    )
    lines += [
        "",
        "Fitted: linear in the ranks of the measures and their squares, with weights from the test errors of "
        "the other half of the users. Density of the test pairs, nats a coordinate, higher is better: "
        f"{nats}. The flow's depth, slope and steps were chosen by the test part of seed 0, which "
        "flatters it a little; nothing else here was chosen.",
        "",
        "![error by share kept](inversion.png)",
    ]
    return lines


def _backwards(net: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Backwards from a wanted rating",
        "",
        f"From the mean item, all users, float32. Moved: |v − v₀| a member; the items' own vectors are "
        f"{net['item_norm']:.2f} long. Last column: the z nearest to the pair's with that rating, and f⁻¹ of "
        "it, moves the user as well; this share of |change of x|² falls on the user's half. So the "
        "solution here is Newton's, on the item's half: it needs the gradient of f and no inverse.",
        "",
        "| wanted | largest miss | within 1e-5 | moved | user's share by f⁻¹ |",
        "|---|---|---|---|---|",
    ]
    for row in net["hits"]:
        lines.append(
            f"| {row['wanted']:g} | {row['largest_miss']:.1e} | {100 * row['within_1e-5']:.1f} % | "
            f"{row['moved']:.2f} | {100 * row['user_moved_by_inverse']:.0f} % |"
        )
    lines += [
        "",
        "What users gave to the one of their test items that a method puts first (wanted: 5):",
        "",
        "| method | mean rating | identity |",
        "|---|---|---|",
    ]
    for name, value in net["choices"].items():
        lines.append(f"| {name} | {value:.3f} | {identity['choices'][name]:.3f} |")
    return lines


def _held_out(held_out: dict[str, Any]) -> list[str]:
    users = held_out["ratings"]["LU-Net"]["users"]
    lines = [
        "",
        f"Each user's last item, where it was liked ({users} users; standard error of a rate p "
        "√(p(1 − p)/users), .02 at .2), among the nearest or highest of all items not seen, seed 0 "
        "(interactions: gamma 0, 2 members, k 32; wanted is the highest score of any real item):",
        "",
        "| read-out | method | HR@10 | HR@50 | identity, HR@10 | HR@50 |",
        "|---|---|---|---|---|---|",
    ]
    for kind, by_model in held_out.items():
        for name in by_model["LU-Net"]["rates"]:
            cells = [
                f"{rates[name][k]:.3f}"
                for rates in (each["rates"] for each in by_model.values())
                for k in ("hr@10", "hr@50")
            ]
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    return lines
