"""How often a compiled kernel's machine instructions are executed, by its control flow; nothing is run.

``nvdisasm`` prints the instructions with their labels. Branches make them blocks, and a branch back to a
block that all paths to it pass makes a loop. How often a loop goes round is known from the kernel's source
and its sizes: the caller gives the numbers as a tree, ``Loop``, in the order of the code, and a code of other
loops is refused. Of two sides of another branch the one of more instructions is taken; a conditional exit (of
warps without rows) is passed by. So a program's count is that of a full tile, which all but the last one are.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

#: Executed instructions by name, with its suffixes.
Counts = dict[str, float]


class Loop(NamedTuple):
    """How often a loop goes round for each time that it is come to, and the loops within."""

    trips: float
    within: tuple[Loop, ...] = ()
    fixed: bool = False
    """Of constant length: the compiler may have written it out."""


@dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    names: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


_LABEL = re.compile(r"^\s*\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\.(L_x_\d+)")


def blocks_of(code: str) -> list[Block]:
    """The blocks of what ``nvdisasm -c`` printed of one kernel, the first being where it starts."""
    lines: list[tuple[bool, str, str]] = []  # conditional, name, the rest
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.search(line):
            lines.append((found[1] is not None, found[2], found[3]))
    starts = {0, *labels.values()} | {i + 1 for i, (_, name, _) in enumerate(lines) if _ends(name)}
    order = sorted(start for start in starts if start < len(lines))
    number = {start: k for k, start in enumerate(order)}
    blocks = []
    for start, end in zip(order, [*order[1:], len(lines)], strict=True):
        block = Block([name for _, name, _ in lines[start:end]])
        conditional, name, rest = lines[end - 1]
        # BRA may have a condition of its own besides: BRA.U !UP0, or BRA P0, `(.L_x_0).
        passed = conditional or ".U" in name or rest.lstrip().startswith(("P", "!P", "UP", "!UP"))
        if name.startswith("BRA"):
            target = _TARGET.search(rest)
            if target is None:
                raise ValueError(f"a branch without a label: {name} {rest}")
            block.after.append(number[labels[target[1]]])
        if end in number and (passed or not _ends(name)):
            block.after.append(number[end])
        blocks.append(block)
    return blocks


def _ends(name: str) -> bool:
    return name.partition(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP")


@dataclass
class _Found:
    """A loop of the code: its first block, all its blocks, and the loops within."""

    head: int
    body: set[int]
    within: list[_Found] = field(default_factory=list)


def _loops(blocks: Sequence[Block]) -> list[_Found]:
    """The loops that are in no other, in the order of the code."""
    before: dict[int, set[int]] = {k: set() for k in range(len(blocks))}
    back: list[tuple[int, int]] = []
    state = {0: 1}  # 1: on the way, 2: done
    path = [(0, iter(blocks[0].after))]
    while path:
        block, rest = path[-1]
        after = next(rest, None)
        if after is None:
            state[block] = 2
            path.pop()
            continue
        before[after].add(block)
        if state.get(after) == 1:
            back.append((block, after))
        elif after not in state:
            state[after] = 1
            path.append((after, iter(blocks[after].after)))
    found: dict[int, _Found] = {}
    for last, head in back:
        loop = found.setdefault(head, _Found(head, {head}))
        todo = [last]
        while todo:
            block = todo.pop()
            if block not in loop.body:
                loop.body.add(block)
                todo.extend(before[block])
    outer: list[_Found] = []
    for loop in sorted(found.values(), key=lambda loop: -len(loop.body)):
        place = outer
        while inside := next((other for other in place if loop.head in other.body), None):
            place = inside.within
        place.append(loop)
    for loop in found.values():
        loop.within.sort(key=lambda inner: inner.head)
    return sorted(outer, key=lambda loop: loop.head)


def executed(code: str, loops: Sequence[Loop]) -> Counts:
    """Instructions that one warp executes, by name, where loops go round as often as ``loops`` say.

    Raises:
        ValueError: the code's loops are not those, or it branches in a way that is not understood.
    """
    blocks = blocks_of(code)
    found = _loops(blocks)
    given = next((each for each in _written_out(loops) if _shape(each) == _shape(found)), None)
    if given is None:
        raise ValueError(f"the code's loops are {_shape(found)}, not {_shape(loops)}")
    return dict(_longest(blocks, 0, set(range(len(blocks))), found, given))


def in_loops(code: str, names: Sequence[str]) -> int:
    """How many instructions of these names, without suffixes, stand in a loop: others are executed once."""
    blocks = blocks_of(code)
    looped = set().union(*(loop.body for loop in _loops(blocks)))
    return sum(name.partition(".")[0] in names for block in looped for name in blocks[block].names)


def _written_out(loops: Sequence[Loop]) -> Iterator[tuple[Loop, ...]]:
    """``loops``, and what is left of them where fixed ones have been written out."""
    if not loops:
        yield ()
        return
    first, rest = loops[0], loops[1:]
    for within, after in itertools.product(list(_written_out(first.within)), list(_written_out(rest))):
        yield (first._replace(within=within), *after)
        if first.fixed:
            yield (*within * int(first.trips), *after)


def _shape(loops: Sequence[_Found] | Sequence[Loop]) -> str:
    return "[" + " ".join(_shape(loop.within) for loop in loops) + "]"


def _longest(
    blocks: Sequence[Block], start: int, inside: set[int], found: list[_Found], loops: Sequence[Loop]
) -> Counter[str]:
    """Of all paths from ``start`` through the blocks ``inside`` that do not come back to it, the one of most
    instructions."""
    by_head = {loop.head: (loop, trips) for loop, trips in zip(found, loops, strict=True)}
    known: dict[int, Counter[str] | None] = {}

    def own(block: int) -> tuple[Counter[str], list[int]]:
        if block not in by_head:
            return Counter(blocks[block].names), blocks[block].after
        loop, given = by_head[block]
        once = _longest(blocks, block, loop.body, loop.within, given.within)
        leaves = [after for k in sorted(loop.body) for after in blocks[k].after if after not in loop.body]
        return Counter({name: count * given.trips for name, count in once.items()}), leaves

    def from_here(block: int) -> Counter[str]:
        if block not in known:
            known[block] = None
            count, after = own(block)
            rest = [from_here(k) for k in dict.fromkeys(after) if k in inside and k != start]
            known[block] = count + max(rest, key=lambda counts: sum(counts.values()), default=Counter())
        result = known[block]
        if result is None:
            raise ValueError("a branch goes back into a loop that has another way in")
        return result

    return from_here(start)
