"""What the machine sees: compiled kernels with one thing broken are found out, most of them by it alone.

Which mutants go unseen is known: a mask of columns whose products are multiplied by zero, a wait or a fence
that another one makes superfluous. ``make ptx-check`` breaks other kernels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.ptx.cases import CASES, Case, findings
from tests.ptx.mutants import Mutant, mutants

pytest.importorskip("triton")


def case(name: str, D: int, method: str = "forward") -> Case:
    return next(c for c in CASES if (c.name, c.D, c.method.split("_")[0]) == (name, D, method))


def texts(subject: Any, kernel: str, architecture: int) -> str:
    """The PTX of a kernel that the case launches."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    subject.errors(architecture=architecture, exact_sums=True, change=keep)
    return next(text for text in found if f".entry {kernel}(" in text)


def seen(subject: Any, kernel: str, architecture: int, mutant: Mutant) -> tuple[bool, bool]:
    """(whether the machine finds something, whether a result is wrong)."""

    def change(text: str) -> str:
        return mutant.change(text) if f".entry {kernel}(" in text else text

    runs, errors = subject.errors(architecture=architecture, exact_sums=True, change=change)
    return bool(findings(runs)), any(not error <= limit for _, error, limit in errors)


def counts(subject: Any, kernel: str, architecture: int, chosen: list[Mutant]) -> dict[str, Counter[str]]:
    """By what was broken: how many mutants there were, and how many were seen, and by what."""
    found: dict[str, Counter[str]] = {}
    for mutant in chosen:
        by_machine, by_values = seen(subject, kernel, architecture, mutant)
        kind = mutant.kind
        found.setdefault(kind, Counter()).update(
            {"all": 1, "machine": by_machine, "values": by_values, "seen": by_machine or by_values}
        )
    return found


FORWARD = Case("layer", case("layer", 48).build, 70, 48, gradients=False)


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_missing_barrier_and_wait_is_seen(architecture: int) -> None:
    text = texts(FORWARD, "layer_fwd_kernel", architecture)
    chosen = [mutant for mutant in mutants(text) if mutant.kind in ("barrier", "wait for copies")]
    found = counts(FORWARD, "layer_fwd_kernel", architecture, chosen)
    for kind, each in found.items():
        assert each["machine"] == each["all"] > 0, kind
    # A fault that a GPU would show now and then: without the machine most pass for right.
    assert found["barrier"]["values"] < found["barrier"]["all"]


def test_missing_fences_and_waits_of_warpgroups_are_seen() -> None:
    text = texts(FORWARD, "layer_fwd_kernel", 90)
    chosen = [mutant for mutant in mutants(text) if mutant.kind in ("fence", "wait for products")]
    found = counts(FORWARD, "layer_fwd_kernel", 90, chosen)
    assert found["fence"]["machine"] >= 1
    assert found["wait for products"]["seen"] >= 2


def test_missing_masks_are_seen() -> None:
    """Every fifth; those of columns multiplied by zero and of what is never out of bounds are not."""
    text = texts(FORWARD, "layer_fwd_kernel", 80)
    chosen = [m for m in mutants(text) if m.kind in ("access without its mask", "copy without its mask")]
    found = counts(FORWARD, "layer_fwd_kernel", 80, chosen[1::5])
    for kind, each in found.items():
        assert each["machine"] >= each["all"] / 2 > 0, kind


@pytest.mark.ptx
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("subject", "kernel"),
    [
        (case("net", 20), "stack_bwd_kernel"),
        (case("net", 20, "inverse"), "stack_inv_kernel"),
        (case("layer, learnt slopes", 40), "weight_gradient_kernel"),
        (case("layer", 40, "inverse"), "layer_inv_kernel"),
        (case("layer", 40, "inverse"), "layer_inv_bwd_kernel"),
    ],
    ids=str,
)
def test_missing_barriers_of_other_kernels_are_seen(subject: Case, kernel: str, architecture: int) -> None:
    text = texts(subject, kernel, architecture)
    chosen = [mutant for mutant in mutants(text) if mutant.kind in ("barrier", "wait for copies")]
    for kind, each in counts(subject, kernel, architecture, chosen).items():
        # Some stand beside another that does their work too.
        assert each["seen"] >= 0.75 * each["all"], (kind, each)
