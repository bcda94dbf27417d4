"""Arithmetic as the hardware rounds it, on arrays of registers: one element a thread.

float32 sums, products and fused products are rounded once. Approximate instructions (ex2, lg2, rcp, div.full)
get the exact result with an error within what the PTX manual documents. That error is a hash of the operands:
the same operands give the same bits, as on a GPU, and a kernel that is right only where each instruction
errs least does not pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: u1, 16: u2, 32: u4, 64: u8}
SIGNED: dict[int, Any] = {8: i1, 16: i2, 32: i4, 64: i8}
FLOAT: dict[int, Any] = {16: f2, 32: f4, 64: f8}

Array = Any
"""An array of one element a thread, or a NumPy scalar that all threads share."""


def numpy_type(kind: str, bits: int) -> Any:
    """Of a PTX type: ``f``, ``s``, or ``u`` and ``b``, and its width."""
    return {"f": FLOAT, "s": SIGNED}.get(kind, UNSIGNED)[bits]


# --- float32 --------------------------------------------------------------------------------------------

#: The bits of a float64 that a float32 does not have, and where they say "half way between two".
_LOST, _HALF = u8(0x1FFFFFFF), u8(0x10000000)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c rounded once: the product is exact in float64, and where the sum was rounded to what looks
    half way between two float32, its own error says to which side it belongs."""
    product = np.asarray(a, f8) * b
    total = product + c
    bits = total.view(u8)
    half = (bits & _LOST) == _HALF
    if half.any():
        part = total - product
        error = (product - (total - part)) + (c - part)
        towards_zero = np.signbit(error) != np.signbit(total)
        step = np.where(towards_zero, u8(0xFFFFFFFFFFFFFFFF), u8(1))
        total = np.where(half & (error != 0), bits + step, bits).view(f8)
    return total.astype(f4)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of float64, within an ulp of what is rounded once: sum and product with their own errors."""
    split = f8(2**27 + 1)
    halves = []
    for x in (np.asarray(a, f8), np.asarray(b, f8)):
        high = split * x - (split * x - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    product = np.asarray(a, f8) * b
    lost = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    part = total - product
    return total + (lost + ((product - (total - part)) + (c - part)))


def flush(x: Array) -> Array:
    """Subnormal numbers to zero of their sign (``.ftz``)."""
    return np.where(np.abs(x) < f4(1.17549435e-38), np.copysign(f4(0), x), x).astype(f4)


def perturbed(x: Array, operand: Array, bound: float) -> Array:
    """x (float64) with a relative error within ± bound that the operand's bits decide, rounded to float32."""
    return (x * (1 + bound * chance(operand))).astype(f4)


def chance(operand: Array) -> Array:
    """A number in [−1, 1] made of the bits of a float32."""
    bits = np.asarray(operand, f4).view(u4)
    mixed = (bits ^ (bits >> u4(16))) * u4(0x7FEB352D)
    mixed = (mixed ^ (mixed >> u4(15))) * u4(0x846CA68B)
    return (mixed ^ (mixed >> u4(16))).astype(f8) * 2.0**-31 - 1.0


#: What the manual (PTX ISA 8) allows beyond the rounding to float32, which is half a unit in the last place:
#: ex2.approx errs by 2⁻²²·⁵, rcp.approx by 1 ulp, div.full by 2 ulp, sqrt.approx and rsqrt.approx by 2⁻²².
EX2, RCP, DIV, SQRT = 2.0**-22.5 - 2.0**-24, 2.0**-24, 1.5 * 2.0**-23, 2.0**-22 - 2.0**-24

#: lg2.approx: 2⁻²² absolute on (½, 2), relative elsewhere.
LG2 = 2.0**-22


def ex2(x: Array) -> Array:
    return perturbed(np.exp2(np.asarray(x, f8)), x, EX2)


def lg2(x: Array) -> Array:
    y = np.log2(np.asarray(x, f8))
    scale = np.where(np.abs(y) < 1, 1.0, np.abs(y))
    return np.where(np.isfinite(y), y + LG2 * chance(x) * scale, y).astype(f4)


def rcp(x: Array) -> Array:
    return perturbed(1 / np.asarray(x, f8), x, RCP)


def sqrt(x: Array) -> Array:
    return perturbed(np.sqrt(np.asarray(x, f8)), x, SQRT)


def rsqrt(x: Array) -> Array:
    return perturbed(1 / np.sqrt(np.asarray(x, f8)), x, SQRT)


def div_full(a: Array, b: Array) -> Array:
    """a/b within 2 ulp; beyond |b| = 2¹²⁶ the manual promises 0 or NaN, and so does this."""
    quotient = perturbed(np.asarray(a, f8) / b, b, DIV)
    large = np.abs(b) > f4(2.0**126)
    return np.where(large, np.where(np.isinf(a), f4(np.nan), a * f4(0) * np.sign(b)), quotient).astype(f4)


# --- narrower numbers -----------------------------------------------------------------------------------


def tf32_nearest(bits: Array) -> Array:
    """``cvt.rna.tf32``: to 10 bits, ties away from zero; infinity and NaN stay."""
    finite = (bits & u4(0x7F800000)) != u4(0x7F800000)
    return np.where(finite, (bits + u4(0x1000)) & u4(0xFFFFE000), bits).astype(u4)


def tf32_value(bits: Array) -> Array:
    """What a tensor core takes of a register as tf32: the lowest 13 bits are not looked at."""
    return (bits & u4(0xFFFFE000)).view(f4).astype(f8)


def to_bf16(x: Array) -> Array:
    """The 16 bits of float32 rounded to nearest, ties to even."""
    bits = np.asarray(x, f4).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def from_bf16(bits: Array) -> Array:
    return (np.asarray(bits).astype(u4) << u4(16)).view(f4)


def half_value(kind: str, bits: Array) -> Array:
    """16 bits as bf16 or f16, in float64."""
    return from_bf16(bits).astype(f8) if kind == "bf16" else np.asarray(bits, u2).view(f2).astype(f8)


# --- integers -------------------------------------------------------------------------------------------


def divide(a: Array, b: Array) -> Array:
    """Towards zero, as C divides; −1 for a division by zero."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    down = a // safe
    up = (a != down * safe) & ((a < 0) != (safe < 0))
    return np.where(b == 0, ~b.dtype.type(0), down + up).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return (a - divide(a, b) * b).astype(a.dtype)


def shift_left(a: Array, count: Array) -> Array:
    width = 8 * a.dtype.itemsize
    short = np.minimum(count, u4(width - 1)).astype(a.dtype)
    return np.where(count >= width, a.dtype.type(0), a << short).astype(a.dtype)


def shift_right(a: Array, count: Array) -> Array:
    """Arithmetic for signed, logical for unsigned; a count beyond the width counts as the width."""
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, u4(width - 1)).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(count >= width, a.dtype.type(0), shifted).astype(a.dtype)


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """``bfe`` of a uint32 or, with the field's highest bit extended, of an int32."""
    width = u4(32)
    up = (a.view(u4) << (width - position - length)).view(a.dtype)
    return up >> (width - length).astype(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: each byte of the result is one of the eight of b:a, or its sign eight times."""
    both = a.astype(u8) | (np.asarray(b).astype(u8) << u8(32))
    out = np.zeros(np.broadcast(a, b, selector).shape, u4)
    for i in range(4):
        choice = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((choice & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        out |= np.where(choice & u4(8), sign, byte) << u4(8 * i)
    return out


_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def to_integral(x: Array, mode: str) -> Array:
    return _ROUND[mode](x)


def to_integer(x: Array, kind: Any, mode: str) -> Array:
    """Float to integer: beyond the range its end, NaN 0."""
    limits = np.iinfo(kind)
    rounded = to_integral(np.asarray(x, f8), mode)
    inside = np.where(rounded >= limits.max, 0, np.clip(np.nan_to_num(rounded), limits.min, limits.max))
    return np.where(rounded >= limits.max, kind(limits.max), inside.astype(kind)).astype(kind)


# --- sums of products on tensor cores -------------------------------------------------------------------


class Sums(NamedTuple):
    """How a tensor core adds: so many products of 32-bit operands at a time to the sum so far, each cut
    to the largest one's exponent with so many bits beyond 24, and the sum cut to float32.

    Of 16-bit operands twice as many at a time. Measured on the hardware by Fasi et al. (2021, A100) and
    Khattak and Mikaitis (2025, H100).
    """

    products: int
    extra: int


SUMS = {80: Sums(4, 1), 90: Sums(8, 2)}


def product(a: Array, b: Array, c: Array, sums: Sums | None, *, halves: bool) -> Array:
    """a [n, M, k] · b [n, k, N] + c [n, M, N], of float64 into float32, rounded once if ``sums`` is None."""
    if sums is None:
        return (a @ b + c).astype(f4)
    group = sums.products * (2 if halves else 1)
    exponents_a, exponents_b = exponents(a), exponents(b)
    for start in range(0, a.shape[2], group):
        k = slice(start, start + group)
        each = a[:, :, k, None] * b[:, None, k, :]
        top = (exponents_a[:, :, k, None] + exponents_b[:, None, k, :]).max(2)
        top = np.maximum(np.maximum(top, exponents(c)), -126)
        unit = np.ldexp(1.0, top - 23 - sums.extra)
        total = (np.trunc(each / unit[:, :, None]).sum(2) + np.trunc(c / unit)) * unit
        plain = each.sum(2) + c
        c = np.where(np.isfinite(plain), cut_to_float32(total), plain)
    return c.astype(f4)


def exponents(x: Array) -> Array:
    """e with 2ᵉ ≤ |x| < 2ᵉ⁺¹; that of zero below all others."""
    return np.where(x == 0, -500, np.frexp(x)[1] - 1).astype(i4)


def cut_to_float32(x: Array) -> Array:
    """float64 rounded towards zero to float32, as float64."""
    near = x.astype(f4)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, f4(0)), near).astype(f8)
