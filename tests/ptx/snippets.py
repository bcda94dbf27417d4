"""A few instructions as a kernel of one program, for the tests of the machine itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.ptx.launch import How, execute
from tests.ptx.memory import Findings
from tests.ptx.translate import translate

#: 64 registers of each kind; %rd0, %rd1, … hold the addresses of the tensors, %r60 the thread's number.
_TEMPLATE = """
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
.reg .pred %p<64>;
.reg .b16 %rs<64>;
.reg .b32 %r<64>;
.reg .b64 %rd<64>;
{loads}
mov.u32 %r60, %tid.x;
{body}
ret;
}}
"""


def kernel(body: str, tensors: int, threads: int) -> str:
    names = [f"kernel_param_{n}" for n in range(tensors)]
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    loads = "\n".join(f"ld.param.b64 %rd{n}, [{name}];" for n, name in enumerate(names))
    return _TEMPLATE.format(parameters=parameters, threads=threads, loads=loads, body=body)


def run(
    body: str,
    *tensors: Any,
    threads: int = 32,
    programs: int = 1,
    shared: int = 1024,
    architecture: int = 80,
    exact_sums: bool = True,
) -> Findings:
    """Execute a body on NumPy arrays, which it may change."""
    code = translate(kernel(body, len(tensors), threads), shared, architecture, exact_sums=exact_sums)
    values = [(torch.from_numpy(tensor), "*array") for tensor in tensors]
    return execute(code, values, (programs, 1, 1), How(architecture))


_REGISTERS = {16: ("%rs", np.uint16), 32: ("%r", np.uint32), 64: ("%rd", np.uint64)}


def evaluate(body: str, *operands: Any, out_bits: int = 0) -> Any:
    """What lands in %r9 (%rd9 of 64 bits, %rs9 of 16) for operands in %r21, %r22, …: one thread an element.

    Operands are arrays of as many bits as their registers; the result, unsigned, has the first one's bits.
    """
    threads = -(-len(operands[0]) // 32) * 32
    out_bits = out_bits or 8 * operands[0].dtype.itemsize
    out_register, unsigned = _REGISTERS[out_bits]
    tensors = [np.zeros(threads, unsigned), *(np.resize(operand, threads) for operand in operands)]
    text = ""
    for n, operand in enumerate(tensors[1:], 1):
        bits = 8 * operand.dtype.itemsize
        text += f"mul.wide.u32 %rd50, %r60, {bits // 8};\nadd.s64 %rd50, %rd{n}, %rd50;\n"
        text += f"ld.global.b{bits} {_REGISTERS[bits][0]}{20 + n}, [%rd50];\n"
    text += f"{body}\nmul.wide.u32 %rd50, %r60, {out_bits // 8};\nadd.s64 %rd50, %rd0, %rd50;\n"
    text += f"st.global.b{out_bits} [%rd50], {out_register}9;\n"
    findings = run(text, *tensors, threads=threads)
    assert list(findings.each()) == []
    return tensors[0][: len(operands[0])]
