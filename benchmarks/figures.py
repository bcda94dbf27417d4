"""The measured numbers in sentences of README and docs/, by the names of their marks (see ``prose``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from density_flows import LADDERS
from tables import deviation, load, number
from tables_of_densities import REACHED, REFERENCE, rows_of, step_times

PLAIN = {"LU-Net, LeakySoftplus": "LU-Net with LeakySoftplus", "LULinear + splines (nflows)": "nflows"}
"""Flows, where a sentence calls them otherwise."""


def row(rows: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """The one row that has these values."""
    found = [each for each in rows if all(each.get(key) == value for key, value in keys.items())]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} rows have {keys}: a number in README or docs is that of one")
    return found[0]


# --- the recommender ------------------------------------------------------------------------------------


def compared(dataset: str, method: str, metric: str, form: str = ".4f", folder: str = "") -> str:
    found = row(load(f"{folder}compare-{dataset}")["rows"], key=method)
    return number(found[metric], form, found.get(f"{metric}_sd")).text


def reproduced(metric: str) -> str:
    """Of recipe paper and its control on ML-100K."""
    runs = load("reproduction")["runs"]
    values = [
        run["metrics"][metric] for run in runs if (run["dataset"], run["experiment"]) == ("ml-100k", "paper")
    ]
    return number(fmean(values), spread=deviation(values)).text


def ablated(group: str, name: str, key: str, form: str) -> str:
    found = row(load("ablation-ratings")["rows"], group=group, name=name)
    return number(found[key], form, found.get(f"{key}_error")).text


def sequence(name: str, metric: str, form: str) -> str:
    return format(row(load("sequence-ml-100k")["rows"], name=name)[metric], form)


def after_a_day(name: str, metric: str) -> str:
    return format(row(load("elapsed")["rows"], gap="over a day", name=name)[metric], ".3f")


def confidence(name: str) -> str:
    return format(load("inversion")["mean"]["LU-Net"]["confidence"][name]["area"], ".4f")


# --- densities ------------------------------------------------------------------------------------------


def digits(family: str, size: str = "M") -> str:
    return format(row(rows_of("digits"), family=family, size=size)["test"], ".4f")


def digits_step(family: str, size: str = "M") -> str:
    """Milliseconds of a training step of the flow as it was tuned."""
    components = row(rows_of("digits"), family=family, size=size)["tuned"]["chosen"]["components"]
    return format(step_times()[family, size, components]["step_ms"], ".1f")


def detection(best: bool) -> str:
    """AUROC of LU-Net M in telling digits, or the highest of all with the flow's name."""
    rows = [each for each in rows_of("digits") if each["auroc"] is not None]
    if not best:
        return format(row(rows, family=REFERENCE[0], size=REFERENCE[1])["auroc"], ".3f")
    found = max(rows, key=lambda each: each["auroc"])
    return f"{found['auroc']:.3f}, {PLAIN.get(found['family'], found['family'])}"


def mixture_gains() -> list[float]:
    """How much better 30 Gaussians than one are as a base, bits: each flow's search, all else equal."""
    gains = []
    for each in rows_of("digits"):
        tried = each["tuned"]["tried"]
        for one in (trial for trial in tried if trial["components"] == 1 and trial["validation"]):
            twins = [
                trial["validation"]
                for trial in tried
                if trial["components"] > 1
                and all(trial[key] == one[key] for key in ("learning_rate", "weight_decay", "steps"))
            ]
            gains += [one["validation"] - twin for twin in twins if twin is not None]
    return gains


def better_with_mixture() -> str:
    gains = mixture_gains()
    return f"{sum(gain > 0 for gain in gains)} of {len(gains)}"


def plane(target: str, ours: bool) -> str:
    """KL of LU-Net M in nats, or the least of the other flows of its size with its name."""
    rows = [each for each in rows_of("plane") if (each["target"], each["size"]) == (target, REFERENCE[1])]
    own = row(rows, family=REFERENCE[0])
    if ours:
        return format(own["kl"], ".3f")
    best = min((each for each in rows if each is not own), key=lambda each: each["kl"])
    return f"{best['kl']:.3f}, {best['family']}"


# --- sizes ----------------------------------------------------------------------------------------------


def sharded(count: str) -> str:
    return f"{load('sharding')['memory'][0][count]:,}"


def largest_scale() -> str:
    return f"{max(each['ratings'] for each in load('scale')['rows']) / 1e6:.0f} million"


FIGURES: dict[str, Callable[[], str]] = {
    "paper-mse": partial(reproduced, "test_mse"),
    "mlp-mse": partial(reproduced, "mlp_test_mse"),
    "ml-1m-ease-ndcg": partial(compared, "ml-1m", "ease", "full_ndcg@10"),
    "ml-1m-ease-seconds": partial(compared, "ml-1m", "ease", "train_seconds", ".0f"),
    "ml-1m-lunet-ndcg": partial(compared, "ml-1m", "lunet-interactions", "full_ndcg@10"),
    "ml-1m-lunet-seconds": partial(compared, "ml-1m", "lunet-interactions", "train_seconds", ".0f"),
    "identity-change": partial(ablated, "f", "identity", "mse_change", "+.4f"),
    "f-seconds": partial(ablated, "", "none", "seconds", ".1f"),
    "identity-seconds": partial(ablated, "f", "identity", "seconds", ".1f"),
    "ordinal-change": partial(ablated, "loss", "ordinal", "mse_change", "+.4f"),
    "sequence-seconds": partial(sequence, "none", "cpu_seconds", ".0f"),
    "sequence-identity-seconds": partial(sequence, "f = identity", "cpu_seconds", ".0f"),
    "sequence-ndcg": partial(sequence, "none", "ndcg@10", ".4f"),
    "sequence-identity-ndcg": partial(sequence, "f = identity", "ndcg@10", ".4f"),
    "sequence-unordered-ndcg": partial(sequence, "no order", "ndcg@10", ".4f"),
    "ordered-ndcg": partial(compared, "ml-1m", "lunet-sequence", "ndcg@10", folder="sequence/"),
    "ordered-identity-ndcg": partial(
        compared, "ml-1m", "lunet-sequence-identity", "ndcg@10", folder="sequence/"
    ),
    "after-a-day-ease": partial(after_a_day, "EASE", "hr@10"),
    "after-a-day": partial(after_a_day, "recipe sequence, one member", "hr@10"),
    "after-a-day-told": partial(after_a_day, "the same, told when it is asked", "hr@10"),
    "after-a-day-ease-all": partial(after_a_day, "EASE", "full_ndcg@10"),
    "after-a-day-all": partial(after_a_day, "recipe sequence, one member", "full_ndcg@10"),
    "equal-ours": partial(compared, "ml-100k", "lunet-ratings", "test_mse", folder="equal/"),
    "equal-identity": partial(compared, "ml-100k", "lunet-ratings-identity", "test_mse", folder="equal/"),
    "equal-sampled": partial(compared, "ml-100k", "lunet-sampled", "test_mse", folder="equal/"),
    "equal-fm": partial(compared, "ml-100k", "bayesian-svd++-side", "test_mse", folder="equal/"),
    "confidence-flow": partial(confidence, "flow"),
    "confidence-normal": partial(confidence, "log p, x"),
    "fold-in-users": lambda: str(load("fold-in")["tested_users"]),
    "digits": partial(digits, "LU-Net"),
    "digits-leaky": partial(digits, "LU-Net, LeakySoftplus"),
    "digits-couplings": partial(digits, "LULinear + splines (nflows)"),
    "digits-step": partial(digits_step, "LU-Net"),
    "digits-couplings-step": partial(digits_step, "LULinear + splines (nflows)"),
    "detection": partial(detection, best=False),
    "detection-best": partial(detection, best=True),
    "mixture-better": better_with_mixture,
    "mixture-least": lambda: f"{min(mixture_gains()):.2f}",
    "mixture-most": lambda: f"{max(mixture_gains()):.2f}",
    "spirals": partial(plane, "spirals", ours=True),
    "spirals-best": partial(plane, "spirals", ours=False),
    "highest-rate": lambda: f"{max(LADDERS['learning_rate']):g}",
    "highest-decay": lambda: f"{max(LADDERS['weight_decay']):g}",
    "reached": lambda: f"{REACHED:g}",
    "reversible-rows": lambda: f"{load('reversible-cpu')['rows'][0]['rows']:,}",
    "sharded-ratings": partial(sharded, "train_rows"),
    "sharded-users": partial(sharded, "users"),
    "sharded-items": partial(sharded, "items"),
    "largest-scale": largest_scale,
}
