"""From a module to what the machine executes: operands to functions of registers, blocks to lists of steps.

What an opcode does is in ``instructions.py``, which registers a handler for the opcode's first word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx.arithmetic import SUMS, UNSIGNED, Array, from_bf16, numpy_type, to_bf16, u4
from tests.ptx.executor import Block, Code, Machine, Mask, Step
from tests.ptx.program import Instruction, Module, UnknownPTX, bits_of, parse, vector

Read = Callable[[list[Any]], Array]
Write = Callable[[Machine, Array, Mask], None]
Handler = Callable[["Translator", Instruction], Step]

HANDLERS: dict[str, Handler] = {}


def executes(*names: str) -> Callable[[Handler], Handler]:
    """Register what the opcodes with these first words do."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def step_of(function: Callable[..., Array], reads: Sequence[Read], write: Write) -> Step:
    """Write a function of some operands."""
    if len(reads) == 1:
        (a,) = reads
        return lambda m, mask: write(m, function(a(m.registers)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda m, mask: write(m, function(a(m.registers), b(m.registers)), mask)
    return lambda m, mask: write(m, function(*(read(m.registers) for read in reads)), mask)


class Translator:
    """Operands of one module's instructions as functions of the registers."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.slots: dict[str, int] = {}
        self.widths: list[int] = []
        for name, width in module.registers.items():
            self._slot(name, width)

    def _slot(self, name: str, width: int) -> int:
        if name not in self.slots:
            self.slots[name] = len(self.widths)
            self.widths.append(width)
        return self.slots[name]

    def register(self, name: str) -> int:
        """The place of a register, special ones included."""
        if name in self.slots:
            return self.slots[name]
        if re.fullmatch(r"%(n?tid|n?ctaid)\.[xyz]|%laneid|%warpid", name):
            return self._slot(name, 32)
        raise UnknownPTX(f"register {name}")

    def registers(self, operand: str) -> list[int]:
        return [self.register(name) for name in vector(operand)]

    def read(self, operand: str, kind: str) -> Read:
        """An operand as a PTX type: ``f32``, ``s64``, ``pred``; ``bf16`` becomes float32."""
        if kind == "bf16":
            bits = self.read(operand, "b16")
            return lambda registers: from_bf16(bits(registers))
        if operand.startswith("!"):
            plain = self.read(operand[1:], kind)
            return lambda registers: ~plain(registers)
        width = bits_of(kind)
        wanted = np.bool_ if kind == "pred" else numpy_type(kind[0], width)
        if not operand.startswith("%"):
            value = self.constant(operand, kind)
            return lambda registers: value
        slot = self.register(operand)
        held = UNSIGNED[self.widths[slot]]
        if wanted == held:
            return lambda registers: registers[slot]
        if self.widths[slot] == width:
            return lambda registers: registers[slot].view(wanted)
        narrow = UNSIGNED[width]
        return lambda registers: registers[slot].astype(narrow).view(wanted)

    def constant(self, operand: str, kind: str) -> Array:
        width = bits_of(kind)
        unsigned = UNSIGNED[width]
        if operand in self.module.shared_names:
            return unsigned(0)
        if operand in self.module.parameters:
            return unsigned(self.module.parameters[operand][1])
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", operand):
            number = int(operand[2:], 16)
        elif re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            number = int(operand.removesuffix("U"), 0)
        else:
            raise UnknownPTX(f"operand {operand}")
        if kind == "pred":
            return np.bool_(number)
        bits = unsigned(number & ((1 << width) - 1))
        return bits.view(numpy_type(kind[0], width))

    def write(self, operand: str, kind: str) -> Write:
        """Write values of a PTX type into a register, which may be wider or narrower."""
        slot = self.register(operand)
        if kind == "bf16":
            return lambda m, value, mask: m.put(slot, to_bf16(value), mask)
        if kind == "pred":
            return lambda m, value, mask: m.put(slot, value, mask)
        unsigned, held = UNSIGNED[bits_of(kind)], UNSIGNED[self.widths[slot]]
        if unsigned == held:
            return lambda m, value, mask: m.put(slot, value.view(unsigned), mask)
        if kind[0] == "s":  # the sign is extended
            return lambda m, value, mask: m.put(slot, value.astype(np.int64).astype(held), mask)
        return lambda m, value, mask: m.put(slot, value.view(unsigned).astype(held), mask)

    def address(self, operand: str) -> Read:
        """``[%rd1 + 16]``, ``[global_smem + 8]``, ``[parameter]``."""
        inside = operand.strip().removeprefix("[").removesuffix("]").strip()
        match = re.fullmatch(r"(.*?)\s*(?:\+\s*(-?\w+))?", inside)
        assert match is not None
        base, offset = match[1].strip(), int(match[2] or "0", 0)
        if not base.startswith("%"):
            start = self.constant(base, "u32") + u4(offset)
            return lambda registers: start
        slot = self.register(base)
        if offset == 0:
            return lambda registers: registers[slot]
        width = self.widths[slot]
        added = UNSIGNED[width](offset & ((1 << width) - 1))
        return lambda registers: registers[slot] + added

    def step(self, instruction: Instruction) -> Step:
        """What an instruction does, under its guard."""
        handler = HANDLERS.get(instruction.parts[0])
        if handler is None:
            raise UnknownPTX(str(instruction))
        try:
            step = handler(self, instruction)
        except (KeyError, IndexError, ValueError) as error:
            raise UnknownPTX(f"{instruction}: {error!r}") from error
        if not instruction.guard:
            return step
        guard = self.read(instruction.guard, "pred")

        def guarded(m: Machine, mask: Mask) -> None:
            asked = guard(m.registers)
            if np.ndim(asked) == 0:
                if asked:
                    step(m, mask)
                return
            step(m, asked if mask is None else asked & mask)

        return guarded


def _granule(module: Module, space: str) -> int:
    """Bytes of the smallest access to a space, at most 4."""
    smallest = 4
    for instruction in module.instructions:
        parts = instruction.parts
        if parts[0] in ("ld", "st") and space in parts:
            smallest = min(smallest, bits_of(parts[-1]) // 8)
        if space == "shared" and ("matrix" in parts[0] or parts[0] == "wgmma"):
            smallest = min(smallest, 2 if _moves_halves(instruction) else 4)
    return smallest


def _moves_halves(instruction: Instruction) -> bool:
    return "trans" in instruction.parts or instruction.parts[-1] in ("bf16", "f16")


def _branch(translator: Translator, last: Instruction, following: int) -> tuple[Read | None, int | None]:
    if last.parts[0] == "ret":
        if last.guard:
            raise UnknownPTX(str(last))
        return None, None
    if last.parts[0] != "bra":
        return None, following
    target = translator.module.labels[last.operands[-1]]
    return (translator.read(last.guard, "pred") if last.guard else None), target


def translate(text: str, shared: int, architecture: int, *, exact_sums: bool = False) -> Code:
    """A module's text, its programs' bytes of shared memory and the architecture whose sums it is to have.

    Raises:
        UnknownPTX: it has an instruction that the machine does not execute.
    """
    from tests.ptx import instructions  # noqa: F401  registers the handlers

    module = parse(text)
    translator = Translator(module)
    blocks = []
    for number, block in enumerate(module.blocks):
        condition, target = _branch(translator, block[-1], number + 1)
        body = block[:-1] if block[-1].parts[0] in ("bra", "ret") else block
        blocks.append(Block([translator.step(each) for each in body], condition, target))
    sums = None if exact_sums else SUMS[max(known for known in SUMS if known <= architecture)]
    granules = _granule(module, "shared"), _granule(module, "global")
    names = translator.slots, translator.widths, module.parameters
    return Code(module.name, module.threads, shared, blocks, *names, *granules, sums)
