"""What each PTX instruction does: a handler for the first word of an opcode makes the step that it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import arithmetic as ar
from tests.ptx import tensor_cores
from tests.ptx.arithmetic import UNSIGNED, Array, numpy_type, u4, u8
from tests.ptx.executor import Machine, Mask, Step
from tests.ptx.program import Instruction, UnknownPTX, bits_of, vector
from tests.ptx.translate import Read, Translator, executes, step_of

# --- moves and conversions ------------------------------------------------------------------------------


@executes("mov")
def _mov(t: Translator, i: Instruction) -> Step:
    kind = i.parts[-1]
    if i.operands[1].startswith("{"):
        return _pack(t, i, kind)
    if i.operands[0].startswith("{"):
        return _unpack(t, i, kind)
    return step_of(lambda x: x, [t.read(i.operands[1], kind)], t.write(i.operands[0], kind))


def _pack(t: Translator, i: Instruction, kind: str) -> Step:
    parts = vector(i.operands[1])
    whole, width = UNSIGNED[bits_of(kind)], bits_of(kind) // len(parts)

    def join(*values: Array) -> Array:
        total = whole(0)
        for number, value in enumerate(values):
            total = total | (value.astype(whole) << whole(width * number))
        return total

    return step_of(join, [t.read(part, f"b{width}") for part in parts], t.write(i.operands[0], kind))


def _unpack(t: Translator, i: Instruction, kind: str) -> Step:
    parts = vector(i.operands[0])
    whole, width = UNSIGNED[bits_of(kind)], bits_of(kind) // len(parts)
    source = t.read(i.operands[1], kind)
    writes = [
        (whole(width * number), t.write(part, f"b{width}"))
        for number, part in enumerate(parts)
        if part != "_"
    ]

    def step(m: Machine, mask: Mask) -> None:
        value = source(m.registers)
        for shift, write in writes:
            write(m, (value >> shift).astype(UNSIGNED[width]), mask)

    return step


@executes("cvta")
def _cvta(t: Translator, i: Instruction) -> Step:
    return step_of(lambda x: x, [t.read(i.operands[1], "b64")], t.write(i.operands[0], "b64"))


@executes("selp")
def _selp(t: Translator, i: Instruction) -> Step:
    kind = f"b{bits_of(i.parts[-1])}"
    a, b, p = i.operands[1:]
    reads = [t.read(p, "pred"), t.read(a, kind), t.read(b, kind)]
    return step_of(np.where, reads, t.write(i.operands[0], kind))


@executes("cvt")
def _cvt(t: Translator, i: Instruction) -> Step:
    *modes, to, source = i.parts[1:]
    d, a = i.operands[:2]
    if set(modes) & {"sat", "relu", "satfinite"}:
        raise UnknownPTX(str(i))
    if to == "tf32":
        if modes != ["rna"]:
            raise UnknownPTX(str(i))
        return step_of(ar.tf32_nearest, [t.read(a, "b32")], t.write(d, "b32"))
    if to == "bf16x2":
        high, low = (t.read(operand, "f32") for operand in i.operands[1:])
        both = lambda x, y: (ar.to_bf16(x).astype(u4) << u4(16)) | ar.to_bf16(y)  # noqa: E731
        return step_of(both, [high, low], t.write(d, "b32"))
    return step_of(_conversion(modes, to, source, i), [t.read(a, source)], t.write(d, to))


def _conversion(modes: list[str], to: str, source: str, i: Instruction) -> Callable[[Array], Array]:
    flush = "ftz" in modes
    integral = next((mode for mode in modes if mode in ("rni", "rzi", "rmi", "rpi")), "")
    if to == "bf16":
        return lambda x: x
    kind = numpy_type(to[0], bits_of(to))
    if source == "bf16" or (source[0] == "f" and to[0] == "f"):
        if set(modes) & {"rz", "rm", "rp"}:
            raise UnknownPTX(str(i))
        rounded = (lambda x: ar.to_integral(x, integral)) if integral else (lambda x: x.astype(kind))
        return (lambda x: ar.flush(rounded(x))) if flush else rounded
    if source[0] == "f":
        return lambda x: ar.to_integer(x, kind, integral or "rzi")
    return lambda x: x.astype(kind)


# --- arithmetic -----------------------------------------------------------------------------------------

_FLOATS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": ar.fma,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": ar.ex2,
    "lg2": ar.lg2,
    "rcp": ar.rcp,
    "sqrt": ar.sqrt,
    "rsqrt": ar.rsqrt,
    "div": ar.div_full,
    "copysign": lambda sign, x: np.copysign(x, sign),
}

#: Correctly rounded, where the instruction says so.
_ROUNDED: dict[str, Callable[..., Array]] = {
    "rcp": lambda x: ar.f4(1) / x,
    "sqrt": np.sqrt,
    "div": np.divide,
}

#: Of float64, with the rounding to nearest that they have if not told otherwise.
_FLOATS64: dict[str, Callable[..., Array]] = {
    **{name: _FLOATS[name] for name in ("add", "sub", "mul", "min", "max", "neg", "abs")},
    "fma": ar.fma64,
    "div": np.divide,
}

#: Modifiers that change nothing here: the rounding that is taken anyway, and what names the approximation.
_PLAIN = {"rn", "approx", "full", "ftz", "NaN", "lo"}


def _float_function(i: Instruction) -> Callable[..., Array]:
    name, modifiers = i.parts[0], set(i.parts[1:-1])
    if modifiers - _PLAIN:
        raise UnknownPTX(str(i))
    function = _FLOATS[name]
    if "rn" in modifiers and name in _ROUNDED:
        function = _ROUNDED[name]
    if name in ("min", "max") and "NaN" in modifiers:
        function = np.minimum if name == "min" else np.maximum
    if "ftz" not in modifiers:
        return function
    return lambda *values: ar.flush(function(*(ar.flush(value) for value in values)))


@executes("ex2", "lg2", "rcp", "sqrt", "rsqrt", "fma", "copysign")
def _float_only(t: Translator, i: Instruction) -> Step:
    kind = i.parts[-1]
    if kind.endswith("x2"):
        return _pairs(t, i, kind.removesuffix("x2"))
    if kind == "f64" and (i.parts[0] not in _FLOATS64 or set(i.parts[1:-1]) - {"rn", "NaN"}):
        raise UnknownPTX(str(i))
    return step_of(
        _FLOATS64[i.parts[0]] if kind == "f64" else _float_function(i),
        [t.read(a, kind) for a in i.operands[1:]],
        t.write(i.operands[0], kind),
    )


def _pairs(t: Translator, i: Instruction, kind: str) -> Step:
    """Two bf16 in a register, each by itself; a result of float32 is rounded to it."""
    if kind != "bf16":
        raise UnknownPTX(str(i))
    function = _float_function(i)

    def both(*registers: Array) -> Array:
        low, high = (
            ar.to_bf16(function(*(ar.from_bf16((bits >> u4(shift)).astype(ar.u2)) for bits in registers)))
            for shift in (0, 16)
        )
        return low | (high.astype(u4) << u4(16))

    return step_of(both, [t.read(a, "b32") for a in i.operands[1:]], t.write(i.operands[0], "b32"))


_INTEGERS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "div": ar.divide,
    "rem": ar.remainder,
    "neg": np.negative,
    "abs": np.abs,
}


@executes("add", "sub", "mul", "mad", "min", "max", "div", "rem", "neg", "abs")
def _arithmetic(t: Translator, i: Instruction) -> Step:
    name, kind = i.parts[0], i.parts[-1]
    if kind[0] == "f" or kind.startswith("bf16"):
        return _float_only(t, i)
    if set(i.parts[1:-1]) - {"lo", "wide", "hi"}:
        raise UnknownPTX(str(i))
    if "wide" in i.parts or "hi" in i.parts:
        return _wide(t, i, kind)
    return step_of(_INTEGERS[name], [t.read(a, kind) for a in i.operands[1:]], t.write(i.operands[0], kind))


def _wide(t: Translator, i: Instruction, kind: str) -> Step:
    """The product in twice the width, its upper half for ``hi``."""
    width = bits_of(kind)
    double = numpy_type(kind[0], 2 * width)
    reads = [t.read(a, kind) for a in i.operands[1:3]]
    if "hi" in i.parts:
        upper = lambda a, b: (a.astype(double) * b.astype(double) >> double(width)).astype(  # noqa: E731
            numpy_type(kind[0], width)
        )
        return step_of(upper, reads, t.write(i.operands[0], kind))
    result = f"{kind[0]}{2 * width}"
    if i.parts[0] == "mul":
        return step_of(
            lambda a, b: a.astype(double) * b.astype(double), reads, t.write(i.operands[0], result)
        )
    reads.append(t.read(i.operands[3], result))
    return step_of(
        lambda a, b, c: a.astype(double) * b.astype(double) + c, reads, t.write(i.operands[0], result)
    )


_BITS: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": ar.shift_left,
    "shr": ar.shift_right,
    "popc": lambda x: np.bitwise_count(x).astype(u4),
    "bfe": ar.bit_field,
    "prmt": ar.permute_bytes,
}

#: Types of the operands after the first, where they are not the first's.
_COUNTS = {"shl": ["u32"], "shr": ["u32"], "bfe": ["u32", "u32"]}


@executes(*_BITS)
def _bits(t: Translator, i: Instruction) -> Step:
    name, kind = i.parts[0], i.parts[-1]
    if len(i.parts) > 2:
        raise UnknownPTX(str(i))
    kinds = [kind, *_COUNTS.get(name, [kind] * 2)]
    reads = [t.read(a, k) for a, k in zip(i.operands[1:], kinds, strict=False)]
    return step_of(_BITS[name], reads, t.write(i.operands[0], kind))


# --- comparisons ----------------------------------------------------------------------------------------


def _unordered(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda x, y: function(x, y) | np.isnan(x) | np.isnan(y)


def _either_nan(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


_ORDERS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": _unordered(np.equal),
    "neu": _unordered(np.not_equal),
    "ltu": _unordered(np.less),
    "leu": _unordered(np.less_equal),
    "gtu": _unordered(np.greater),
    "geu": _unordered(np.greater_equal),
    "num": lambda x, y: ~_either_nan(x, y),
    "nan": _either_nan,
}


@executes("setp")
def _setp(t: Translator, i: Instruction) -> Step:
    order, *combined, kind = (part for part in i.parts[1:] if part != "ftz")
    function = _ORDERS[order]
    if order == "ne" and kind in ("f32", "bf16"):  # false with a NaN, where NumPy's is true
        function = lambda x, y: (x != y) & ~_either_nan(x, y)  # noqa: E731
    reads = [t.read(a, kind) for a in i.operands[1:]]
    if combined:
        join = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[combined[0]]
        reads[2] = t.read(i.operands[3], "pred")
        compare = function
        function = lambda x, y, p: join(compare(x, y), p)  # noqa: E731
    return step_of(function, reads, t.write(i.operands[0], "pred"))


# --- memory ---------------------------------------------------------------------------------------------


@executes("ld")
def _ld(t: Translator, i: Instruction) -> Step:
    size = bits_of(i.parts[-1]) // 8
    address, slots = t.address(i.operands[1]), t.registers(i.operands[0])
    if "param" in i.parts:
        return _ld_param(t, i, address, size)
    shared = _is_shared(i)

    def step(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        if len(lanes) == 0:
            return
        where = m.everyone(address(m.registers))[lanes]
        touch = m.touch(lanes, i, shared=shared)
        if shared:
            at = m.shared_index(where, lanes, size * len(slots), i)
            found = m.shared.load(at, size, len(slots), touch)
        else:
            found = m.memory.load(where, size, len(slots), touch)
        m.put_at(slots, found, lanes, mask)

    return step


def _is_shared(i: Instruction) -> bool:
    if not {"shared", "global"} & set(i.parts) or "volatile" in i.parts:
        raise UnknownPTX(str(i))
    return "shared" in i.parts


def _ld_param(t: Translator, i: Instruction, address: Read, size: int) -> Step:
    kind = i.parts[-1]
    write = t.write(i.operands[0], kind)
    held = numpy_type(kind[0], bits_of(kind))

    def step(m: Machine, mask: Mask) -> None:
        at = np.asarray(address(m.registers)).astype(np.int64) // size
        write(m, m.parameters.view(held)[at], mask)

    return step


@executes("st")
def _st(t: Translator, i: Instruction) -> Step:
    width = bits_of(i.parts[-1])
    address = t.address(i.operands[0])
    values = [t.read(a, f"b{width}") for a in vector(i.operands[1])]
    shared = _is_shared(i)

    def step(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        if len(lanes) == 0:
            return
        where = m.everyone(address(m.registers))[lanes]
        stored = m.at([value(m.registers) for value in values], lanes)
        touch = m.touch(lanes, i, shared=shared)
        if not shared:
            m.memory.store(where, stored, touch)
            return
        at = m.shared_index(where, lanes, width // 8 * len(values), i)
        m.shared.store(at, stored, touch)
        m.warpgroup.wrote(at, width // 8 * len(values), lanes)

    return step


@executes("cp")
def _cp_async(t: Translator, i: Instruction) -> Step:
    if i.parts[1] != "async":
        raise UnknownPTX(str(i))
    if i.parts[2] == "commit_group":
        return lambda m, mask: m.commit_copies(mask)
    if i.parts[2] == "wait_group":
        left = int(i.operands[0], 0)
        return lambda m, mask: m.wait_copies(left, mask)
    if i.parts[2] not in ("ca", "cg"):
        raise UnknownPTX(str(i))
    to, source, size = t.address(i.operands[0]), t.address(i.operands[1]), int(i.operands[2], 0)
    copied = t.read(i.operands[3], "u32") if len(i.operands) > 3 else t.read(str(size), "u32")
    return lambda m, mask: m.copy_async(
        to(m.registers), source(m.registers), size, copied(m.registers), mask, i
    )


@executes("ldmatrix", "stmatrix")
def _matrix(t: Translator, i: Instruction) -> Step:
    if "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise UnknownPTX(str(i))
    transposed = "trans" in i.parts
    if i.parts[0] == "ldmatrix":
        slots, address = t.registers(i.operands[0]), t.address(i.operands[1])
        return lambda m, mask: tensor_cores.ldmatrix(
            m, slots, address(m.registers), mask, i, transposed=transposed
        )
    address = t.address(i.operands[0])
    values = [t.read(a, "b32") for a in vector(i.operands[1])]
    return lambda m, mask: tensor_cores.stmatrix(
        m,
        address(m.registers),
        [value(m.registers) for value in values],
        mask,
        i,
        transposed=transposed,
    )


# --- threads together -----------------------------------------------------------------------------------


@executes("bar", "barrier")
def _barrier(t: Translator, i: Instruction) -> Step:
    if "sync" not in i.parts:
        raise UnknownPTX(str(i))
    if "warp" in i.parts:
        return lambda m, mask: m.warp_barrier(mask, i)
    if i.operands[0] != "0" or len(i.operands) > 1:
        raise UnknownPTX(str(i))
    return lambda m, mask: m.barrier(mask, i)


@executes("fence")
def _fence(t: Translator, i: Instruction) -> Step:
    if i.parts[1:3] != ("proxy", "async"):
        raise UnknownPTX(str(i))
    return lambda m, mask: m.warpgroup.fence(mask)


#: Which lane a ``shfl`` takes its value from, and whether that one counts: of the lanes, operands b, and the
#: first and last lane of the lane's segment.
_SOURCES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "up": lambda lane, b, first, last: (lane - b, lane - b >= last),
    "down": lambda lane, b, first, last: (lane + b, lane + b <= last),
    "bfly": lambda lane, b, first, last: (lane ^ b, (lane ^ b) <= last),
    "idx": lambda lane, b, first, last: (first | b, (first | b) <= last),
}


@executes("shfl")
def _shfl(t: Translator, i: Instruction) -> Step:
    names = [name.strip() for name in i.operands[0].split("|")]
    write = t.write(names[0], "b32")
    inside = t.write(names[1], "pred") if len(names) > 1 else None
    value, b, c = (t.read(a, "b32") for a in i.operands[1:4])
    source = _SOURCES[i.parts[2]]
    lane = tensor_cores.LANE

    def step(m: Machine, mask: Mask) -> None:
        m.whole(32, "warp", mask, i)
        of, by, bounds = (
            m.everyone(read(m.registers)).reshape(-1, 32).astype(np.int64) for read in (value, b, c)
        )
        segment = bounds >> 8 & 31
        first = lane & segment
        # The bound of "up" is the first lane, of the others the last.
        last = first | (bounds & 31 & ~segment)
        if i.parts[2] == "idx":
            by = by & 31 & ~segment
        wanted, counts = source(lane, by & 31, first, last)
        found = np.take_along_axis(of, np.where(counts, wanted, lane), 1)
        write(m, found.ravel().astype(u4), mask)
        if inside is not None:
            inside(m, counts.ravel(), mask)

    return step


_REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@executes("redux")
def _redux(t: Translator, i: Instruction) -> Step:
    reduction, kind = _REDUCTIONS[i.parts[2]], i.parts[-1]
    value, write = t.read(i.operands[1], kind), t.write(i.operands[0], kind)

    def step(m: Machine, mask: Mask) -> None:
        m.whole(32, "warp", mask, i)
        warps = m.everyone(value(m.registers)).reshape(-1, 32)
        write(m, np.repeat(reduction.reduce(warps, axis=1, dtype=warps.dtype), 32), mask)

    return step


@executes("vote")
def _vote(t: Translator, i: Instruction) -> Step:
    value, ballot = t.read(i.operands[1], "pred"), "ballot" in i.parts
    write = t.write(i.operands[0], "b32" if ballot else "pred")
    function = {
        "any": lambda warps: warps.any(1),
        "all": lambda warps: warps.all(1),
        "ballot": lambda warps: (warps * (u8(1) << tensor_cores.LANE.astype(u8))).sum(1).astype(u4),
    }[i.parts[2]]

    def step(m: Machine, mask: Mask) -> None:
        m.whole(32, "warp", mask, i)
        warps = m.everyone(value(m.registers)).reshape(-1, 32)
        write(m, np.repeat(function(warps), 32), mask)

    return step


# --- tensor cores ---------------------------------------------------------------------------------------


@executes("mma")
def _mma(t: Translator, i: Instruction) -> Step:
    *_, shape, _row, _column, d, kind, other, c = i.parts
    if (d, c) != ("f32", "f32") or kind != other or kind not in ("tf32", "bf16", "f16"):
        raise UnknownPTX(str(i))
    result = t.registers(i.operands[0])
    a, b, c_reads = ([t.read(name, "b32") for name in vector(operand)] for operand in i.operands[1:4])

    def step(m: Machine, mask: Mask) -> None:
        operands = ([read(m.registers) for read in reads] for reads in (a, b, c_reads))
        tensor_cores.mma(m, shape, kind, result, *operands, mask, i)

    return step


@executes("wgmma")
def _wgmma(t: Translator, i: Instruction) -> Step:
    if i.parts[1] == "fence":
        return lambda m, mask: None
    if i.parts[1] == "wait_group":
        left = int(i.operands[0], 0)
        return lambda m, mask: m.warpgroup.wait(left, mask)
    if i.parts[1] == "commit_group":

        def commit(m: Machine, mask: Mask) -> None:
            m.warpgroup.group += 1

        return commit
    return _wgmma_async(t, i)


def _wgmma_async(t: Translator, i: Instruction) -> Step:
    shape = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)$", i.opcode)
    d, a, b, scale, *rest = i.operands
    if shape is None or shape[3] != shape[4] or rest[:2] != ["1", "1"]:
        raise UnknownPTX(str(i))
    result = t.registers(d)
    registers = [t.read(name, "b32") for name in vector(a)] if a.startswith("{") else None
    descriptor = None if registers else t.read(a, "b64")
    other, adds = t.read(b, "b64"), t.read(scale, "pred")
    flags = [bool(int(flag)) for flag in rest[2:]]
    transposed = (False, False) if not flags else (flags[0] if len(flags) == 2 else False, flags[-1])

    def step(m: Machine, mask: Mask) -> None:
        left = [read(m.registers) for read in registers] if registers else descriptor(m.registers)
        tensor_cores.wgmma(
            m,
            tensor_cores.Product(
                *(int(shape[1]), int(shape[2]), shape[3], result, left),
                *(other(m.registers), adds(m.registers), transposed),
            ),
            mask,
            i,
        )

    return step
