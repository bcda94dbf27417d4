"""Tiles: ldmatrix, stmatrix, mma and wgmma against matrix products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.ptx.snippets import run

RANDOM = np.random.default_rng(0)

#: The lane's number and, of the 32 lanes as 8 rows of 4, its row and column: %r61, %r62, %r63.
LANES = "and.b32 %r61, %r60, 31;\nshr.u32 %r62, %r61, 2;\nand.b32 %r63, %r61, 3;\n"


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def cut(x: Any) -> Any:
    """To tf32 as a tensor core reads it."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def halves(x: Any) -> tuple[Any, Any]:
    """(bits of bfloat16, their values in float64)."""
    rounded = torch.from_numpy(x).bfloat16()
    return rounded.view(torch.int16).numpy(), rounded.double().numpy()


def at(tensor: int, bytes_of_row: int, bytes_of_column: int, register: str = "%rd20") -> str:
    """The address of the lane's (row, column) in a tensor."""
    return (
        f"mul.lo.s32 %r50, %r62, {bytes_of_row};\nmad.lo.s32 %r50, %r63, {bytes_of_column}, %r50;\n"
        f"cvt.u64.u32 {register}, %r50;\nadd.s64 {register}, {register}, %rd{tensor};\n"
    )


MMA_TF32 = (
    LANES
    + at(1, 32, 4)
    + "ld.global.b32 %r1, [%rd20];\nld.global.b32 %r2, [%rd20 + 256];\n"
    + "ld.global.b32 %r3, [%rd20 + 16];\nld.global.b32 %r4, [%rd20 + 272];\n"
    + at(2, 4, 32)
    + "ld.global.b32 %r5, [%rd20];\nld.global.b32 %r6, [%rd20 + 128];\n"
    + at(3, 32, 8)
    + "ld.global.v2.b32 {%r7, %r8}, [%rd20];\nld.global.v2.b32 {%r9, %r10}, [%rd20 + 256];\n"
    + "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r11, %r12, %r13, %r14}, {%r1, %r2, %r3, %r4}, "
    + "{%r5, %r6}, {%r7, %r8, %r9, %r10};\n"
    + at(0, 32, 8)
    + "st.global.v2.b32 [%rd20], {%r11, %r12};\nst.global.v2.b32 [%rd20 + 256], {%r13, %r14};\n"
)


def test_mma_takes_tf32_and_sums_exactly() -> None:
    a, b, c, d = normal(16, 8), normal(8, 8), normal(16, 8), np.zeros((16, 8), np.float32)
    assert run(MMA_TF32, d, a, b, c).kinds() == set()
    np.testing.assert_array_equal(d, (cut(a) @ cut(b) + c).astype(np.float32))


@pytest.mark.parametrize(("architecture", "total"), [(0, 2**24 + 4), (80, 2**24), (90, 2**24 + 2)])
def test_sums_are_cut_as_on_each_architecture(architecture: int, total: int) -> None:
    """Four products of ¾ beside 2²⁴: rounded once (0); cut to one bit beyond 24 of them, or to two."""
    a, b, d = np.zeros((16, 8), np.float32), np.ones((8, 8), np.float32), np.zeros((16, 8), np.float32)
    a[:, :4] = 0.75
    c = np.full((16, 8), 2.0**24, np.float32)
    run(MMA_TF32, d, a, b, c, architecture=architecture or 80, exact_sums=architecture == 0)
    assert (d == total).all()


@pytest.mark.parametrize("architecture", [80, 90])
def test_cut_sums_are_close_to_exact_ones(architecture: int) -> None:
    a, b, c, d = normal(16, 8), normal(8, 8), normal(16, 8), np.zeros((16, 8), np.float32)
    run(MMA_TF32, d, a, b, c, architecture=architecture, exact_sums=False)
    exact, terms = cut(a) @ cut(b) + c, np.abs(cut(a)) @ np.abs(cut(b)) + np.abs(c)
    assert 0 < np.abs(d - exact).max() <= (terms * 2.0**-21).max()
    assert (np.abs(d - exact) <= terms * 2.0**-21).all()


#: A [16, 16] and B [16, 8] of bfloat16 through shared memory, rows of 32 and of 16 bytes, B from byte 512 on.
MMA_BF16 = (
    LANES
    + "shl.b32 %r50, %r61, 4;\ncvt.u64.u32 %rd20, %r50;\nadd.s64 %rd21, %rd20, %rd1;\n"
    + "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd21];\nmov.u32 %r51, global_smem;\n"
    + "add.s32 %r52, %r51, %r50;\nst.shared.v4.b32 [%r52], {%r1, %r2, %r3, %r4};\n"
    + "shl.b32 %r50, %r61, 3;\ncvt.u64.u32 %rd20, %r50;\nadd.s64 %rd21, %rd20, %rd2;\n"
    + "ld.global.v2.b32 {%r1, %r2}, [%rd21];\nadd.s32 %r52, %r51, %r50;\n"
    + "st.shared.v2.b32 [%r52 + 512], {%r1, %r2};\nbar.sync 0;\n"
    + "and.b32 %r53, %r61, 15;\nshr.u32 %r54, %r61, 4;\nshl.b32 %r55, %r53, 5;\n"
    + "mad.lo.s32 %r55, %r54, 16, %r55;\nadd.s32 %r55, %r55, %r51;\n"
    + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r55];\n"
    + "shl.b32 %r56, %r53, 4;\nadd.s32 %r56, %r56, %r51;\n"
    + "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r6}, [%r56 + 512];\nmov.b32 %r7, 0;\n"
    + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r11, %r12, %r13, %r14}, {%r1, %r2, %r3, %r4}, "
    + "{%r5, %r6}, {%r7, %r7, %r7, %r7};\n"
    + at(0, 32, 8)
    + "st.global.v2.b32 [%rd20], {%r11, %r12};\nst.global.v2.b32 [%rd20 + 256], {%r13, %r14};\n"
)


def test_ldmatrix_and_mma_of_bfloat16() -> None:
    (a, exact_a), (b, exact_b) = halves(normal(16, 16)), halves(normal(16, 8))
    d = np.zeros((16, 8), np.float32)
    assert run(MMA_BF16, d, a, b).kinds() == set()
    np.testing.assert_array_equal(d, (exact_a @ exact_b).astype(np.float32))
    late = run(MMA_BF16.replace("bar.sync 0;", ""), d, a, b).kinds()
    assert late == {"shared memory: read after write, lanes of a warp"}


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_is_the_reverse_of_ldmatrix(transposed: str) -> None:
    """What a lane's registers hold of four matrices, through shared memory and back."""
    values, out = RANDOM.integers(0, 2**32, (32, 4), dtype=np.uint32), np.zeros((32, 4), np.uint32)
    body = (
        LANES + "shl.b32 %r50, %r61, 4;\ncvt.u64.u32 %rd20, %r50;\nadd.s64 %rd21, %rd20, %rd1;\n"
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd21];\nmov.u32 %r51, global_smem;\n"
        "add.s32 %r52, %r51, %r50;\n"
        f"stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r52], {{%r1, %r2, %r3, %r4}};\nbar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r52];\n"
        "add.s64 %rd21, %rd20, %rd0;\nst.global.v4.b32 [%rd21], {%r5, %r6, %r7, %r8};\n"
    )
    assert run(body, out, values).kinds() == set()
    np.testing.assert_array_equal(out, values)


# --- wgmma ----------------------------------------------------------------------------------------------


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62


def image(matrix: Any, k: int, place: Any) -> Any:
    """The words of shared memory that hold a matrix [rows, k] of 4-byte numbers, by its byte's ``place``."""
    rows = len(matrix)
    at = place(np.arange(rows)[:, None], np.arange(k)[None, :] * 4) // 4
    words = np.zeros(int(at.max()) + 1, np.float32)
    words[at] = matrix
    return np.resize(words, -(-len(words) // 4) * 4)


#: (name, number of the swizzle, numbers of a row, bytes of a leading and a stride step, byte of (row, byte)).
LAYOUTS = {
    "plain": (0, 8, 128, 256, lambda r, byte: r // 8 * 256 + byte // 16 * 128 + r % 8 * 16 + byte % 16),
    "128 bytes": (1, 32, 16, 1024, lambda r, byte: r * 128 + (byte // 16 ^ r % 8) * 16 + byte % 16),
    "64 bytes": (2, 16, 16, 512, lambda r, byte: r * 64 + (byte // 16 ^ r // 2 % 4) * 16 + byte % 16),
}


def wgmma(layout: str, block: int) -> str:
    """D [64, 8] of A [64, k] and B [8, k] in shared memory, at products 8·block … of k."""
    swizzle, k, leading, stride, _ = LAYOUTS[layout]
    b_start = 64 * k * 4
    words = (64 + 8) * k
    copies = "".join(
        f"add.s32 %r53, %r60, {first};\nsetp.lt.u32 %p1, %r53, {words};\nmul.wide.u32 %rd20, %r53, 4;\n"
        "add.s64 %rd20, %rd20, %rd1;\n@%p1 ld.global.b32 %r54, [%rd20];\nshl.b32 %r55, %r53, 2;\n"
        "add.s32 %r55, %r55, %r51;\n@%p1 st.shared.b32 [%r55], %r54;\n"
        for first in range(0, words, 128)
    )
    a, b = (descriptor(start + 32 * block, leading, stride, swizzle) for start in (0, b_start))
    return (
        f"{LANES}mov.u32 %r51, global_smem;\n{copies}bar.sync 0;\nfence.proxy.async.shared::cta;\n"
        "mov.b32 %r11, 0;\nmov.b32 %r12, 0;\nmov.b32 %r13, 0;\nmov.b32 %r14, 0;\n"
        f"mov.b64 %rd30, {a};\nmov.b64 %rd31, {b};\nwgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r11, %r12, %r13, %r14}, "
        "%rd30, %rd31, 1, 1, 1;\n"
        "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
        f"{at(0, 32, 8)}shr.u32 %r56, %r60, 5;\nmul.wide.u32 %rd21, %r56, 512;\n"
        "add.s64 %rd20, %rd20, %rd21;\n"
        "st.global.v2.b32 [%rd20], {%r11, %r12};\nst.global.v2.b32 [%rd20 + 256], {%r13, %r14};\n"
    )


def multiply(layout: str, block: int, change: tuple[str, str] = ("", "")) -> tuple[Any, Any, set[str]]:
    """(D, what it should be, what was found) of random matrices."""
    k, place = LAYOUTS[layout][1], LAYOUTS[layout][4]
    a, b, d = normal(64, k), normal(8, k), np.zeros((64, 8), np.float32)
    memory = np.concatenate([image(a, k, place), image(b, k, place)])
    body = wgmma(layout, block).replace(*change)
    found = run(body, d, memory, threads=128, shared=4 * len(memory), architecture=90)
    columns = slice(8 * block, 8 * block + 8)
    return d, (cut(a)[:, columns] @ cut(b)[:, columns].T).astype(np.float32), found.kinds()


@pytest.mark.parametrize(
    ("layout", "block"), [("plain", 0), ("128 bytes", 0), ("128 bytes", 3), ("64 bytes", 1)]
)
def test_wgmma_reads_tiles_in_shared_memory(layout: str, block: int) -> None:
    d, exact, found = multiply(layout, block)
    assert found == set()
    np.testing.assert_array_equal(d, exact)


def test_what_wgmma_must_be_ordered_with() -> None:
    fence, barrier = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n"
    assert multiply("plain", 0, (fence, ""))[2] == {
        "shared memory: read by wgmma without fence.proxy.async since the write"
    }
    assert any("read after write" in kind for kind in multiply("plain", 0, (barrier, ""))[2])
    # What is written before the wait may still be read.
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    early = (
        "wgmma.commit_group.sync.aligned;\n",
        "wgmma.commit_group.sync.aligned;\nst.shared.b32 [%r51], 7;\n",
    )
    assert any("after" in kind for kind in multiply("plain", 0, early)[2])
    # Sums are not there before it.
    d, exact, _ = multiply("plain", 0, (wait, ""))
    assert not np.allclose(d, exact)


def test_an_accumulator_is_added_to_or_not() -> None:
    d, exact, _ = multiply("plain", 0, ("mov.b32 %r11, 0;", "mov.b32 %r11, 0f3F800000;"))
    np.testing.assert_allclose(d[::16, ::2], exact[::16, ::2] + 1, rtol=1e-5, atol=1e-5)
    d, exact, _ = multiply("plain", 0, ("%rd31, 1, 1, 1;", "%rd31, 0, 1, 1;"))
    np.testing.assert_array_equal(d, exact)
