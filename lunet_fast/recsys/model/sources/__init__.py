"""What a user's state and an item's vector are sums of: one file a source.

Sources of a user's state are by the protocol of :class:`Source`, those of an item's vector by that of
:class:`ItemSource`. A new one is its file, a setting of
:class:`~lunet_fast.recsys.model.sequence_config.SequenceConfig`, an entry in
:class:`~lunet_fast.recsys.model.state_member.StateMember` and a row of ``benchmarks/sources.py``; what it
reads beside the sequences is a table of :class:`~lunet_fast.recsys.model.side.Side`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lunet_fast.recsys.model.sequences import Windows

Dropout = Callable[[Tensor], Tensor]
"""Sets entries to zero while training; hands on what it is given otherwise."""


class Source(Protocol):
    """Adds to a user's state what it knows of the user's past.

    ``items`` ``[n_items, d]`` are the vectors that items are scored with. An entry's state may depend on the
    entry itself and on earlier ones; it is to predict the next. That is all there is to the leaving out of a
    pair's own entry.
    """

    def after_each(self, windows: Windows, items: Tensor, dropout: Dropout) -> Tensor:
        """``[B, S, d]``: after each entry of the windows, as training needs it."""
        ...

    def after_last(self, windows: Windows, items: Tensor) -> Tensor:
        """``[B, d]``: after the last entry of each window, as serving needs it."""
        ...


class ItemSource(Protocol):
    """Adds to the vectors that items are scored with, and that the user's sources read."""

    def vectors(self, table: Tensor | None) -> Tensor:
        """``[n_items, d]``, from the source's table of ``Side``, None where it reads none."""
        ...
