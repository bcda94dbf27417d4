"""Machine instructions that a kernel executes: how they are counted, and that they do not grow.

``benchmarks/gpu/kernel_roofline.py`` compiles and counts, in a process of its own as in ``test_compile.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.machine_code import Loop, executed, in_loops
from tests.kernels.test_compile import lines_of

ROOT = Path(__file__).parents[2]


def listing(text: str) -> str:
    """As nvdisasm prints it: a label a line, or an instruction with its address."""
    lines = []
    for k, line in enumerate(text.split("\n")):
        code = line.strip()
        lines.append(f".{code}" if code.endswith(":") else f"        /*{16 * k:04x}*/      {code} ;")
    return "\n".join(lines)


STRAIGHT = "MOV R1, R2\n@!P0 EXIT\nFADD R1, R1, R2\nEXIT\nL_x_9:\nBRA `(.L_x_9)"

#: A loop around another; @P1 skips both.
NESTED = """S2R R0, SR_TID
@P1 BRA `(.L_x_3)
L_x_1:
FADD R1, R1, R2
L_x_2:
HMMA.16816.F32 R4, R8, R6, R4
@P0 BRA `(.L_x_2)
FMUL R1, R1, R2
@!P0 BRA `(.L_x_1)
L_x_3:
STG.E.128 [R2], R4
EXIT"""

#: The side that is jumped to has two instructions, the other one.
SIDES = """@P0 BRA `(.L_x_1)
FMUL R1, R1, R2
BRA `(.L_x_2)
L_x_1:
FADD R1, R1, R2
FADD R1, R1, R2
FADD R1, R1, R2
L_x_2:
EXIT"""


def test_what_stands_in_a_loop_is_told_from_what_does_not() -> None:
    assert in_loops(listing(NESTED), ("HMMA", "FMUL", "STG", "S2R")) == 2
    assert in_loops(listing(SIDES), ("FADD", "FMUL")) == 0


@pytest.mark.parametrize(
    ("code", "loops", "counts"),
    [
        (STRAIGHT, [], {"MOV": 1, "EXIT": 2, "FADD": 1}),
        (
            NESTED,
            [Loop(3, (Loop(5),))],
            {
                "S2R": 1,
                "BRA": 1 + 3 * 6,
                "FADD": 3,
                "HMMA.16816.F32": 15,
                "FMUL": 3,
                "STG.E.128": 1,
                "EXIT": 1,
            },
        ),
        (SIDES, [], {"BRA": 1, "FADD": 3, "EXIT": 1}),
        # Of constant length: written out by the compiler, as the first and the last here.
        (NESTED, [Loop(1, fixed=True), Loop(2, (Loop(2), Loop(9, fixed=True)))], {"HMMA.16816.F32": 4}),
    ],
)
def test_instructions_are_counted(code: str, loops: list[Loop], counts: dict[str, float]) -> None:
    found = executed(listing(code), loops)
    assert {name: found[name] for name in counts} == counts
    assert len(counts) == 1 or sum(found.values()) == sum(counts.values())


@pytest.mark.parametrize("loops", [[], [Loop(3)], [Loop(3, (Loop(5), Loop(5)))], [Loop(3), Loop(5)]])
def test_other_loops_are_refused(loops: list[Loop]) -> None:
    with pytest.raises(ValueError, match=r"the code's loops are \[\[\[\]\]\]"):
        executed(listing(NESTED), loops)


def test_a_way_into_the_middle_of_a_loop_is_refused() -> None:
    code = NESTED.replace("@P1 BRA `(.L_x_3)", "@P1 BRA `(.L_x_5)").replace("FMUL", "L_x_5:\nFMUL")
    with pytest.raises(ValueError, match="loop"):
        executed(listing(code), [Loop(3, (Loop(5),))])


#: What is compiled here: quick, and on the path that the library takes most.
WATCHED = (("forward", 64, "tf32x3"), ("inverse", 64, "tf32x3"))

#: Times as many as committed.
MORE = 1.03

PROGRAM = """
import json, sys
from benchmarks.gpu.kernel_roofline import OPERATIONS, measure
by_name = {operation.name: operation for operation in OPERATIONS}
for name, D, arithmetic in json.loads(sys.argv[1]):
    print(json.dumps(measure(by_name[name], D, arithmetic)))
"""


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / "kernel-roofline.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    triton = pytest.importorskip("triton")
    if found["triton"] != triton.__version__:
        pytest.skip(f"the committed instructions are those of Triton {found['triton']}")
    return found


def test_kernels_execute_no_more_instructions_than_committed(committed: dict[str, Any]) -> None:
    """If they must: run benchmarks/gpu/kernel_roofline.py and commit what it writes, with the reason."""
    rows = {(row["operation"], row["D"], row["arithmetic"]): row for row in committed["rows"]}
    for row in lines_of(["-c", PROGRAM, json.dumps(WATCHED)]):
        key = (row["operation"], row["D"], row["arithmetic"])
        before = {launch["kernel"]: launch["instructions"] for launch in rows[key]["launches"]}
        now = {launch["kernel"]: launch["instructions"] for launch in row["launches"]}
        assert set(now) == set(before), f"{key}: other kernels are launched: renew kernel-roofline.json"
        assert all(now[kernel] <= MORE * before[kernel] for kernel in now), (key, now, before)


def test_the_committed_table_covers_every_operation(committed: dict[str, Any]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from benchmarks.gpu import kernel_roofline as k; "
            "print(len(list(k.wanted(list(k.SIZES), [o.name for o in k.OPERATIONS]))))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(committed["rows"]) == int(done.stdout)
