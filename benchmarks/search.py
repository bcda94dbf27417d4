"""The settings that ``lunet-fast compare`` uses on ML-100K, ours and everybody's, by one search each.

    python benchmarks/search.py                              every method that is not searched yet
    python benchmarks/search.py --only knn mf lunet-ratings  single ones
    python benchmarks/search.py --seconds 600                a larger budget, the same for all

Every method has the same seconds of processor time on one thread, on the same validation part of the training
data of seed 0 (lunet_fast/recsys/evaluation/search.py). Writes results/search-ml-100k.json with every trial,
after each method, and what was chosen to lunet_fast/recsys/evaluation/chosen.json, which the package brings
along. A method that has been searched with the same budget and the same code is not searched again, so that
the script may be killed and called again. Says which of the chosen values lie at an end of their range.
"""

from __future__ import annotations

import sys
from typing import Any

from lunet_fast.recsys.data import movielens
from lunet_fast.recsys.evaluation.baselines import BASELINES, missing
from lunet_fast.recsys.evaluation.peer_settings import CHOSEN, SEARCHED_ON
from lunet_fast.recsys.evaluation.search import Found, Trial, search, searchable
from lunet_fast.training.files import read_json, write_json
from machine import RESULTS, Results, open_results, parser

SEED = 0
SECONDS = 60.0
NAME = f"search-{SEARCHED_ON}"


def markdown(methods: dict[str, Any]) -> str:
    lines = [
        f"# Settings searched on a validation part of {SEARCHED_ON.upper()}",
        "",
        "| method | measure | before | found | trials | seconds | at an end of its range |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for key, found in methods.items():
        full = [trial for trial in found["trials"] if trial["full"]]
        before = next((t["value"] for t in full if t["settings"] == found["first"]), None)
        cells = [key, found["measure"], "" if before is None else f"{before:.4f}", f"{found['value']:.4f}"]
        cells += [str(len(found["trials"]) - len(full)), f"{found['seconds']:.0f}"]
        ends = ", ".join(f"{name} ({end})" for name, end in found["at_ends"].items())
        lines.append("| " + " | ".join([*cells, ends]) + " |")
    lines += ["", "Seconds of processor time for trials; each value is of a training in full.", ""]
    chosen = [f"- `{key}`: {_words(found['settings'])}" for key, found in methods.items()]
    return "\n".join([*lines, *chosen]) + "\n"


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in settings.items())


def run(only: list[str], seconds: float, data_dir: str | None, results: Results) -> None:
    ratings = movielens.load(SEARCHED_ON, data_dir)
    file = results.path(f"{NAME}.json")
    methods: dict[str, Any] = read_json(file)["methods"] if file.is_file() else {}
    for key in only:
        kept = methods.get(key, {})
        if (kept.get("code"), kept.get("seconds")) == (results.code, seconds):
            continue
        reason = missing(BASELINES[key]) if key in BASELINES else None
        if reason is not None:
            print(reason, file=sys.stderr)
            continue

        def told(trial: Trial, key: str = key) -> None:
            value = trial.error if trial.value is None else f"{trial.value:.4f}"
            full = ", in full" * trial.full
            words = f"{key}: {value}, {trial.cpu_seconds:.1f} s{full}: {_words(trial.settings)}"
            print(words, file=sys.stderr, flush=True)

        found = search(ratings, key, seconds=seconds, seed=SEED, told=told)
        _say_ends(key, found)
        methods[key] = {**found.to_dict(), "code": results.code, "commit": results.machine["commit"]}
        methods = {name: methods[name] for name in searchable() if name in methods}
        results.write(NAME, {"methods": methods}, markdown(methods))
        chosen = {name: {"settings": each["settings"]} for name, each in methods.items()}
        target = CHOSEN if results.folder == RESULTS else results.path(CHOSEN.name)
        write_json(target, {"dataset": SEARCHED_ON, "command": "benchmarks/search.py", "methods": chosen})


def _say_ends(key: str, found: Found) -> None:
    for name, end in found.at_ends.items():
        words = f"{key}: {name}={found.settings[name]:g} lies at the {end} end of its range: widen it"
        print(words, file=sys.stderr, flush=True)


def main() -> None:
    options = parser(__doc__, data=True)
    known = searchable()
    options.add_argument("--only", metavar="METHOD", nargs="+", help="methods by their keys; others are kept")
    options.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of each method's trials (default {SECONDS:g})"
    )
    chosen = options.parse_args()
    for name in chosen.only or []:
        if name not in known:
            options.error(f"--only {name!r} is no method to search: choose from {', '.join(known)}")
    run(chosen.only or known, chosen.seconds, chosen.data_dir, open_results(chosen, threads=1))


if __name__ == "__main__":
    main()
