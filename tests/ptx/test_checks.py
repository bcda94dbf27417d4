"""What the machine watches: of each kind a few instructions that are wrong, and the same put right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.snippets import run

#: Shared memory at four times the thread's number, and at that of the thread beyond: %r1 and %r2.
WHERE = """
shl.b32 %r1, %r60, 2;
add.s32 %r3, %r60, {beyond};
rem.u32 %r3, %r3, {threads};
shl.b32 %r2, %r3, 2;
mov.u32 %r4, global_smem;
add.s32 %r1, %r1, %r4;
add.s32 %r2, %r2, %r4;
"""
STORE, LOAD = "st.shared.b32 [%r1], %r60;\n", "ld.shared.b32 %r5, [%r2];\n"
BARRIER, WARP_BARRIER = "bar.sync 0;\n", "bar.warp.sync -1;\n"


def kinds(body: str, *tensors: np.ndarray, beyond: int = 32, threads: int = 64, **options: int) -> set[str]:
    text = WHERE.format(beyond=beyond, threads=threads) + body
    return run(text, *tensors, threads=threads, **options).kinds()


def words(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "beyond", "found"),
    [
        (STORE + BARRIER + LOAD, 32, ""),
        (STORE + LOAD, 32, "read after write, two warps"),
        (STORE + WARP_BARRIER + LOAD, 32, "read after write, two warps"),
        (STORE + LOAD, 0, ""),
        (STORE + LOAD, 64, ""),
        (STORE + BARRIER + LOAD + STORE, 32, "write after read, two warps"),
        (STORE + BARRIER + LOAD + BARRIER + STORE, 32, ""),
        (STORE + "st.shared.b32 [%r2], %r60;\n", 32, "write after write, two warps"),
        ("st.shared.b32 [global_smem], %r60;\n", 32, "two threads write different values"),
        ("st.shared.b32 [global_smem], 5;\n", 32, ""),
        (LOAD, 32, "read before any write"),
    ],
)
def test_races_between_warps(body: str, beyond: int, found: str) -> None:
    seen = kinds(body, beyond=beyond)
    assert len(seen) == bool(found)
    assert all(found in kind for kind in seen)


def test_races_within_a_warp() -> None:
    """Lanes of a warp go their own ways: a barrier of the warp or of the program must lie between."""
    for between, found in (("", 1), (WARP_BARRIER, 0), (BARRIER, 0)):
        assert len(kinds(STORE + between + LOAD, beyond=1, threads=32)) == found
        again = STORE + BARRIER + LOAD + between + STORE
        assert len(kinds(again, beyond=1, threads=32)) == found


def test_several_readers_are_remembered() -> None:
    """A granule that several threads read, of one warp or of several, and that another then writes."""
    for reader, threads in (("%r60", 32), ("%r60", 64)):
        body = f"st.shared.b32 [global_smem], 5;\n{BARRIER}ld.shared.b32 %r5, [global_smem];\n"
        body += f"setp.eq.u32 %p1, {reader}, 9;\n"
        store = "@%p1 st.shared.b32 [global_smem], 6;\n"
        assert any("write after read" in kind for kind in kinds(body + store, threads=threads))
        assert kinds(body + BARRIER + store, threads=threads) == set()


def test_races_between_programs() -> None:
    """Nothing orders programs: not even reading is safe beside a write."""
    elsewhere = "mov.u32 %r6, %ctaid.x;\nmul.wide.u32 %rd10, %r6, 4;\nadd.s64 %rd10, %rd10, %rd0;\n"
    write_own = elsewhere + "st.global.b32 [%rd10], 1;\n"
    assert kinds(write_own, words(4), programs=2) == set()
    assert any(
        "write after write" in kind for kind in kinds("st.global.b32 [%rd0], 1;\n", words(4), programs=2)
    )
    read_first = "ld.global.b32 %r7, [%rd0 + 4];\n" + write_own
    assert any("after" in kind for kind in kinds(read_first, words(4), programs=2))
    assert kinds(read_first, words(4), programs=1) == set()


def test_bounds_and_alignment() -> None:
    at = "mul.wide.u32 %rd10, %r60, 4;\nadd.s64 %rd10, %rd10, %rd0;\nld.global.b32 %r5, [%rd10 + {offset}];\n"
    assert kinds(at.format(offset=0), words(64)) == set()
    assert kinds(at.format(offset=4), words(64)) == {"global memory: out of bounds"}
    assert kinds(at.format(offset=-4), words(64)) == {"global memory: out of bounds"}
    assert "global memory: misaligned" in kinds(at.format(offset=2), words(65))
    for address, found in (("1020", set()), ("1024", {"shared memory: out of bounds"})):
        assert kinds(f"st.shared.b32 [global_smem + {address}], 5;\n") == found
    assert kinds("st.shared.b32 [global_smem + 2], 5;\n") == {"shared memory: misaligned"}


def test_out_of_bounds_changes_nothing() -> None:
    out, beside = words(8), words(8)
    kinds("st.global.b32 [%rd0 + 32], 77;\n", out, beside)
    assert out.tolist() == beside.tolist() == list(range(8))


def test_barriers_that_a_part_reaches() -> None:
    early = "setp.lt.u32 %p1, %r60, {count};\n@%p1 bra $L__BB0_1;\n{instruction}$L__BB0_1:\n"
    for count, instruction, found in (
        (32, BARRIER, {"reached by a part of a program"}),
        (64, BARRIER, set()),
        (0, BARRIER, set()),
        (32, WARP_BARRIER, set()),
        (16, WARP_BARRIER, {"reached by a part of a warp"}),
        (16, "shfl.sync.bfly.b32 %r5, %r60, 1, 31, -1;\n", {"reached by a part of a warp"}),
        (16, "redux.sync.add.s32 %r5, %r60, -1;\n", {"reached by a part of a warp"}),
    ):
        assert kinds(early.format(count=count, instruction=instruction)) == found, (count, instruction)


COPY = """
mul.wide.u32 %rd10, %r60, 4;
add.s64 %rd10, %rd10, %rd0;
cp.async.ca.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x4{size};
cp.async.commit_group;
"""
WAIT = "cp.async.wait_group {left};\n"
KEEP = "mul.wide.u32 %rd11, %r60, 4;\nadd.s64 %rd11, %rd11, %rd1;\nst.global.b32 [%rd11], %r5;\n"


def test_asynchronous_copies_arrive_at_the_wait() -> None:
    source, out = words(64) + 100, words(64)
    body = COPY.format(size="") + WAIT.format(left=0)
    assert kinds(body + BARRIER + LOAD + KEEP, source, out) == set()
    assert out.tolist() == np.roll(source, -32).tolist()
    assert kinds(body + LOAD + KEEP, source, out, beyond=0) == set()  # one's own need no barrier
    assert any("two warps" in kind for kind in kinds(body + LOAD, source))
    late = COPY.format(size="") + BARRIER + LOAD + KEEP
    seen = kinds(late, source, out)
    assert any("has not been waited for" in kind for kind in seen)
    assert "shared memory: cp.async is never waited for" in seen
    assert (out == 0xFFFFFFFF).all()


def test_groups_of_copies_arrive_in_order() -> None:
    """With one group left on its way the first has arrived, the second not."""
    second = COPY.format(size="").replace("%r1 + 0", "%r1 + 256").replace("%rd10 + 0", "%rd10 + 256")
    body = COPY.format(size="") + second + WAIT.format(left=1) + BARRIER
    end = WAIT.format(left=0)
    source, out = words(128), words(64)
    assert kinds(body + LOAD + KEEP + end, source, out) == set()
    assert out.tolist() == np.roll(source[:64], -32).tolist()
    beyond = LOAD.replace("[%r2]", "[%r2 + 256]")
    assert any("has not been waited for" in kind for kind in kinds(body + beyond + end, source))


def test_copies_of_nothing_write_zeros_and_read_nothing() -> None:
    size = "setp.lt.u32 %p1, %r60, 40;\nselp.b32 %r8, 4, 0, %p1;\n"
    body = size + COPY.format(size=", %r8") + WAIT.format(left=0) + BARRIER + LOAD + KEEP
    source, out = words(40) + 1, words(64)
    assert kinds(body, source, out, beyond=64) == set()
    assert out.tolist() == [*range(1, 41), *[0] * 24]


def test_narrow_stores_are_told_apart() -> None:
    """Two threads may write the halves of one word."""
    body = "shl.b32 %r7, %r60, 1;\nadd.s32 %r7, %r7, %r4;\nmov.u16 %rs1, 3;\nst.shared.b16 [%r7], %rs1;\n"
    assert kinds(body) == set()
