"""What is said of a rating file that cannot be used."""

from __future__ import annotations


class RatingFileError(ValueError):
    """A rating file that cannot be used; the message names the file, the line (from 1) and the value."""


def cause(error: BaseException) -> str:
    """What an error of another library says, on one line, short, and safe for a terminal."""
    return brief(str(error) or type(error).__name__, 200)


def brief(value: object, most: int = 80) -> str:
    """``value`` for a message: control characters are written out, and what is too long is cut."""
    text = str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
