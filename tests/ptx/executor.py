"""Programs of one launch, run in step: an element of every register's array is one thread.

Control flow goes by basic block. Of the blocks that some threads stand at, the lowest runs next, with a mask
where not all threads are there; loops and branches that the compiler made come together again by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import UNSIGNED, Array, Sums, i4, i8, u1, u4, u8
from tests.ptx.memory import BARRIER, Findings, GlobalMemory, Shadow, SharedMemory, Touch
from tests.ptx.program import Instruction, UnknownPTX

#: None where all threads execute, else which do.
Mask = Any
Step = Callable[["Machine", Mask], None]

#: What is in a register that nobody has written: a NaN, an address in no tensor.
POISON = {
    1: np.bool_(False),
    8: u1(0xFF),
    16: np.uint16(0x7FDE),
    32: u4(0x7FDEAD01),
    64: u8(0x7FDEAD017FDEAD01),
}

#: Blocks that one batch of programs may execute before it counts as endless.
LONGEST = 5_000_000


class Block(NamedTuple):
    """What its instructions do, the branch at its end, and where that leads."""

    steps: list[Step]
    condition: Callable[[list[Any]], Array] | None
    target: int | None
    """None at the end of the program."""


class Code(NamedTuple):
    """A kernel as the machine executes it."""

    name: str
    threads: int
    shared: int
    """Bytes of shared memory of a program."""
    blocks: list[Block]
    slots: dict[str, int]
    """Register → its place in ``Machine.registers``; special registers too."""
    widths: list[int]
    parameters: dict[str, tuple[str, int]]
    shared_granule: int
    global_granule: int
    sums: Sums | None


class Copy(NamedTuple):
    """An asynchronous copy on its way: who copies what where, and as part of which of their groups."""

    lanes: Array
    at: Array
    values: Array
    groups: Array
    instruction: Instruction


class Machine:
    """Some programs of a launch: their registers, shared memory and clocks."""

    def __init__(
        self,
        code: Code,
        memory: GlobalMemory,
        parameters: Array,
        grid: Sequence[int],
        programs: Array,
        findings: Findings,
        *,
        checked: bool = True,
    ) -> None:
        self.code, self.memory, self.parameters, self.findings = code, memory, parameters, findings
        self.threads = code.threads
        self.programs = len(programs)
        lanes = self.threads * self.programs
        self.lanes = np.arange(lanes)
        self.program = np.repeat(np.arange(self.programs), self.threads)
        self.launch_thread = np.repeat(programs, self.threads) * self.threads + self.lanes % self.threads
        size = max(-(-code.shared // 16) * 16, 16)
        cells = size * self.programs // code.shared_granule
        shadow = (
            Shadow("shared memory", cells, code.shared_granule, self.threads, findings) if checked else None
        )
        self.shared = SharedMemory(size, self.programs, shadow, findings)
        self.times = np.zeros(lanes, i4)
        self.copies: list[Copy] = []
        self.groups = np.zeros(lanes, i4)
        self.warpgroup = Warpgroup(self)
        self.registers: list[Any] = [POISON[width] for width in code.widths]
        for name, value in self._special(grid, programs).items():
            if name in code.slots:
                self.registers[code.slots[name]] = value

    def _special(self, grid: Sequence[int], programs: Array) -> dict[str, Array]:
        thread = (self.lanes % self.threads).astype(u4)
        number = np.repeat(programs, self.threads) if self.programs > 1 else np.int64(programs[0])
        x, y, z = grid
        return {
            "%tid.x": thread,
            "%laneid": thread % u4(32),
            "%warpid": thread // u4(32),
            "%ctaid.x": (number % x).astype(u4),
            "%ctaid.y": (number // x % y).astype(u4),
            "%ctaid.z": (number // (x * y)).astype(u4),
            "%ntid.x": u4(self.threads),
            "%nctaid.x": u4(x),
            "%nctaid.y": u4(y),
            "%nctaid.z": u4(z),
        }

    # --- registers --------------------------------------------------------------------------------------

    def everyone(self, value: Array) -> Array:
        """A value that may be shared, for each thread."""
        return value if np.ndim(value) else np.broadcast_to(value, self.lanes.shape)

    def put(self, slot: int, value: Array, mask: Mask) -> None:
        self.registers[slot] = value if mask is None else np.where(mask, value, self.registers[slot])

    def put_at(self, slots: Sequence[int], columns: Array, lanes: Array, mask: Mask) -> None:
        """Column j of ``columns`` [threads, n] into register j of those lanes."""
        for slot, column in zip(slots, columns.T, strict=True):
            width = self.code.widths[slot]
            value = column.astype(UNSIGNED[width])
            if mask is not None:
                kept = np.array(self.everyone(self.registers[slot]))
                kept[lanes] = value
                value = kept
            self.registers[slot] = value

    def at(self, values: Sequence[Array], lanes: Array) -> Array:
        """[threads, n] of n registers' values."""
        return np.stack([self.everyone(value)[lanes] for value in values], axis=1)

    def active(self, mask: Mask) -> Array:
        return self.lanes if mask is None else np.flatnonzero(mask)

    def whole(self, size: int, what: str, mask: Mask, instruction: Instruction) -> Array:
        """The lanes [n, size] of the warps or warpgroups that execute; reports those of which a part does."""
        lanes = self.lanes.reshape(-1, size)
        if mask is None:
            return lanes
        count = mask.reshape(-1, size).sum(1)
        if ((count > 0) & (count < size)).any():
            self.findings.add(f"reached by a part of a {what}", instruction, f"{int(count.max())} of {size}")
        return lanes[count > 0]

    # --- memory -----------------------------------------------------------------------------------------

    def touch(self, lanes: Array, instruction: Instruction, *, shared: bool) -> Touch:
        threads = lanes if shared else self.launch_thread[lanes]
        return Touch(threads, self.times[lanes], np.empty(0, i8), instruction)

    def shared_index(self, addresses: Array, lanes: Array, size: int, instruction: Instruction) -> Array:
        return self.shared.index(addresses, self.program[lanes], size, instruction)

    def copy_async(
        self, at: Array, source: Array, size: int, copied: Array, mask: Mask, instruction: Instruction
    ) -> None:
        """``size`` bytes into shared memory, of which ``copied`` come from global memory, the rest are 0.

        They are read now and there when the group has been waited for.
        """
        lanes = self.active(mask)
        if len(lanes) == 0:
            return
        count = self.everyone(copied)[lanes]
        if not np.isin(count, (0, size)).all():
            raise UnknownPTX(f"a part of the bytes copied: {instruction}")
        values = np.zeros((len(lanes), size // 4), u4)
        reading = np.flatnonzero(count)
        addresses = self.everyone(source)[lanes[reading]]
        touch = self.touch(lanes[reading], instruction, shared=False)
        if len(reading):
            values[reading] = self.memory.load(addresses, 4, size // 4, touch)
        index = self.shared_index(self.everyone(at)[lanes], lanes, size, instruction)
        self.shared.reserve(index, size, self.touch(lanes, instruction, shared=True))
        self.copies.append(Copy(lanes, index, values, self.groups[lanes], instruction))

    def commit_copies(self, mask: Mask) -> None:
        self.groups[self.active(mask)] += 1

    def wait_copies(self, left: int, mask: Mask) -> None:
        """Until at most ``left`` of a thread's groups are on their way."""
        done_before = self.groups - left
        if mask is not None:
            done_before = np.where(mask, done_before, 0)
        remaining = []
        for copy in self.copies:
            done = copy.groups < done_before[copy.lanes]
            if done.any():
                arrived = copy.lanes[done]
                self.shared.arrive(copy.at[done], copy.values[done], self.times[arrived])
                self.warpgroup.wrote(copy.at[done], 4 * copy.values.shape[1], arrived)
            if not done.all():
                remaining.append(Copy(*(part[~done] for part in copy[:-1]), copy.instruction))
        self.copies = remaining

    # --- barriers ---------------------------------------------------------------------------------------

    def barrier(self, mask: Mask, instruction: Instruction) -> None:
        lanes = self.whole(self.threads, "program", mask, instruction)
        self.times[lanes] = (self.times[lanes] // BARRIER + 1) * BARRIER

    def warp_barrier(self, mask: Mask, instruction: Instruction) -> None:
        self.times[self.whole(32, "warp", mask, instruction)] += 1

    # --- control ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """All programs to their ends."""
        waiting: dict[int, Mask] = {0: None}
        for _ in range(LONGEST):
            if not waiting:
                break
            number = min(waiting)
            mask = waiting.pop(number)
            block = self.code.blocks[number]
            for step in block.steps:
                step(self, mask)
            for where, who in self._next(number, block, mask):
                self._arrive(waiting, where, who)
        else:
            raise UnknownPTX(f"{self.code.name} does not end")
        for copy in self.copies:
            self.findings.add("shared memory: cp.async is never waited for", copy.instruction, "")

    def _next(self, number: int, block: Block, mask: Mask) -> list[tuple[int, Mask]]:
        if block.target is None:
            return []
        if block.condition is None:
            return [(block.target, mask)]
        taken = block.condition(self.registers)
        if np.ndim(taken) == 0:
            return [(block.target if taken else number + 1, mask)]
        jumping = taken if mask is None else taken & mask
        staying = ~taken if mask is None else ~taken & mask
        return [(to, who) for to, who in ((block.target, jumping), (number + 1, staying)) if who.any()]

    @staticmethod
    def _arrive(waiting: dict[int, Mask], block: int, mask: Mask) -> None:
        if block in waiting and mask is not None and waiting[block] is not None:
            mask = waiting[block] | mask
        waiting[block] = None if mask is None or mask.all() else mask


class Warpgroup:
    """What ``wgmma`` leaves to be waited for: accumulators, and reads of shared memory.

    It reads by the asynchronous proxy, which sees what other instructions wrote once the thread that
    wrote has executed ``fence.proxy.async``.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = 0
        self.accumulators: dict[int, tuple[Array, int]] = {}
        self.reads: list[tuple[int, Array, Touch]] = []
        self.fences = np.zeros(len(machine.lanes), i4)
        shadow = machine.shared.shadow
        self.unfenced = None if shadow is None else np.full(shadow.granules, -1, i4)

    def wrote(self, at: Array, size: int, lanes: Array) -> None:
        """Lanes have written ``size`` bytes of shared memory from byte ``at`` [lanes] on."""
        shadow = self.machine.shared.shadow
        if shadow is not None and self.unfenced is not None:
            cells = (at // shadow.granule)[:, None] + np.arange(max(size // shadow.granule, 1))
            self.unfenced[cells] = self.fences[lanes][:, None]

    def fence(self, mask: Mask) -> None:
        self.fences[self.machine.active(mask)] += 1

    def read(self, cells: Array, touch: Touch) -> None:
        """A product reads granules [groups, n] of shared memory from now until it is waited for."""
        shadow = self.machine.shared.shadow
        if shadow is None or self.unfenced is None:
            return
        touch = touch._replace(granules=cells)
        shadow.on_read(touch, initialised=True)
        late = self.fences[np.maximum(shadow.writer[cells], 0)] <= self.unfenced[cells]
        if late.any():
            kind = "shared memory: read by wgmma without fence.proxy.async since the write"
            self.machine.findings.add(kind, touch.instruction, f"{int(late.sum())} granules")
        self.reads.append((self.group, cells, touch))

    def wait(self, left: int, mask: Mask) -> None:
        done_before = self.group - left
        for slot, (value, group) in list(self.accumulators.items()):
            if group < done_before:
                self.machine.put(slot, value, mask)
                del self.accumulators[slot]
        shadow = self.machine.shared.shadow
        for group, _, touch in self.reads:
            if group < done_before and shadow is not None:
                # It may have read until now.
                now = self.machine.times[touch.threads]
                shadow.on_read(touch._replace(times=now), initialised=True)
        self.reads = [read for read in self.reads if read[0] >= done_before]
