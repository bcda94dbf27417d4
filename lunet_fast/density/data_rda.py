"""A data frame of R's ``.rda`` files, by the package rdata, which parses the format and executes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from lunet_fast.density.data_limits import DataError, brief, read_bytes, unpacked

MOST_BYTES = 6 << 20
"""Of the unpacked file. Of those that are read the largest has 5.2 million; an object of four bytes there
becomes one of some hundred."""


MOST_COUNTED = 1 << 20
"""In compact sequences of the file, which state any length in a few bytes, all together."""


def _sequences() -> dict[bytes, Any]:
    """rdata's constructors of what R stores as something else, those of bounded size."""
    from rdata.parser import DEFAULT_ALTREP_MAP

    counted = 0

    def bounded(name: bytes) -> Any:
        def construct(state: Any) -> Any:
            nonlocal counted
            counted += abs(int(state.value[0]))
            if counted > MOST_COUNTED:
                raise ValueError(f"compact sequences of more than {MOST_COUNTED:,} numbers")
            return DEFAULT_ALTREP_MAP[name](state)

        return construct

    wrapped = {name: make for name, make in DEFAULT_ALTREP_MAP.items() if name.startswith(b"wrap_")}
    return {**wrapped, **{name: bounded(name) for name in (b"compact_intseq", b"compact_realseq")}}


def read_rda(path: Path) -> pd.DataFrame:
    """The only object of the file, which must be a data frame. Factors are categories.

    :class:`DataError` for anything else, ``ImportError`` without rdata.
    """
    try:
        import rdata
    except ImportError as error:
        raise ImportError(
            f"{path}: R's files are read by rdata: pip install 'lunet-fast[density]'"
        ) from error
    data = unpacked(path, read_bytes(path), MOST_BYTES)
    if data[:7] not in (b"RDX2\nX\n", b"RDX3\nX\n"):  # the XDR format; others are text, or packed once more
        raise DataError(f"{path}: is no data file of R: it begins with {brief(data[:7])}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of encodings, of names that are ASCII
            parsed = rdata.parser.parse_data(data, altrep_constructor_dict=_sequences(), extension=".rda")
            objects = rdata.conversion.convert(parsed)
    except Exception as error:  # of rdata, NumPy and pandas, by what the file holds; also RecursionError
        raise DataError(f"{path}: the file is damaged ({type(error).__name__}: {brief(error)})") from error
    found = list(objects.values()) if isinstance(objects, dict) else []
    if len(found) != 1 or not isinstance(found[0], pd.DataFrame):
        raise DataError(f"{path}: must hold one data frame and nothing else")
    frame = found[0]
    frame.columns = [str(name) for name in frame.columns]
    if frame.columns.has_duplicates:
        raise DataError(f"{path}: two columns have the same name")
    return frame
