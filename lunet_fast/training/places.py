"""Where data sets are looked for and kept: two variables of the environment, and the cache."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "LUNET_FAST_DATA"
"""A folder of data sets that is looked through."""

CACHE_VARIABLE = "LUNET_FAST_CACHE"
"""The folder in which what was fetched is kept."""


def cache_folder() -> Path:
    """``$LUNET_FAST_CACHE``, or the platform's cache folder (``~/.cache/lunet-fast`` on Linux)."""
    given = os.environ.get(CACHE_VARIABLE, "")
    if given:
        return Path(given)
    try:
        import pooch
    except ImportError:
        return Path("~/.cache/lunet-fast").expanduser()
    return Path(pooch.os_cache("lunet-fast"))
