"""The command ``lunet-fast``, also as ``python -m lunet_fast``."""

from __future__ import annotations

import importlib.util
import signal
import sys
from types import FrameType

# What the command line needs beyond the library itself: the extra [train]. ``doctor``, which says what is
# missing, gets by with the first two.
_NEEDED = ("typer", "rich", "pandas", "pydantic", "matplotlib", "jinja2", "safetensors", "pooch")
_NEEDED_BY_DOCTOR = _NEEDED[:2]


def end_in_order() -> None:
    """From here on SIGTERM ends the process as an exception does, with what it leaves half done removed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # A shell that said to ignore it meant that.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


def main() -> None:
    """Run the command line, or say what to install where it cannot run."""
    needed = _NEEDED_BY_DOCTOR if sys.argv[1:2] == ["doctor"] else _NEEDED
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"lunet-fast: {', '.join(missing)} not installed: run  pip install 'lunet-fast[train]'")
    from lunet_fast.cli import app

    end_in_order()
    app(prog_name="lunet-fast")


if __name__ == "__main__":
    main()
