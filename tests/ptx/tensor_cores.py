"""Instructions of a whole warp or warpgroup on tiles: ldmatrix, stmatrix, mma and wgmma.

Which element of a tile each lane's registers hold is in the PTX manual's figures; here as index arrays over
the 32 lanes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import Array, f4, half_value, i8, product, tf32_value, u2, u4, u8
from tests.ptx.executor import POISON, Machine, Mask
from tests.ptx.program import Instruction, UnknownPTX

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4

#: (rows, columns) over the lanes of the elements that they hold, by register and, of 16-bit numbers, half.
Places = list[tuple[Array, Array]]


def places_a(count: int, *, halves: bool) -> Places:
    """Of A [16, k], k = 2·count, of 16-bit numbers 4·count."""
    if halves:
        return [(ROW + 8 * (j & 1), 2 * COLUMN + h + 8 * (j >> 1)) for j in range(count) for h in range(2)]
    return [(ROW + 8 * (j & 1), COLUMN + 4 * (j >> 1)) for j in range(count)]


def places_b(count: int, *, halves: bool) -> Places:
    """Of B [k, 8]."""
    if halves:
        return [(2 * COLUMN + h + 8 * j, ROW) for j in range(count) for h in range(2)]
    return [(COLUMN + 4 * j, ROW) for j in range(count)]


def places_c(count: int) -> Places:
    """Of C and D [16, 2·count]."""
    return [(ROW + 8 * (j >> 1 & 1), 8 * (j >> 2) + 2 * COLUMN + (j & 1)) for j in range(count)]


def tile(values: Sequence[Array], places: Places, shape: tuple[int, int]) -> Array:
    """[warps, *shape] in float64 of values [warps, 32] each."""
    out = np.empty((len(values[0]), *shape))
    for value, (rows, columns) in zip(values, places, strict=True):
        out[:, rows, columns] = value
    return out


def operand_values(kind: str, registers: Sequence[Array]) -> list[Array]:
    """What registers [warps, 32] hold, each 16-bit half by itself."""
    if kind == "tf32":
        return [tf32_value(register) for register in registers]
    return [half_value(kind, (register >> u4(16 * h)).astype(u2)) for register in registers for h in range(2)]


def mma(
    machine: Machine,
    shape: str,
    kind: str,
    result: Sequence[int],
    a: Sequence[Array],
    b: Sequence[Array],
    c: Sequence[Array],
    mask: Mask,
    instruction: Instruction,
) -> None:
    """``mma.sync.mMnNkK.row.col.f32.kind.kind.f32``."""
    M, N, k = (int(size) for size in re.findall(r"\d+", shape))
    lanes = machine.whole(32, "warp", mask, instruction)
    halves = kind != "tf32"

    def warps(values: Sequence[Array]) -> list[Array]:
        return [machine.everyone(value)[lanes] for value in values]

    A = tile(operand_values(kind, warps(a)), places_a(len(a), halves=halves), (M, k))
    B = tile(operand_values(kind, warps(b)), places_b(len(b), halves=halves), (k, N))
    C = tile([value.view(f4) for value in warps(c)], places_c(len(c)), (M, N))
    D = product(A, B, C, machine.code.sums, halves=halves)
    columns = np.stack([D[:, rows, cols].ravel().view(u4) for rows, cols in places_c(len(result))], axis=1)
    machine.put_at(result, columns, lanes.ravel(), mask)


# --- ldmatrix and stmatrix ------------------------------------------------------------------------------


def _elements(
    machine: Machine, address: Array, number: int, half: int | None, lanes: Array, instruction: Instruction
) -> Array:
    """Byte in shared memory of what each lane holds of matrix ``number``: 4 bytes, or transposed one half.

    Lane 8·number + i gives the address of the matrix' row i, 8 numbers of 16 bits.
    """
    rows = machine.everyone(address).astype(i8)[lanes]
    machine.shared_index(rows[:, 8 * number : 8 * number + 8].ravel(), lanes[:, :8].ravel(), 16, instruction)
    if half is None:
        at, size = rows[:, 8 * number + ROW] + 4 * COLUMN, 4
    else:
        at, size = rows[:, 8 * number + 2 * COLUMN + half] + 2 * ROW, 2
    return machine.shared_index(at.ravel(), lanes.ravel(), size, instruction)


def ldmatrix(
    machine: Machine,
    result: Sequence[int],
    address: Array,
    mask: Mask,
    instruction: Instruction,
    *,
    transposed: bool,
) -> None:
    lanes = machine.whole(32, "warp", mask, instruction)
    touch = machine.touch(lanes.ravel(), instruction, shared=True)
    for number, slot in enumerate(result):
        if transposed:
            low, high = (
                machine.shared.load(
                    _elements(machine, address, number, half, lanes, instruction), 2, 1, touch
                ).astype(u4)
                for half in range(2)
            )
            found = low | (high << u4(16))
        else:
            at = _elements(machine, address, number, None, lanes, instruction)
            found = machine.shared.load(at, 4, 1, touch)
        machine.put_at([slot], found, lanes.ravel(), mask)


def stmatrix(
    machine: Machine,
    address: Array,
    values: Sequence[Array],
    mask: Mask,
    instruction: Instruction,
    *,
    transposed: bool,
) -> None:
    lanes = machine.whole(32, "warp", mask, instruction)
    touch = machine.touch(lanes.ravel(), instruction, shared=True)
    for number, value in enumerate(values):
        held = machine.everyone(value)[lanes.ravel()][:, None]
        for half in range(2) if transposed else (None,):
            at = _elements(machine, address, number, half, lanes, instruction)
            stored = held if half is None else (held >> u4(16 * half)).astype(u2)
            machine.shared.store(at, stored, touch)
            machine.warpgroup.wrote(at, stored.dtype.itemsize, lanes.ravel())


# --- wgmma ----------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """``wgmma.mma_async.sync.aligned.m64nNkK.f32.kind.kind`` and its operands."""

    N: int
    k: int
    kind: str
    result: list[int]
    a: Any
    """Registers [4], or the descriptor of a tile in shared memory."""
    b: Array
    accumulate: Array
    transposed: tuple[bool, bool]

    @property
    def bytes(self) -> int:
        return 4 if self.kind == "tf32" else 2

    def value(self, raw: Array) -> Array:
        return tf32_value(raw) if self.kind == "tf32" else half_value(self.kind, raw)


def wgmma(machine: Machine, p: Product, mask: Mask, instruction: Instruction) -> None:
    """D [64, N] of a warpgroup, or A·B + D; it counts as done when it has been waited for."""
    lanes = machine.whole(128, "warpgroup", mask, instruction)
    count = len(lanes)
    B = p.value(_described(machine, p.b, p.N, p, p.transposed[1], lanes, instruction)).swapaxes(1, 2)
    if isinstance(p.a, list):
        registers = [machine.everyone(register)[lanes].reshape(-1, 32) for register in p.a]
        places = places_a(len(p.a), halves=p.kind != "tf32")
        A = tile(operand_values(p.kind, registers), places, (16, p.k)).reshape(count, 64, p.k)
    else:
        A = p.value(_described(machine, p.a, 64, p, p.transposed[0], lanes, instruction))
    places = places_c(len(p.result))
    pending = machine.warpgroup.accumulators
    held = [pending[slot][0] if slot in pending else machine.registers[slot] for slot in p.result]
    warps = [machine.everyone(value)[lanes].reshape(-1, 32).view(f4) for value in held]
    adds = machine.everyone(p.accumulate)[lanes[:, 0]]
    C = tile(warps, places, (16, p.N)).reshape(count, 64, p.N)
    C = np.where(adds[:, None, None], C, 0.0)
    D = product(A, B, C, machine.code.sums, halves=p.bytes == 2).reshape(4 * count, 16, p.N)
    for slot, value, (rows, columns) in zip(p.result, held, places, strict=True):
        found = np.array(machine.everyone(value))
        found[lanes.ravel()] = D[:, rows, columns].ravel().view(u4)
        pending[slot] = (found, machine.warpgroup.group)
        machine.put(slot, POISON[32], mask)  # not to be looked at before the wait


#: Swizzle of a descriptor's bits 62-63: bytes of a row of the pattern, and the rows whose number is mixed in.
_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _described(
    machine: Machine,
    descriptor: Array,
    rows: int,
    p: Product,
    transposed: bool,
    lanes: Array,
    instruction: Instruction,
) -> Array:
    """[groups, rows, k] raw numbers of a tile in shared memory; ``rows`` lie along M or N."""
    every = machine.everyone(descriptor)[lanes]
    if (every != every[:, :1]).any():
        machine.findings.add("a descriptor differs within a warpgroup", instruction, "")
    bits = every[:, 0]
    if ((bits >> u8(49)) & u8(7)).any():
        raise UnknownPTX(f"base offset in a descriptor: {instruction}")
    start, leading, stride = (
        (((bits >> u8(shift)) & u8(0x3FFF)) << u8(4)).astype(i8)[:, None, None] for shift in (0, 16, 32)
    )
    width, mixed = _SWIZZLES[int(bits[0] >> u8(62))]
    row, column = np.arange(rows)[:, None], np.arange(p.k)[None, :]
    if transposed:
        if not mixed:
            raise UnknownPTX(f"transposed tile without swizzle: {instruction}")
        across = width // p.bytes
        at = start + row // across * leading + column // 8 * stride + column % 8 * width
        at = at + row % across * p.bytes
    elif mixed:
        at = start + row // 8 * stride + row % 8 * width + column * p.bytes
    else:
        byte = column * p.bytes
        at = start + row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
    at = at ^ (((at >> 7) & mixed) << 4)
    flat = at.reshape(len(lanes), -1)
    first = np.repeat(lanes[:, :1], flat.shape[1], axis=1)
    index = machine.shared_index(flat.ravel(), first.ravel(), p.bytes, instruction).reshape(flat.shape)
    shadow = machine.shared.shadow
    if shadow is not None:
        cells = np.unique(index // shadow.granule, axis=1) if len(lanes) == 1 else index // shadow.granule
        machine.warpgroup.read(cells, machine.touch(lanes[:, 0], instruction, shared=True))
    return machine.shared.words[p.bytes][index // p.bytes].reshape(at.shape)
