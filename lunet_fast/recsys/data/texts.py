"""What items are described by: texts, as numbers, or numbers of one's own."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lunet_fast.recsys.data.errors import RatingFileError
from lunet_fast.recsys.data.ids import IdMap
from lunet_fast.recsys.data.limits import read_bytes
from lunet_fast.recsys.data.ratings import Ratings, read_table

TITLES = "titles"
"""In place of a file: the titles that a data set has."""
COLUMNS = 64
"""Numbers of a text."""


def with_text(
    ratings: Ratings, source: str | os.PathLike[str], *, item: str = "item", text: str = "text"
) -> Ratings:
    """``ratings`` with what its items are described by, in ``item_text``.

    ``source`` is a file of texts, in the formats of :func:`~.ratings.read_ratings`, whose columns ``item``
    and ``text`` are used, several rows of an item being one text; or ``titles``, for those of the data set;
    or an ``.npz`` file of anything else, such as a sentence encoder's vectors, with the arrays ``item``
    ``[n]`` of ids and ``vectors`` ``[n, T]``. Items that only the file has are added to the ratings' items,
    where nothing but their description tells them apart; items that it lacks have zeros.

    ``RatingFileError`` for a file that is not so, ``ValueError`` where there are no titles, ``ImportError``
    without scikit-learn where there are texts.
    """
    if str(source) == TITLES:
        if ratings.item_info is None or "title" not in ratings.item_info:
            raise ValueError(f"text='titles': {ratings.name} has no titles of items: name a file of texts")
        return replace(
            ratings, item_text=text_table(ratings.item_info["title"].fillna("").astype(str).tolist())
        )
    file = Path(source)
    ids, texts, vectors = _vectors(file) if file.suffix == ".npz" else _texts(file, item, text)
    ratings = with_items(ratings, ids)
    place = torch.from_numpy(ratings.items.index(ids))
    if vectors is None:
        joined = [""] * ratings.n_items
        for n, some in zip(place.tolist(), texts, strict=True):
            joined[n] = f"{joined[n]} {some}".strip()
        return replace(ratings, item_text=text_table(joined))
    table = torch.zeros(ratings.n_items, vectors.shape[1])
    table[place] = torch.from_numpy(vectors)
    return replace(ratings, item_text=table)


def text_table(texts: Sequence[str], columns: int = COLUMNS) -> torch.Tensor:
    """Texts as float32 ``[n, T]``, T at most ``columns``, rows of length 1, or 0 where nothing is known.

    TF-IDF of words and pairs of words that two texts or more have, reduced to its first singular vectors
    (latent semantic analysis). The same texts give the same numbers. ``ValueError`` where no word is in two
    texts.
    """
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError('texts need scikit-learn: pip install "lunet-fast[text]"') from error
    try:
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit_transform(list(texts))
    except ValueError as error:
        raise ValueError(
            f"text: no word is in two of the {len(texts)} texts, so none says anything"
        ) from error
    if min(words.shape) > columns:
        words = TruncatedSVD(columns, random_state=0).fit_transform(words)
    else:
        words = words.toarray()
    length = np.sqrt(np.square(words).sum(1, keepdims=True))
    table: npt.NDArray[np.float32] = (words / np.maximum(length, 1e-12)).astype(np.float32)
    return torch.from_numpy(table)


def _texts(file: Path, item: str, text: str) -> tuple[list[str], list[str], None]:
    """(an id and a text for each row, no vectors)."""
    table = read_table(file, item=item, text=text)
    table.refuse_empty("item")
    ids, texts = (table.columns[role] for role in ("item", "text"))
    return [ids.texts[k] for k in ids.codes], [texts.texts[k] for k in texts.codes], None


def _vectors(file: Path) -> tuple[list[str], list[str], npt.NDArray[np.float32]]:
    """(ids, no texts, vectors float32 ``[n, T]``)."""
    try:
        with np.load(io.BytesIO(read_bytes(file)), allow_pickle=False) as arrays:
            ids, vectors = arrays["item"], arrays["vectors"]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise RatingFileError(
            f"{file}: no file of the arrays 'item' and 'vectors' that numpy.savez writes ({error})"
        ) from error
    fit = ids.ndim == 1 and vectors.ndim == 2 and len(ids) == len(vectors) and vectors.shape[1] > 0
    if not fit or vectors.dtype.kind not in "fiu" or ids.dtype.kind not in "iuU":
        raise RatingFileError(
            f"{file}: item must be ids [n] and vectors numbers [n, T], got {ids.dtype} {list(ids.shape)} and "
            f"{vectors.dtype} {list(vectors.shape)}"
        )
    names = [str(value) for value in ids.tolist()]
    if len(set(names)) < len(names):
        raise RatingFileError(f"{file}: an id is there twice: give each item one vector")
    numbers: npt.NDArray[np.float32] = vectors.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RatingFileError(f"{file}: vectors has numbers that are not finite (as float32)")
    return names, [], numbers


def with_items(ratings: Ratings, ids: Sequence[str]) -> Ratings:
    """The same ratings, of items among which are all of ``ids``, those without ratings included."""
    if bool((ratings.items.index(ids) >= 0).all()):
        return ratings
    items = IdMap.of([*ratings.items.ids.tolist(), *ids])
    place = items.index(ratings.items.ids)
    info = ratings.item_info
    if info is not None:
        rows = np.full(len(items), -1)
        rows[place] = np.arange(len(place))
        info = info.reset_index(drop=True).reindex(rows).reset_index(drop=True)
    return replace(
        ratings, item=torch.from_numpy(place)[ratings.item], items=items, item_info=info, item_text=None
    )
