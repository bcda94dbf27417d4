"""Write a report again, without training: ``python -m lunet_fast.recsys.report FOLDER [RESULTS]``.

FOLDER holds ``reproduction.json``, as ``lunet-fast reproduce`` left it; RESULTS, the same folder where it is
left out, the result files that the report quotes.
"""

import sys
from pathlib import Path

from lunet_fast.recsys.report.reproduce import write_report
from lunet_fast.recsys.report.results import Committed, Reproduction

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    write_report(folder, Reproduction.load(folder, Committed(Path(sys.argv[-1]))))
