"""Each group of opcodes against Python's own integers, exact fractions, or NumPy in more digits."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.ptx import arithmetic
from tests.ptx.program import UnknownPTX
from tests.ptx.snippets import evaluate, run

RANDOM = np.random.default_rng(0)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678]
BITS = np.array([*EDGES, *RANDOM.integers(0, 2**32, 53)], np.uint32)
OTHER = BITS[::-1].copy()
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.5, 1e-30, -1e30, math.inf, -math.inf, math.nan, 3e38, *RANDOM.normal(size=54)],
    np.float32,
)


def signed(bits: Any, width: int = 32) -> int:
    value = int(bits) & (2**width - 1)
    return value - 2**width if value >> (width - 1) else value


INTEGERS = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: signed(a) * signed(b),
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.s32": lambda a, b: int(Fraction(signed(a), signed(b))) if b else -1,
    "rem.s32": lambda a, b: (
        signed(a) - signed(b) * int(Fraction(signed(a), signed(b))) if b else signed(a) + 0
    ),
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode: str) -> None:
    found = evaluate(f"{opcode} %r9, %r21, %r22;", BITS, OTHER)
    for a, b, result in zip(BITS.tolist(), OTHER.tolist(), found.tolist(), strict=True):
        if opcode == "rem.s32" and b == 0:
            continue
        assert result == INTEGERS[opcode](a, b) & 0xFFFFFFFF, (opcode, a, b)


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("mul.wide.s32 %rd9, %r21, %r22;", lambda a, b: signed(a) * signed(b)),
        ("mul.wide.u32 %rd9, %r21, %r22;", lambda a, b: a * b),
        ("mov.b64 %rd8, {%r21, %r22};\nmad.wide.s32 %rd9, %r21, %r22, %rd8;",
         lambda a, b: signed(a) * signed(b) + a + (b << 32)),
        ("cvt.s64.s32 %rd9, %r21;", lambda a, b: signed(a)),
        ("cvt.u64.u32 %rd9, %r21;", lambda a, b: a),
        ("mov.b64 %rd8, {%r21, %r22};\nshl.b64 %rd9, %rd8, 5;", lambda a, b: (a + (b << 32)) << 5),
        ("mov.b64 %rd8, {%r21, %r22};\nshr.s64 %rd9, %rd8, 3;", lambda a, b: signed(a + (b << 32), 64) >> 3),
    ],
)  # fmt: skip
def test_64_bits(opcode: str, exact: Any) -> None:
    found = evaluate(opcode, BITS, OTHER, out_bits=64)
    for a, b, result in zip(BITS.tolist(), OTHER.tolist(), found.tolist(), strict=True):
        assert result == exact(a, b) & (2**64 - 1), (opcode, a, b)


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("popc.b32 %r9, %r21;", lambda a: a.bit_count()),
        ("bfe.u32 %r9, %r21, 5, 7;", lambda a: a >> 5 & 127),
        ("bfe.s32 %r9, %r21, 5, 7;", lambda a: signed(a >> 5, 7)),
        ("not.b32 %r9, %r21;", lambda a: ~a),
        ("neg.s32 %r9, %r21;", lambda a: -a),
        ("abs.s32 %r9, %r21;", lambda a: abs(signed(a))),
        ("prmt.b32 %r9, %r21, 287454020, 0x5410;", lambda a: a & 0xFFFF | 0x33440000),
        ("prmt.b32 %r9, %r21, 0, 0x888B;", lambda a: 0xFF * (a >> 31) | 0xFFFFFF00 * (a >> 7 & 1)),
        ("cvt.u16.u32 %rs1, %r21;\ncvt.u32.u16 %r9, %rs1;", lambda a: a & 0xFFFF),
        ("mov.b32 {%rs1, %rs2}, %r21;\nmov.b32 %r9, {%rs2, %rs1};", lambda a: a >> 16 | a << 16),
        ("mad.lo.s32 %r9, %r21, 3, -1;", lambda a: 3 * a - 1),
    ],
)  # fmt: skip
def test_one_operand(opcode: str, exact: Any) -> None:
    found = evaluate(opcode, BITS)
    assert found.tolist() == [exact(a) & 0xFFFFFFFF for a in BITS.tolist()]


def test_fused_products_are_rounded_once() -> None:
    """Also where float64 rounds the sum to the middle of two float32 and the rest decides."""
    a, b = (RANDOM.normal(size=3200).astype(np.float32) for _ in range(2))
    c = (RANDOM.normal(size=3200) * 2.0 ** RANDOM.integers(-40, 40, 3200)).astype(np.float32)
    # The product is 2⁻²⁴ (1 − 2⁻³⁶): just less than half the last place of c, in float64 just half.
    a[:2], b[:2], c[:2] = 2.0**-12 * (1 + 2.0**-18), 2.0**-12 * (1 - 2.0**-18), [1 + 2.0**-23, 1]
    a[2:4], b[2:4], c[2:4] = a[:2], -b[:2], [-1 - 2.0**-23, 1 + 2.0**-23]
    found = arithmetic.fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        errors = [
            abs(Fraction(float(near)) - exact)
            for near in (result, np.nextafter(result, np.float32(9)), np.nextafter(result, np.float32(-9)))
        ]
        assert errors[0] == min(errors), (x, y, z)


def test_fused_products_of_float64_are_exact_to_an_ulp() -> None:
    a, b = RANDOM.normal(size=(2, 500))
    c = -(a * b) * (1 + RANDOM.integers(-2, 3, 500) * 2.0**-52)  # what is left is the product's own rounding
    found = arithmetic.fma64(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert abs(Fraction(result) - exact) <= abs(exact) * Fraction(2.0**-52)


def test_float_arithmetic_is_numpys_float32() -> None:
    other = FLOATS[::-1].copy()
    with np.errstate(all="ignore"):
        for opcode, exact in {
            "add.f32": FLOATS + other,
            "sub.f32": FLOATS - other,
            "mul.f32": FLOATS * other,
            "max.f32": np.fmax(FLOATS, other),
            "min.NaN.f32": np.minimum(FLOATS, other),
            "div.rn.f32": FLOATS / other,
        }.items():
            found = evaluate(f"{opcode} %r9, %r21, %r22;", FLOATS, other).view(np.float32)
            np.testing.assert_array_equal(found, exact, err_msg=opcode)


@pytest.mark.parametrize(
    ("opcode", "exact", "limit"),
    [
        ("ex2.approx.f32", np.exp2, 2.0**-22.5),
        ("rcp.approx.f32", lambda x: 1 / x, 2.0**-23),
        ("sqrt.approx.f32", np.sqrt, 2.0**-22),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2.0**-22),
        ("lg2.approx.f32", np.log2, 2.0**-22),
    ],
)
def test_approximations_err_within_what_is_documented(opcode: str, exact: Any, limit: float) -> None:
    x = RANDOM.uniform(0.01, 20, 3200).astype(np.float32)
    found = evaluate(f"{opcode} %r9, %r21;", x).view(np.float32).astype(np.float64)
    truth = exact(x.astype(np.float64))
    scale = np.maximum(np.abs(truth), 1) if opcode.startswith("lg2") else np.abs(truth)
    errors = np.abs(found - truth) / scale
    assert errors.max() <= limit * 1.26  # and the rounding of the result
    assert errors.max() >= limit / 2, "the machine is more exact than a GPU may be"
    again = evaluate(f"{opcode} %r9, %r21;", x[::-1].copy()).view(np.float32)
    np.testing.assert_array_equal(again[::-1], found.astype(np.float32))


def test_division_and_ends_of_approximations() -> None:
    a, b = RANDOM.normal(size=640).astype(np.float32), RANDOM.normal(size=640).astype(np.float32)
    found = evaluate("div.full.f32 %r9, %r21, %r22;", a, b).view(np.float32)
    assert (np.abs(found / (a.astype(np.float64) / b) - 1)).max() <= 2.0**-22
    ends = np.array([math.inf, -math.inf, math.nan, 0.0, -200.0], np.float32)
    found = evaluate("ex2.approx.ftz.f32 %r9, %r21;", ends).view(np.float32)
    np.testing.assert_array_equal(found[:4] == [math.inf, 0, 0, 0], [True, True, False, False])
    assert np.isnan(found[2])
    assert found[4] == 0.0
    found = evaluate("lg2.approx.f32 %r9, %r21;", ends).view(np.float32)
    np.testing.assert_array_equal(found[[0, 3]], [math.inf, -math.inf])


def test_conversions() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.7, 1e20, -1e20, math.nan], np.float32)
    for opcode, exact in {
        "cvt.rni.s32.f32": [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 0],
        "cvt.rzi.s32.f32": [0, 1, 2, 0, -1, 2**31 - 1, -(2**31), 0],
    }.items():
        found = evaluate(f"{opcode} %r9, %r21;", values).view(np.int32)
        assert found.tolist() == exact, opcode
    found = evaluate("cvt.rmi.f32.f32 %r9, %r21;", values).view(np.float32)
    np.testing.assert_array_equal(found, np.floor(values))
    found = evaluate("cvt.rn.f32.s32 %r9, %r21;", BITS).view(np.float32)
    np.testing.assert_array_equal(found, BITS.view(np.int32).astype(np.float32))


def test_tf32_is_rounded_to_nearest_ties_away() -> None:
    found = evaluate("cvt.rna.tf32.f32 %r9, %r21;", FLOATS).view(np.float32)
    for x, result in zip(FLOATS.tolist(), found.tolist(), strict=True):
        if not math.isfinite(x) or x == 0 or abs(x) > 3e38:
            continue
        unit = 2.0 ** (math.frexp(x)[1] - 11)
        assert result == math.copysign(math.floor(abs(x) / unit + 0.5) * unit, x)


def test_bfloat16_is_rounded_to_even() -> None:
    import torch

    exact = torch.from_numpy(FLOATS).bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(FLOATS)
    body = "cvt.rn.bf16x2.f32 %r8, %r21, %r22;\nmov.b32 {%rs1, %rs2}, %r8;\n"
    low = evaluate(body + "cvt.u32.u16 %r9, %rs1;", FLOATS[::-1].copy(), FLOATS)
    high = evaluate(body + "cvt.u32.u16 %r9, %rs2;", FLOATS, FLOATS)
    single = evaluate("cvt.rn.bf16.f32 %rs1, %r21;\ncvt.u32.u16 %r9, %rs1;", FLOATS)
    for found in (low, high, single):
        np.testing.assert_array_equal(found[number], exact[number])
    back = evaluate("cvt.rn.bf16.f32 %rs1, %r21;\ncvt.f32.bf16 %r9, %rs1;", FLOATS).view(np.float32)
    np.testing.assert_array_equal(back, torch.from_numpy(FLOATS).bfloat16().float().numpy())


def test_pairs_of_bfloat16() -> None:
    pairs = np.array([0xBF803F80, 0x40004000, 0x8000C040], np.uint32)  # (1, −1), (2, 2), (−3, −0)
    assert evaluate("abs.bf16x2 %r9, %r21;", pairs).tolist() == [0x3F803F80, 0x40004000, 0x00004040]
    two = np.full(3, 0x40004000, np.uint32)
    found = evaluate("fma.rn.bf16x2 %r9, %r21, %r22, %r22;", pairs, two)
    assert found.tolist() == [0x00004080, 0x40C040C0, 0x4000C080]  # 2x + 2: (4, 0), (6, 6), (−4, 2)


@pytest.mark.parametrize(
    ("order", "exact"),
    [
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a < b or a > b),
        ("lt", lambda a, b: a < b),
        ("ge", lambda a, b: a >= b),
        ("neu", lambda a, b: a != b),
        ("gtu", lambda a, b: not a <= b),
        ("num", lambda a, b: a == a and b == b),
        ("nan", lambda a, b: a != a or b != b),
    ],
)
def test_comparisons_of_floats(order: str, exact: Any) -> None:
    other = np.roll(FLOATS, 1)
    other[12] = FLOATS[12]
    found = evaluate(f"setp.{order}.f32 %p1, %r21, %r22;\nselp.b32 %r9, 7, 3, %p1;", FLOATS, other)
    assert found.tolist() == [
        7 if exact(a, b) else 3 for a, b in zip(FLOATS.tolist(), other.tolist(), strict=True)
    ]


def test_comparisons_of_integers_and_predicates() -> None:
    for opcode, exact in {
        "setp.lt.s32": lambda a, b: signed(a) < signed(b),
        "setp.lt.u32": lambda a, b: a < b,
        "setp.ne.b32": lambda a, b: a != b,
    }.items():
        body = f"{opcode} %p1, %r21, %r22;\nsetp.gt.s32 %p2, %r21, 100;\n"
        body += "and.pred %p3, %p1, %p2;\nnot.pred %p4, %p3;\nselp.b32 %r9, 1, 0, %p4;"
        found = evaluate(body, BITS, OTHER)
        pairs = zip(BITS.tolist(), OTHER.tolist(), strict=True)
        assert found.tolist() == [int(not (exact(a, b) and signed(a) > 100)) for a, b in pairs]


def test_guards_and_branches() -> None:
    """Threads go different ways, loop different times, and come together again."""
    body = """
mov.u32 %r9, 0;
mov.u32 %r1, %r60;
setp.gt.u32 %p1, %r60, 20;
@%p1 bra $L__BB0_2;
$L__BB0_1:
add.s32 %r9, %r9, %r1;
setp.eq.b32 %p2, %r1, 0;
@!%p2 add.s32 %r1, %r1, -1;
@!%p2 bra $L__BB0_1;
bra.uni $L__BB0_3;
$L__BB0_2:
mov.u32 %r9, 1000;
$L__BB0_3:
add.s32 %r9, %r9, 5;
"""
    found = evaluate(body, np.zeros(32, np.uint32))
    assert found.tolist() == [(1000 if n > 20 else n * (n + 1) // 2) + 5 for n in range(32)]


SHUFFLES = {
    "bfly.b32 %r9, %r21, 4, 31, -1": lambda n: n ^ 4,
    "up.b32 %r9, %r21, 3, 0, -1": lambda n: n - 3 if n >= 3 else n,
    "down.b32 %r9, %r21, 3, 31, -1": lambda n: n + 3 if n + 3 < 32 else n,
    "idx.b32 %r9, %r21, 9, 31, -1": lambda n: 9,
    # Segments of eight lanes: the mask 0b11000 in bits 8-12 of the operand.
    "bfly.b32 %r9, %r21, 7, 0x181f, -1": lambda n: n ^ 7,
    "idx.b32 %r9, %r21, 2, 0x181f, -1": lambda n: (n & 24) + 2,
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(shuffle: str) -> None:
    lanes = np.arange(64, dtype=np.uint32)
    found = evaluate(f"shfl.sync.{shuffle};", lanes)
    assert found.tolist() == [n // 32 * 32 + SHUFFLES[shuffle](n % 32) for n in range(64)]


def test_reductions_of_a_warp() -> None:
    for opcode, exact in {
        "redux.sync.add.s32": lambda warp: int(warp.sum()) & 0xFFFFFFFF,
        "redux.sync.min.s32": lambda warp: int(warp.view(np.int32).min()) & 0xFFFFFFFF,
        "redux.sync.max.u32": lambda warp: int(warp.max()),
    }.items():
        found = evaluate(f"{opcode} %r9, %r21, -1;", BITS)
        assert found.tolist() == [exact(BITS[:32])] * 32 + [exact(BITS[32:])] * 32
    body = "setp.lt.u32 %p1, %r21, 5;\nvote.sync.ballot.b32 %r9, %p1, -1;"
    assert evaluate(body, np.arange(32, dtype=np.uint32)).tolist() == [0b11111] * 32


def test_vectors_in_memory_and_special_registers() -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros(256, np.uint32)
    body = """
mul.wide.u32 %rd10, %r60, 16;
add.s64 %rd11, %rd1, %rd10;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd11];
mov.u32 %r5, %ctaid.x;
mov.u32 %r6, %nctaid.x;
mad.lo.s32 %r4, %r5, 1000, %r6;
mul.wide.u32 %rd12, %r5, 512;
add.s64 %rd13, %rd0, %rd10;
add.s64 %rd13, %rd13, %rd12;
st.global.v2.b32 [%rd13], {%r2, %r1};
st.global.v2.b32 [%rd13 + 8], {%r4, %r3};
"""
    assert list(run(body, out, source, programs=2).each()) == []
    for program in range(2):
        rows = out.reshape(2, 32, 4)[program].tolist()
        assert rows == [[4 * n + 1, 4 * n, 1000 * program + 2, 4 * n + 2] for n in range(32)]


def test_what_is_not_known_is_refused() -> None:
    for line in ("brev.b32 %r9, %r21;", "add.rz.f32 %r9, %r21, %r21;", "mov.b32 %r9, %nothing;",
                 "ld.local.b32 %r9, [%rd1];"):  # fmt: skip
        with pytest.raises(UnknownPTX):
            evaluate(line, BITS)
