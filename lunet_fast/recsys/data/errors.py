"""What is said of a rating file that cannot be used, and of a wrong argument."""

from __future__ import annotations

import numpy as np


class RatingFileError(ValueError):
    """A rating file that cannot be used; the message names the file, the line (from 1) and the value."""


class Unavailable(Exception):
    """Why a source does not have the data set, or a zip no table."""


def cause(error: BaseException) -> str:
    """What an error of another library says, on one line, short, and safe for a terminal."""
    return brief(str(error) or type(error).__name__, 200)


def brief(value: object, most: int = 80) -> str:
    """``value`` for a message: control characters are written out, and what is too long is cut."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_whole(name: str, value: object, least: int) -> int:
    """The argument ``name``; ValueError unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
