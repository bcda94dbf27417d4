"""Which column is meant, where nobody says: the names that rating files usually have."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from lunet_fast.recsys.data.errors import RatingFileError

USUAL: dict[str, tuple[str, ...]] = {
    "user": (
        *("user", "userid", "users", "uid", "username", "reviewerid", "reviewer", "customerid", "customer"),
        *("memberid", "member", "visitorid", "personid", "accountid", "profileid", "u"),
    ),
    "item": (
        *("item", "itemid", "items", "iid", "movieid", "movie", "filmid", "film", "asin", "parentasin"),
        *("productid", "product", "bookid", "book", "isbn", "artistid", "artist", "songid", "trackid"),
        *("businessid", "placeid", "restaurantid", "gameid", "appid", "animeid", "beerid", "jokeid"),
        *("articleid", "newsid", "videoid", "courseid", "recipeid", "i"),
    ),
    "rating": (
        *(
            "rating",
            "ratings",
            "score",
            "stars",
            "star",
            "starrating",
            "bookrating",
            "overall",
            "reviewscore",
        ),
        *("reviewscore", "value", "weight", "playcount", "plays", "listens", "count", "r"),
    ),
    "timestamp": (
        *(
            "timestamp",
            "time",
            "unixreviewtime",
            "unixtime",
            "datetime",
            "date",
            "ratedat",
            "createdat",
            "ts",
        ),
    ),
}
"""By role, without case, blanks and punctuation; the first that is there is meant."""

_TYPED = re.compile(r":(?:token|float|token_seq|float_seq)$")


def plain_name(name: str) -> str:
    """A header without RecBole's ``:type``, case, blanks and punctuation."""
    return re.sub(r"[\W_]+", "", _TYPED.sub("", name.strip()).casefold())


def usual_column(source: str, names: Sequence[str], role: str, taken: Collection[int] = ()) -> int | None:
    """The place in ``names`` of the column that usually holds this role, ``taken`` ones aside; None for none.

    ``RatingFileError`` where two columns have the same such name.
    """
    plain = [plain_name(name) for name in names]
    for usual in USUAL.get(role, ()):
        found = [k for k, name in enumerate(plain) if name == usual and k not in taken]
        if len(found) > 1:
            both = " and ".join(repr(names[k]) for k in found[:2])
            raise RatingFileError(
                f"{source}: the columns {both} could both be the {role}: name one with {role}=..."
            )
        if found:
            return found[0]
    return None
