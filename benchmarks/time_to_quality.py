"""Time to a test error on MovieLens: recipe best, cornac's MF and myFM, each trained once in whole.

    python benchmarks/time_to_quality.py --data-dir DIR                 ML-100K: a minute
    python benchmarks/time_to_quality.py --dataset ml-100k ml-1m        ML-1M too: ten minutes

Writes benchmarks/results/time-to-quality.json. Needs cornac and myFM, of the extra bench; what is missing is
named in the file.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from lunet_fast.bench.machine import versions
from lunet_fast.bench.quality import THREADS, line, time_to_quality
from lunet_fast.recsys.data.movielens import DATASETS
from machine import open_results, parser


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--dataset", nargs="+", choices=list(DATASETS), default=["ml-100k"])
    options.add_argument("--seed", type=int, default=0, help="of the split and of every method")
    options.add_argument("--threads", type=int, nargs="+", default=list(THREADS), metavar="N")
    chosen = options.parse_args()
    results = open_results(chosen)
    trainings = time_to_quality(
        chosen.data_dir,
        chosen.dataset,
        chosen.seed,
        threads=chosen.threads,
        told=lambda quality: print(line(quality), file=sys.stderr, flush=True),
    )
    results.write(
        "time-to-quality",
        {"versions": versions(), "trainings": [asdict(training) for training in trainings]},
    )


if __name__ == "__main__":
    main()
