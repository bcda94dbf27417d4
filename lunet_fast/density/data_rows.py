"""Rows to learn a density of, and their parts for training, validation and test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lunet_fast.density.data_limits import DataError, brief
from lunet_fast.density.targets import Target

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
"""Of all rows: held out for the test, and for choosing when to stop."""

TRAINING, VALIDATION, TEST = 0, 1, 2
"""Where a row belongs by its publisher; what is :data:`VALIDATION` may be left to a draw."""

_OF_CLASS = ", class "


@dataclass(frozen=True)
class Rows:
    """Rows of one data set.

    ``values`` [N, D] float32, finite; with ``levels``, integers from 0 to levels − 1. ``labels`` [N] int64
    from 0 on, or None; ``label_names`` what they were called, where they had names. ``image`` is (height,
    width) where a row is a picture. ``target`` is the density that the rows were drawn from, where it is
    known. ``source`` says where they are from, for the results. ``part`` [N] int8 has :data:`TRAINING`,
    :data:`VALIDATION` or :data:`TEST` of each row, where the publisher said so.
    """

    name: str
    values: Tensor
    labels: Tensor | None = None
    levels: int | None = None
    image: tuple[int, int] | None = None
    target: Target | None = None
    source: str = ""
    label_names: tuple[str, ...] | None = None
    part: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def features(self) -> int:
        return self.values.shape[1]

    @property
    def classes(self) -> int:
        """How many labels there are, 0 without."""
        if self.labels is None:
            return 0
        return len(self.label_names) if self.label_names is not None else int(self.labels.max()) + 1

    def where(self, chosen: Tensor) -> Rows:
        """The rows at the indices, or with True, in ``chosen``."""
        labels = None if self.labels is None else self.labels[chosen]
        part = None if self.part is None else self.part[chosen]
        return replace(self, values=self.values[chosen], labels=labels, part=part)


@dataclass(frozen=True)
class Parts:
    """Training, validation and test rows; no row in two of them."""

    training: Rows
    validation: Rows
    test: Rows


def source_of(rows: Rows, test: Rows | None) -> str:
    """Where the rows of a training and those of its test are from."""
    return rows.source if test is None else f"{rows.source}; test: {test.source}"


def split(rows: Rows, seed: int, test: Rows | None = None) -> Parts:
    """20 % for the test, 10 % for validation, the rest for training; ``seed`` alone says which is which.

    With ``test``, other rows of the same kind, these are the test, and all but the validation's train. Rows
    with a ``part`` go where that says; where it names no validation, 10 % of the training rows are drawn.

    Raises :class:`DataError` for fewer than 10 rows, and for a published part that has none.
    """
    if rows.part is not None:
        if test is not None:
            raise DataError(f"{rows.name}: has test rows of its own, so --test-file must not be given")
        return _published(rows, rows.part, seed)
    count = len(rows)
    order = _order(rows, seed)
    held, validation = math.ceil(TEST_SHARE * count), math.ceil(VALIDATION_SHARE * count)
    if test is not None:
        return Parts(rows.where(order[validation:]), rows.where(order[:validation]), test)
    parts = order[held + validation :], order[held : held + validation], order[:held]
    return Parts(*(rows.where(part) for part in parts))


def _order(rows: Rows, seed: int) -> Tensor:
    if len(rows) < 10:
        raise DataError(f"{rows.name} has {len(rows)} rows: at least 10 are needed for three parts")
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))


def _published(rows: Rows, part: Tensor, seed: int) -> Parts:
    training, validation, test = (rows.where(part == number) for number in (TRAINING, VALIDATION, TEST))
    if not len(test):
        raise DataError(f"{rows.name}: none of its {len(rows)} rows is one of the publisher's test rows")
    order = _order(training, seed)
    if not len(validation):
        count = math.ceil(VALIDATION_SHARE * len(training))
        training, validation = training.where(order[count:]), training.where(order[:count])
    return Parts(training, validation, test)


def of_class(rows: Rows, label: str) -> Rows:
    """The rows of the class called ``label``, or of that number where classes have no names.

    They have no labels any more. Raises :class:`DataError` where there is no such class.
    """
    if rows.labels is None:
        raise DataError(f"{rows.name}: has no labels, so no class {brief(label)}: leave --class away")
    names = rows.label_names or tuple(str(number) for number in range(rows.classes))
    if label not in names:
        shown = ", ".join(map(brief, names[:30])) + ", …" * (len(names) > 30)
        raise DataError(f"{rows.name}: has no class {brief(label)}; --class must be one of {shown}")
    chosen = rows.where(rows.labels == names.index(label))
    if not len(chosen):
        raise DataError(f"{rows.name}: has no row of the class {brief(label)}")
    return replace(chosen, name=f"{rows.name}{_OF_CLASS}{label}", labels=None, label_names=None)


def split_name(name: str) -> tuple[str, str | None]:
    """(name of the data set, class) of the name of rows that :func:`of_class` may have made."""
    before, found, after = name.rpartition(_OF_CLASS)
    return (before, after) if found else (name, None)
