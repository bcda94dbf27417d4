"""Memory that remembers who touched it: races, uninitialised reads and accesses out of bounds.

Each granule (as many bytes as the smallest access, at most 4) has in its shadow the thread that wrote it
last, the threads that read it last, and when. A thread's time is its count of ``bar.sync`` and, within one,
of ``bar.warp.sync``. Two touches of a granule, one of them a write, are a race

- by threads of two programs: always, for nothing orders programs;
- by threads of two warps: if no ``bar.sync`` lies between;
- by two lanes of a warp: if neither lies between.

One reader is remembered for each granule, or that there were several of one warp, or of several warps.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import UNSIGNED, Array, i4, i8, u1, u8
from tests.ptx.program import Instruction

#: ``bar.warp.sync`` are counted in the low bits of a thread's time, ``bar.sync`` above.
WARP_TICKS = 12
BARRIER = 1 << WARP_TICKS

#: In the place of a writer's time: an asynchronous copy that nobody has waited for.
PENDING = np.iinfo(i4).max

#: In the place of a reader: none yet, several warps of a program, and SEVERAL − w: several lanes of warp w.
NOBODY, WARPS, SEVERAL = -1, -2, -3


class Findings:
    """What was wrong, by kind and instruction: how often, and the first example."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Instruction], tuple[int, str]] = {}

    def add(self, kind: str, instruction: Instruction, example: str) -> None:
        count, first = self._found.get((kind, instruction), (0, example))
        self._found[kind, instruction] = (count + 1, first)

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._found}

    def each(self) -> Iterator[tuple[str, str]]:
        """(kind, the rest in words) of each."""
        for (kind, instruction), (count, example) in self._found.items():
            yield kind, f"{count} times, {example}, {instruction}"


class Touch(NamedTuple):
    """An access by some threads: their numbers in the launch, their times, and the granules [threads, n]."""

    threads: Array
    times: Array
    granules: Array
    instruction: Instruction


@dataclass
class Shadow:
    """Who wrote and read each granule last, and when."""

    name: str
    granules: int
    granule: int
    threads: int
    """Of a program."""
    findings: Findings
    writer: Any = field(init=False)
    written: Any = field(init=False)
    reader: Any = field(init=False)
    read: Any = field(init=False)

    def __post_init__(self) -> None:
        self.writer, self.written, self.reader, self.read = (
            np.full(self.granules, NOBODY, i4) for _ in range(4)
        )

    def on_read(self, touch: Touch, *, initialised: bool) -> None:
        """Check a read against the last writes and remember it; ``initialised``: there must be one."""
        at, me, now = self._columns(touch)
        writer = self._check_writer("read", touch, at, me, now)
        if initialised and (writer == NOBODY).any():
            count = int((writer == NOBODY).sum())
            self.findings.add(f"{self.name}: read before any write", touch.instruction, f"{count} granules")
        earlier, when = self.reader[at], self.read[at]
        live = ((when >> WARP_TICKS) == (now >> WARP_TICKS)) & (earlier != NOBODY)
        my_warp = me // 32
        warp = _warp_of(earlier)
        self.reader[at], self.read[at] = me, now
        last = self.reader[at]  # of several in this instruction one is left
        wide = (live & (warp != my_warp)) | (last // 32 != my_warp)
        lanes = ((live & (warp == my_warp) & (earlier != me)) | (last != me)) & ~wide
        if lanes.any():
            self.reader[at[lanes]] = SEVERAL - np.broadcast_to(my_warp, at.shape)[lanes]
        if wide.any():
            self.reader[at[wide]] = WARPS

    def on_write(self, touch: Touch, *, pending: bool = False) -> None:
        """Check a write against the last writes and reads and remember it; ``pending``: copied in later."""
        at, me, now = self._columns(touch)
        self._check_writer("write", touch, at, me, now)
        reader, when = self.reader[at], self.read[at]
        warp = _warp_of(reader)
        same_warp = warp == me // 32
        same_program = (reader == WARPS) | (warp * 32 // self.threads == me // self.threads)
        ordered = np.where(same_warp, when != now, (when >> WARP_TICKS) != (now >> WARP_TICKS))
        clash = (reader != NOBODY) & (reader != me) & ~(ordered & same_program)
        self._report("write after read", touch, clash, same_warp, reader)
        self.writer[at] = me
        self.written[at] = PENDING if pending else now
        # Threads of one program that write the same at once are harmless, and Triton lets them.
        last = self.writer[at]
        beside = last // self.threads != me // self.threads
        self._report("write after write", touch, beside, np.zeros_like(beside), last)

    def arrived(self, granules: Array, times: Array) -> None:
        """Asynchronous copies into these granules have been waited for, at these times."""
        self.written[granules] = times

    def _columns(self, touch: Touch) -> tuple[Array, Array, Array]:
        return touch.granules, touch.threads[:, None].astype(i4), touch.times[:, None]

    def _check_writer(self, what: str, touch: Touch, at: Array, me: Array, now: Array) -> Array:
        writer, written = self.writer[at], self.written[at]
        if (written == PENDING).any():
            count = int((written == PENDING).sum())
            kind = f"{self.name}: {what} of what cp.async has not been waited for"
            self.findings.add(kind, touch.instruction, f"{count} granules")
        same_warp = writer // 32 == me // 32
        same_program = writer // self.threads == me // self.threads
        ordered = np.where(same_warp, written != now, (written >> WARP_TICKS) != (now >> WARP_TICKS))
        clash = (writer != NOBODY) & (writer != me) & ~(ordered & same_program)
        self._report(f"{what} after write", touch, clash, same_warp, writer)
        return writer

    def _report(self, what: str, touch: Touch, clash: Array, same_warp: Array, other: Array) -> None:
        if not clash.any():
            return
        for between, hit in (
            ("two warps or programs", clash & ~same_warp),
            ("lanes of a warp", clash & same_warp),
        ):
            if hit.any():
                row, column = (int(index) for index in np.argwhere(hit)[0])
                example = (
                    f"{int(hit.sum())} granules, byte {int(touch.granules[row, column]) * self.granule}, "
                    f"thread {int(touch.threads[row])} and {int(other[row, column])}"
                )
                kind = f"{self.name}: {what}, {between}"
                self.findings.add(kind, touch.instruction, example)


def _warp_of(reader: Array) -> Array:
    """The warp of one reader or of several of its lanes; NOBODY else."""
    return np.where(reader >= 0, reader // 32, np.where(reader <= SEVERAL, SEVERAL - reader, NOBODY))


class Region(NamedTuple):
    """Memory that a launch was given: a tensor's name, address and bytes, and where they really lie."""

    name: str
    start: int
    size: int
    memory: int

    @property
    def end(self) -> int:
        return self.start + self.size


class _Mapped:
    """A region's bytes, under arrays of each width, and their shadow."""

    def __init__(self, region: Region, shadow: Shadow | None) -> None:
        self.region, self.shadow = region, shadow
        held = (ctypes.c_uint8 * max(region.size, 1)).from_address(region.memory)
        raw = np.ctypeslib.as_array(held)[: region.size]
        self.words = {n: raw[: region.size // n * n].view(UNSIGNED[8 * n]) for n in (1, 2, 4, 8)}


class GlobalMemory:
    """The tensors of a launch; what lies outside of them is not touched, only reported."""

    def __init__(self, regions: Sequence[Region], granule: int, threads: int, findings: Findings) -> None:
        """``granule`` 0: without shadows."""
        self.findings, self.granule = findings, granule
        # A tensor may be given twice.
        unique = {(region.start, region.size): region for region in regions if region.size}
        self.mapped = []
        for region in sorted(unique.values(), key=lambda region: region.start):
            cells = -(-region.size // granule) if granule else 0
            shadow = Shadow(f"tensor {region.name}", cells, granule, threads, findings) if granule else None
            self.mapped.append(_Mapped(region, shadow))
        self.starts = [each.region.start for each in self.mapped]

    def load(self, addresses: Array, size: int, count: int, touch: Touch) -> Array:
        """[threads, count] numbers of ``size`` bytes from each address on; 0 out of bounds."""
        out = np.zeros((len(addresses), count), UNSIGNED[8 * size])
        for mapped, chosen, offsets in self._locate(addresses, size * count, touch.instruction):
            out[chosen] = mapped.words[size][(offsets // size)[:, None] + np.arange(count)]
            if mapped.shadow is not None:
                mapped.shadow.on_read(self._part(touch, chosen, offsets, size * count), initialised=False)
        return out

    def store(self, addresses: Array, values: Array, touch: Touch) -> None:
        """``values`` [threads, count] from each address on."""
        size, count = values.dtype.itemsize, values.shape[1]
        for mapped, chosen, offsets in self._locate(addresses, size * count, touch.instruction):
            where = (offsets // size)[:, None] + np.arange(count)
            mapped.words[size][where] = values[chosen]
            if mapped.shadow is not None:
                mapped.shadow.on_write(self._part(touch, chosen, offsets, size * count))
            if (mapped.words[size][where] != values[chosen]).any():
                kind = f"tensor {mapped.region.name}: two threads write different values in one instruction"
                self.findings.add(kind, touch.instruction, "")

    def _part(self, touch: Touch, chosen: Array, offsets: Array, size: int) -> Touch:
        granules = (offsets // self.granule)[:, None] + np.arange(max(size // self.granule, 1))
        return Touch(touch.threads[chosen], touch.times[chosen], granules, touch.instruction)

    def _locate(
        self, addresses: Array, size: int, instruction: Instruction
    ) -> Iterator[tuple[_Mapped, Array, Array]]:
        """(memory, which addresses lie in it, their offsets) for each tensor that is touched."""
        if len(addresses) == 0:
            return
        if (addresses % u8(size)).any():
            self.findings.add("global memory: misaligned", instruction, f"{size} bytes")
        low, high = int(addresses.min()), int(addresses.max()) + size
        first = bisect.bisect_right(self.starts, low) - 1
        if first >= 0 and high <= self.mapped[first].region.end:
            mapped = self.mapped[first]
            yield mapped, np.arange(len(addresses)), (addresses - u8(mapped.region.start)).astype(i8)
            return
        which = np.searchsorted(np.asarray(self.starts, u8), addresses, side="right") - 1
        ends = np.asarray([each.region.end for each in self.mapped], u8)
        inside = (which >= 0) & (addresses + u8(size) <= ends[np.maximum(which, 0)])
        if not inside.all():
            self.findings.add("global memory: out of bounds", instruction, self._nearest(addresses[~inside]))
        for number in np.unique(which[inside]):
            chosen = np.flatnonzero(inside & (which == number))
            mapped = self.mapped[number]
            yield mapped, chosen, (addresses[chosen] - u8(mapped.region.start)).astype(i8)

    def _nearest(self, addresses: Array) -> str:
        address = int(addresses[0])
        regions = [each.region for each in self.mapped]
        near = min(regions, key=lambda r: min(abs(address - r.start), abs(address - r.end)))
        offset = address - near.start
        return f"{len(addresses)} threads, e.g. byte {offset} of {near.name}, which has {near.size}"


class SharedMemory:
    """The shared memory of several programs, one after the other, unwritten at first."""

    def __init__(self, size: int, programs: int, shadow: Shadow | None, findings: Findings) -> None:
        self.size, self.shadow, self.findings = size, shadow, findings
        raw = np.full(size * programs, 0xFF, u1)
        self.words = {n: raw.view(UNSIGNED[8 * n]) for n in (1, 2, 4, 8)}

    def index(self, addresses: Array, programs: Array, size: int, instruction: Instruction) -> Array:
        """Bytes from the start of all shared memory, after the checks of bounds and alignment."""
        at = addresses.astype(i8)
        outside = (at < 0) | (at + size > self.size)
        if outside.any():
            example = f"{int(outside.sum())} accesses, e.g. byte {int(at[outside][0])} of {self.size}"
            self.findings.add("shared memory: out of bounds", instruction, example)
            at = np.where(outside, 0, at)
        if (at % size).any():
            self.findings.add("shared memory: misaligned", instruction, f"{size} bytes")
            at -= at % size
        return at + programs.astype(i8) * self.size

    def load(self, at: Array, size: int, count: int, touch: Touch) -> Array:
        """[threads, count] numbers of ``size`` bytes from byte ``at`` [threads] on."""
        if self.shadow is not None:
            self.shadow.on_read(self._touched(touch, at, size * count), initialised=True)
        return self.words[size][(at // size)[:, None] + np.arange(count)]

    def store(self, at: Array, values: Array, touch: Touch) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        where = (at // size)[:, None] + np.arange(count)
        self.words[size][where] = values
        if self.shadow is not None:
            self.shadow.on_write(self._touched(touch, at, size * count))
            if (self.words[size][where] != values).any():
                kind = "shared memory: two threads write different values in one instruction"
                self.findings.add(kind, touch.instruction, "")

    def reserve(self, at: Array, size: int, touch: Touch) -> None:
        """Bytes into which an asynchronous copy will write; whoever looks before sees NaN."""
        self.words[4][(at // 4)[:, None] + np.arange(size // 4)] = 0xFFFFFFFF
        if self.shadow is not None:
            self.shadow.on_write(self._touched(touch, at, size), pending=True)

    def arrive(self, at: Array, values: Array, times: Array) -> None:
        """What was copied is there for the threads that copied it, and after a barrier for others."""
        self.words[4][(at // 4)[:, None] + np.arange(values.shape[1])] = values
        if self.shadow is not None:
            self.shadow.arrived(self._granules(at, 4 * values.shape[1]), times[:, None])

    def _granules(self, at: Array, size: int) -> Array:
        granule = self.shadow.granule if self.shadow is not None else 4
        return (at // granule)[:, None] + np.arange(max(size // granule, 1))

    def _touched(self, touch: Touch, at: Array, size: int) -> Touch:
        return touch._replace(granules=self._granules(at, size))
