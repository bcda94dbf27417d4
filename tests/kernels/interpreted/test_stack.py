"""M layers in one launch, forward, inverse and the gradients of both, against M single layers in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness import FAMILIES, LIMIT, amid_nan, guarded, normwise, random_lu
from lunet_fast.kernels import tiles
from lunet_fast.kernels.launch import PRECISIONS
from lunet_fast.kernels.solve import invert_blocks
from lunet_fast.kernels.stack import stack_forward, stack_inverse
from lunet_fast.kernels.stack_gradient import stack_backward, stack_inverse_backward
from lunet_fast.ops import reference

#: Slopes whose inverses, eight deep, leave something to compare.
MILD = [(0.5, 0.5, 1.0), (3.0, 0.2, 2.0), (0.4, 1.0, 0.3)]

#: (N, M, D): one row, one layer, one column, whole tiles, one row and one column more.
CORNERS = [(1, 1, 1), (70, 8, 1), (64, 2, 16), (65, 4, 17), (33, 2, 32), (129, 2, 33), (40, 3, 64)]


@contextmanager
def programs(count: int) -> Iterator[None]:
    """Let a backward have this many programs at most, so that each walks several tiles of rows."""
    plain = tiles.stack_programs
    tiles.stack_programs = lambda architecture: count
    try:
        yield
    finally:
        tiles.stack_programs = plain


def inverted_blocks(lu: Tensor, sign: Tensor, size: int) -> Tensor:
    """As ``invert_blocks``, whose substitution takes the interpreter seconds; NaN beyond D."""
    found = torch.full((len(lu), 2, -(-lu.shape[-1] // size), size, size), math.nan)
    for m, pair in enumerate(zip(lu, sign.double(), strict=True)):
        for number, factor in enumerate(reference.factors(*pair)):
            for k, start in enumerate(range(0, len(factor), size)):
                block = factor[start : start + size, start : start + size]
                found[m, number, k, : len(block), : len(block)] = torch.linalg.inv(block)
    return found


class Case:
    """A stack's arguments amid NaN, and what float64 says of them, computed layer by layer."""

    def __init__(
        self, N: int, M: int, D: int, kind: str, floats: tuple[float, ...], has_bias: bool, last: bool
    ) -> None:
        self.M, self.D, self.last = M, D, last
        self.active = M if last else M - 1
        lu = random_lu(D, K=M)
        # Signs go into the blocks and W; the packed matrix itself has none.
        self.sign = torch.where(torch.rand(M, D) < 0.5, -1.0, 1.0)
        bias = 0.5 * torch.randn(M, D) if has_bias else None
        x = torch.randn(N, D)
        self.floats = floats
        slopes: Any = floats
        if kind != "floats":
            slopes = torch.tensor(floats) * (0.9 + 0.2 * torch.rand(self.active, 3))
        if kind == "per column":
            slopes = slopes[..., None] * (0.9 + 0.2 * torch.rand(self.active, 3, D))
        self.learnt = isinstance(slopes, Tensor)

        self.lu64, self.x64 = lu.double().requires_grad_(), x.double().requires_grad_()
        self.bias64 = None if bias is None else bias.double().requires_grad_()
        self.slopes64 = slopes.double().requires_grad_() if self.learnt else None
        self.weight64 = torch.stack(
            [reference.lu_weight(*pair) for pair in zip(self.lu64, self.sign.double(), strict=True)]
        )
        self.weight64 = self.weight64.detach().requires_grad_()
        self.y64, self.logabsdet64 = self.forward(self.x64)

        self.x, self.y = amid_nan(x), amid_nan(self.y64.detach().float())
        self.lu, self.weight = amid_nan(lu), amid_nan(self.weight64.detach().float())
        self.bias = amid_nan(bias)
        self.slopes = amid_nan(slopes) if self.learnt else slopes
        self.constant = amid_nan(torch.stack([reference.lu_logabsdet(m) for m in lu]))

    def family(self, m: int) -> Any:
        """φ's slopes in layer m in float64, or None where there is no activation."""
        if m >= self.active:
            return None
        return self.floats if self.slopes64 is None else self.slopes64[m]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for m in range(self.M):
            x = x @ self.weight64[m].mT
            if self.bias64 is not None:
                x = x + self.bias64[m]
            total = total + reference.lu_logabsdet(self.lu64[m])
            if self.family(m) is not None:
                x, part = reference.leaky_softplus_and_logabsdet(x, self.family(m))
                total = total + part
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(len(y))
        for m in reversed(range(self.M)):
            if self.family(m) is not None:
                y, part = reference.leaky_softplus_inverse_and_logabsdet(y, self.family(m))
                total = total + part
            total = total - reference.lu_logabsdet(self.lu64[m])
            if self.bias64 is not None:
                y = y - self.bias64[m]
            y = torch.linalg.solve(self.weight64[m], y.mT).mT
        return y, total

    def parameters(self) -> list[Tensor]:
        found = [self.weight64, self.bias64, self.slopes64]
        return [tensor for tensor in found if tensor is not None]

    def blocks(self, name: str, precision: str) -> Tensor:
        tile = tiles.stack_tile(name, self.D, torch.float32, precision, 90)
        assert tile is not None
        return amid_nan(inverted_blocks(self.lu64.detach(), self.sign, tile.inner))

    @torch.no_grad()
    def condition(self) -> float:
        """κ: of each layer cond(W)·slope ratio, times how much its output's error grows on the way to x."""
        kappa, x = 0.0, self.x64
        grown = torch.eye(self.D).double().expand(len(x), -1, -1)  # ∂x₀/∂x_m, row by row
        for m in range(self.M):
            h = x @ self.weight64[m].mT + (0.0 if self.bias64 is None else self.bias64[m])
            layer = float(torch.linalg.cond(self.weight64[m]))
            grown = grown @ torch.linalg.inv(self.weight64[m])
            x = h
            if self.family(m) is not None:
                a, c, _ = reference.unpack(self.family(m))
                layer *= float(torch.as_tensor((a + c) / a).max())
                grown = grown / reference.leaky_softplus_derivative(h, self.family(m)).unsqueeze(1)
                x = reference.leaky_softplus(h, self.family(m))
            # The Frobenius norm over √D: how much an error of no preferred direction grows.
            size = torch.linalg.matrix_norm(grown) / math.sqrt(self.D) * (x.norm(dim=1) + h.norm(dim=1))
            kappa += layer * float(size.norm() / self.x64.norm())
        return kappa if len(self.x64) else 1.0


@st.composite
def cases(draw: Any, floats: list[tuple[float, ...]], widths: st.SearchStrategy[int]) -> Case:
    N = draw(st.one_of(st.integers(0, 20), st.integers(0, 20), st.integers(0, 140)))
    M = draw(st.sampled_from([1, 2, 3, 4]))
    kind = draw(st.sampled_from(["floats", "per layer", "per column"]))
    flags = draw(st.tuples(st.booleans(), st.booleans()))
    return Case(N, M, draw(widths), kind, draw(st.sampled_from(floats)), *flags)


def widths(name: str, precision: str) -> list[int]:
    """Every D that goes in one launch."""
    return [D for D in range(1, 130) if tiles.stack_tile(name, D, torch.float32, precision, 90) is not None]


def some_width(name: str, precision: str) -> st.SearchStrategy[int]:
    admitted = widths(name, precision)
    return st.one_of(st.sampled_from(admitted[:40]), st.sampled_from(admitted))


# --- forward --------------------------------------------------------------------------------------------


def check_forward(case: Case, precision: str, *, logabsdet: bool, constant: bool) -> None:
    with guarded():
        y, total = stack_forward(
            *(case.x, case.weight, case.bias, case.slopes),
            constant=case.constant if constant else None,
            logabsdet=logabsdet,
            precision=precision,
            activate_last=case.last,
        )
    assert normwise(y, case.y64.detach()) <= LIMIT
    assert (total is not None) == logabsdet
    if total is not None:
        expected = case.logabsdet64.detach()
        if not constant:
            expected = expected - sum(reference.lu_logabsdet(m) for m in case.lu64.detach())
        assert float((total - expected).norm()) <= LIMIT * (float(expected.norm()) + 1e-2 * len(expected))


@settings(max_examples=20)
@given(st.data())
def test_forward(data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(PRECISIONS))
    case = data.draw(cases(FAMILIES, some_width("forward", precision)))
    check_forward(case, precision, logabsdet=data.draw(st.booleans()), constant=data.draw(st.booleans()))


@pytest.mark.parametrize(("N", "M", "D"), CORNERS)
def test_forward_corners(N: int, M: int, D: int) -> None:
    case = Case(N, M, D, "per column", FAMILIES[(N + D) % len(FAMILIES)], True, D % 2 == 0)
    check_forward(case, "tf32x3", logabsdet=True, constant=True)


# --- inverse --------------------------------------------------------------------------------------------


def check_inverse(case: Case, precision: str, *, logabsdet: bool, junk: bool) -> None:
    blocks = case.blocks("inverse", precision)
    limit = LIMIT * case.condition()
    assert limit < 0.1  # a bound that something wrong would break
    lu = case.lu.clone()
    if junk:  # what is on a diagonal block is in its inverse
        size = blocks.shape[-1]
        for start in range(0, case.D, size):
            lu[:, start : start + size, start : start + size] = math.nan
    x64, logabsdet64 = case.inverse(case.y.double())
    with guarded():
        x, total = stack_inverse(
            *(case.y, amid_nan(lu), blocks, case.bias, case.slopes),
            constant=case.constant,
            logabsdet=logabsdet,
            precision=precision,
            activate_last=case.last,
        )
    assert normwise(x, x64.detach()) <= limit
    assert (total is not None) == logabsdet
    if total is not None:
        expected = logabsdet64.detach()
        assert float((total - expected).norm()) <= limit * (float(expected.norm()) + 1e-2 * len(expected))


@settings(max_examples=14)
@given(st.data())
def test_inverse(data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(["ieee", "tf32x3"]))
    case = data.draw(cases(MILD, some_width("inverse", precision)))
    check_inverse(case, precision, logabsdet=data.draw(st.booleans()), junk=data.draw(st.booleans()))


@pytest.mark.parametrize(("N", "M", "D"), CORNERS)
def test_inverse_corners(N: int, M: int, D: int) -> None:
    floats = FAMILIES[(N + D) % len(FAMILIES)] if M == 1 else MILD[D % 3]
    case = Case(N, M, D, "per layer", floats, True, D % 2 == 0)
    check_inverse(case, "tf32x3", logabsdet=True, junk=True)


# --- backward -------------------------------------------------------------------------------------------


def check_gradients(
    case: Case, precision: str, *, inverse: bool, logabsdet: bool, needs_weights: bool
) -> None:
    N = len(case.x)
    grad, grad_logabsdet = torch.randn(N, case.D), torch.randn(N) if logabsdet else None
    given64 = case.y.double().requires_grad_() if inverse else case.x64
    out, total = case.inverse(given64) if inverse else (case.y64, case.logabsdet64)
    loss = (out * grad).sum() + (0.0 if grad_logabsdet is None else (total * grad_logabsdet).sum())
    expected = torch.autograd.grad(
        loss, [given64, *case.parameters()], retain_graph=True, materialize_grads=True
    )
    limit = LIMIT
    arguments: tuple[Any, ...] = (amid_nan(grad), amid_nan(grad_logabsdet))
    options = {"precision": precision, "needs_weights": needs_weights, "activate_last": case.last}
    with guarded(), programs(2):
        if inverse:
            limit *= case.condition()
            assert limit < 0.1
            factors = (case.lu, case.blocks("inverse backward", precision))
            x = amid_nan(out.detach().float())
            found = stack_inverse_backward(
                *arguments, x, case.weight, *factors, case.bias, case.slopes, **options
            )
        else:
            found = stack_backward(
                *arguments, case.x, case.weight, case.bias, case.slopes, needs_x=True, **options
            )
    rows, weights, biases, slopes = found
    assert rows is not None
    assert normwise(rows, expected[0]) <= limit
    rest = list(expected[1:])
    for result, wanted, there in (
        (weights, needs_weights, True),
        (biases, needs_weights and case.bias is not None, case.bias is not None),
        (slopes, case.learnt, case.learnt),
    ):
        right = rest.pop(0) if there else None
        assert (result is not None) == wanted
        if result is not None and right is not None:
            assert result.shape == right.shape
            assert result.dtype == torch.float32
            # A sum over the rows of terms that may cancel: an error in proportion to a row's.
            scale = float(right.norm()) + 1e-2 * math.sqrt(N * right.numel())
            assert float((result - right).norm()) <= limit * scale


@settings(max_examples=10)
@given(st.data())
def test_backward(data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(PRECISIONS))
    case = data.draw(cases(FAMILIES, some_width("backward", precision)))
    flags = [data.draw(st.booleans()) for _ in range(2)]
    check_gradients(case, precision, inverse=False, logabsdet=flags[0], needs_weights=flags[1])


@settings(max_examples=8)
@given(st.data())
def test_inverse_backward(data: st.DataObject) -> None:
    precision = data.draw(st.sampled_from(["ieee", "tf32x3"]))
    case = data.draw(cases(MILD, some_width("inverse backward", precision)))
    flags = [data.draw(st.booleans()) for _ in range(2)]
    check_gradients(case, precision, inverse=True, logabsdet=flags[0], needs_weights=flags[1])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("N", "M", "D"), [*CORNERS, (300, 2, 5)])
def test_gradient_corners(N: int, M: int, D: int, inverse: bool) -> None:
    floats = FAMILIES[(N + D) % len(FAMILIES)] if M == 1 else MILD[D % 3]
    case = Case(N, M, D, "per layer" if N % 2 else "per column", floats, True, D % 2 == 0)
    check_gradients(case, "tf32x3", inverse=inverse, logabsdet=True, needs_weights=True)


def test_gradient_without_rows() -> None:
    case = Case(9, 2, 5, "floats", FAMILIES[0], True, False)
    arguments = (torch.randn(9, 5), None, case.x, case.weight, case.bias, case.slopes)
    options = {"needs_weights": True, "precision": "ieee"}
    rows, *without = stack_backward(*arguments, needs_x=False, **options)
    _, *full = stack_backward(*arguments, needs_x=True, **options)
    assert rows is None
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(without, full, strict=True))


# --- what must not happen -------------------------------------------------------------------------------


def outcomes(case: Case, x: Tensor) -> list[Tensor]:
    """What all four launchers give for rows x, and x as gradients."""
    blocks, inverse_blocks = (case.blocks(name, "tf32x3") for name in ("inverse", "inverse backward"))
    ends = {"constant": case.constant, "logabsdet": True, "precision": "tf32x3", "activate_last": case.last}
    back = {"needs_weights": True, "precision": "tf32x3", "activate_last": case.last}
    grads = (x, x[:, 0].contiguous(), x)
    with guarded(), programs(2):
        return [
            *stack_forward(x, case.weight, case.bias, case.slopes, **ends),
            *stack_inverse(x, case.lu, blocks, case.bias, case.slopes, **ends),
            *stack_backward(*grads, case.weight, case.bias, case.slopes, needs_x=True, **back),
            *stack_inverse_backward(
                *grads, case.weight, case.lu, inverse_blocks, case.bias, case.slopes, **back
            ),
        ]


#: Which of these are rows.
ROWWISE = (0, 1, 2, 3, 4, 8)


def test_same_bits_twice() -> None:
    case = Case(140, 2, 17, "per column", FAMILIES[0], True, False)
    for first, second in zip(outcomes(case, case.x), outcomes(case, case.x), strict=True):
        assert torch.equal(first, second)


def test_a_row_does_not_depend_on_the_batch() -> None:
    case = Case(80, 2, 20, "per layer", FAMILIES[0], True, True)
    # From a tile's first row on: the interpreter's products come from a BLAS to which a row's place matters.
    whole, part = outcomes(case, case.x), outcomes(case, amid_nan(case.x[64:74]))
    for i in ROWWISE:
        assert torch.equal(whole[i][64:74], part[i])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_a_row_keeps_its_nan_to_itself(junk: float) -> None:
    case = Case(20, 2, 33, "floats", FAMILIES[0], True, False)
    x = case.x.clone()
    x[17, 5] = junk
    clean, dirty = outcomes(case, case.x), outcomes(case, amid_nan(x))
    others = torch.arange(20) != 17
    for i in ROWWISE:
        assert torch.equal(clean[i][others], dirty[i][others])
        assert dirty[i][17].isnan().any() or junk == math.inf


@pytest.mark.parametrize("M", [1, 3])
def test_no_rows(M: int) -> None:
    case = Case(0, M, 5, "per layer", FAMILIES[0], True, False)
    for result in outcomes(case, case.x):
        assert 0 in result.shape or not result.any()


@pytest.mark.parametrize(("N", "M", "D"), [(5, 2, 7), (20, 4, 33)])
def test_bfloat16(N: int, M: int, D: int) -> None:
    """Rows and weights in bfloat16: against float64 of the same rounded inputs."""
    case = Case(N, M, D, "per layer", MILD[0], True, False)
    with torch.no_grad():
        case.weight64.copy_(case.weight.bfloat16().double())
    case.x64 = case.x.bfloat16().double().requires_grad_()
    case.y64, case.logabsdet64 = case.forward(case.x64)
    x, weight, y = (amid_nan(t.bfloat16()) for t in (case.x, case.weight, case.y64.detach()))
    ends = {"constant": case.constant, "logabsdet": True}
    with guarded(), programs(2):
        result, total = stack_forward(x, weight, case.bias, case.slopes, precision="tf32", **ends)
        assert result.dtype == torch.bfloat16
        # 8 bits an operand and layer, and the interpreter cuts where a GPU rounds.
        assert normwise(result, case.y64.detach()) <= 1e-2 * M
        assert normwise(total, case.logabsdet64.detach()) <= 1e-2 * M

        grad = amid_nan(torch.randn(N, D).bfloat16())
        loss = (case.y64 * grad.double()).sum() + case.logabsdet64.sum()
        expected = torch.autograd.grad(loss, [case.x64, *case.parameters()])
        found = stack_backward(
            *(grad, amid_nan(torch.ones(N)), x, weight, case.bias, case.slopes),
            needs_x=True,
            needs_weights=True,
            precision="tf32",
        )
        assert found[0].dtype == torch.bfloat16
        for got, right in zip(found, expected, strict=True):
            assert normwise(got, right) <= 1e-2 * M

        # The inverse is computed in float32: only its ends are rounded.
        lu = amid_nan(case.lu.bfloat16())
        blocks, _ = invert_blocks(lu, case.sign, block=case.blocks("inverse", "tf32x3").shape[-1])
        with torch.no_grad():
            for m in range(M):
                case.weight64[m] = reference.lu_weight(lu[m].double(), case.sign[m].double())
        x64, _ = case.inverse(y.double())
        result, _ = stack_inverse(y, lu, blocks, case.bias, case.slopes, precision="tf32x3", **ends)
        assert result.dtype == torch.bfloat16
        assert normwise(result, x64.detach()) <= 8e-3


def test_refusals() -> None:
    case = Case(4, 3, 6, "per layer", FAMILIES[0], True, False)
    blocks = case.blocks("inverse", "tf32x3")
    wide = torch.zeros(2, 4096)
    ends = {"constant": None, "logabsdet": False}

    def forward(x: Any = case.x, weights: Any = case.weight, slopes: Any = case.slopes, **other: Any) -> Any:
        options = {**ends, "precision": "ieee", **other}
        return stack_forward(x, weights, case.bias, slopes, **options)

    with pytest.raises(ValueError, match="rows"):
        forward(x=case.x.double())
    with pytest.raises(ValueError, match="rows"):
        forward(x=torch.zeros(6, 4).mT)
    with pytest.raises(ValueError, match="weights"):
        forward(weights=case.weight[:, :5].contiguous())
    with pytest.raises(ValueError, match="weights"):
        forward(weights=case.weight.bfloat16())
    with pytest.raises(ValueError, match="slopes"):
        forward(slopes=torch.ones(3, 3))
    with pytest.raises(ValueError, match="constant"):
        forward(constant=torch.zeros(1))
    with pytest.raises(ValueError, match="precision"):
        forward(precision="fp8")
    with pytest.raises(ValueError, match="layer by layer"):
        stack_forward(wide, torch.zeros(1, 4096, 4096), None, FAMILIES[0], precision="ieee", **ends)
    with pytest.raises(ValueError, match="tf32"):
        stack_inverse(case.x, case.lu, blocks, None, case.slopes, precision="tf32", **ends)
    with pytest.raises(ValueError, match="blocks"):
        stack_inverse(case.x, case.lu, blocks[:, :1], None, case.slopes, precision="ieee", **ends)
    with pytest.raises(ValueError, match="gradient"):
        stack_backward(
            *(case.x[:2].contiguous(), None, case.x, case.weight, case.bias, case.slopes),
            needs_x=True,
            needs_weights=True,
            precision="ieee",
        )
