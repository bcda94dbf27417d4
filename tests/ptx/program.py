"""PTX as text into PTX as instructions: the one kernel of a module that Triton compiled.

Only the parts of the language that Triton emits are read: one ``.entry``, registers declared at its head, one
instruction a line, labels, ``.loc`` lines with the place in the Python source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: What a line may start with that is no instruction: directives, braces, the call's stray parentheses.
_SKIPPED = (".", "{", "(", ")")

#: Labels that nothing jumps to.
_DEBUG_LABELS = ("$L__tmp", "$L__func")


class UnknownPTX(Exception):
    """An instruction, operand or directive that the machine does not execute."""


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands``, and where it stands."""

    opcode: str
    operands: tuple[str, ...]
    guard: str
    """The predicate register, with ``!`` before it if negated; "" without one."""
    line: int
    source: str
    """``file.py:line:column`` of the kernel."""

    @property
    def parts(self) -> tuple[str, ...]:
        """``ld.global.v4.b32`` → (ld, global, v4, b32)."""
        return tuple(self.opcode.replace("shared::cta", "shared").replace("::", "_").split("."))

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return (
            f"{guard}{self.opcode} {', '.join(self.operands)}  ({self.source}, line {self.line} of the PTX)"
        )


@dataclass
class Module:
    """A kernel: its threads a program, parameters, registers and basic blocks."""

    name: str
    threads: int
    parameters: dict[str, tuple[str, int]]
    """Name → (type, bytes from the first)."""
    shared_names: set[str]
    registers: dict[str, int] = field(default_factory=dict)
    """Name → width in bits; 1 for predicates."""
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label → number of its block."""

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at top level: commas inside braces or brackets separate nothing."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def vector(operand: str) -> list[str]:
    """``{%r1, %r2}`` → its registers; a single register as one."""
    operand = operand.strip()
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def bits_of(kind: str) -> int:
    """``f32`` → 32, ``pred`` → 1, ``bf16x2`` → 32."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    digits = re.search(r"\d+$", kind)
    if digits is None:
        raise UnknownPTX(f"type {kind}")
    return int(digits[0])


def parse(text: str) -> Module:
    """The kernel of a PTX module.

    Raises:
        UnknownPTX: the text has no entry, or a line that is none of what Triton emits.
    """
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.DOTALL)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if entry is None or threads is None:
        raise UnknownPTX("no .entry with .reqntid in this PTX")
    head = text[: entry.end()]
    module = Module(
        name=entry[1],
        threads=int(threads[1]),
        parameters=_parameters(entry[2]),
        shared_names=set(re.findall(r"\.shared[^;]*?\.b8\s+([\w$]+)\[", text)),
    )
    _read_body(module, text[entry.end() :].split("\n"), head.count("\n") + 1)
    return module


def _parameters(text: str) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    at = 0
    for parameter in split_operands(re.sub(r"//[^\n]*", "", text)):
        match = re.search(r"\.param\s+\.(\w+).*?([\w$]+)$", parameter, re.DOTALL)
        if match is None:
            raise UnknownPTX(f"parameter {parameter!r}")
        size = bits_of(match[1]) // 8
        at = -(-at // size) * size
        found[match[2]] = (match[1], at)
        at += size
    return found


def _read_body(module: Module, lines: list[str], first: int) -> None:
    block: list[Instruction] = []
    module.blocks.append(block)
    source = ""
    for number, raw in enumerate(lines, first):
        line, _, comment = (part.strip() for part in raw.partition("//"))
        if line == "}":
            break
        if line.startswith(".loc"):
            source = comment.split()[0] if comment else source
        elif line.startswith(".reg"):
            _declare(module, line)
        elif label := re.fullmatch(r"([\w$]+):", line):
            if label[1].startswith(_DEBUG_LABELS):
                continue
            if block:
                module.blocks.append(block := [])
            module.labels[label[1]] = len(module.blocks) - 1
        elif line and not line.startswith(_SKIPPED):
            for statement in filter(None, (part.strip() for part in line.split(";"))):
                block.append(_instruction(statement, number, source))
                if block[-1].parts[0] in ("bra", "ret"):
                    module.blocks.append(block := [])
    if not module.blocks[-1]:
        module.blocks.pop()


def _declare(module: Module, line: str) -> None:
    kind, names = line.removesuffix(";").split(None, 2)[1:]
    width = bits_of(kind.removeprefix("."))
    for name in split_operands(names):
        numbered = re.fullmatch(r"(%\w+?)<(\d+)>", name)
        every = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]
        module.registers.update(dict.fromkeys(every, width))


def _instruction(statement: str, line: int, source: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if match is None:
        raise UnknownPTX(f"line {line}: {statement}")
    return Instruction(match[2], split_operands(match[3]), match[1] or "", line, source)
