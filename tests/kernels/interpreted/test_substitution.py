"""The layer's inverse by blocked substitution and by W⁻¹, and its gradients, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness import (
    FAMILIES,
    FEATURES,
    LIMIT,
    ROWS,
    amid_nan,
    guarded,
    normwise,
    random_lu,
    slope_ratio,
    slopes,
)
from lunet_fast.kernels import tiles
from lunet_fast.kernels.inverse import PreparedInverse, inverse_weight, layer_inverse, prepare_inverse
from lunet_fast.kernels.inverse_gradient import layer_inverse_backward
from lunet_fast.kernels.solve import EXPLICIT_INVERSE_LIMIT, invert_blocks
from lunet_fast.ops import reference
from lunet_fast.ops.cpu.matrix import Packed, compose_backward
from lunet_fast.ops.values import Matrix

PRECISIONS = ["ieee", "tf32x3"]


def stacked(function: Any, *arguments: Any) -> Tensor:
    """``function`` of each member's matrix arguments, stacked; None stays None."""
    K = len(arguments[0])
    return torch.stack([function(*(None if a is None else a[k] for a in arguments)) for k in range(K)])


def exact_blocks(lu: Tensor, sign: Tensor | None, block: int = 0) -> Tensor:
    """Float64's inverses of the diagonal blocks of L and U, rounded, as ``invert_blocks`` lays them out."""
    K, D = lu.shape[:2]
    block = block or tiles.substitution_block(D)
    count = -(-D // block)
    blocks = torch.eye(block, dtype=torch.float64).repeat(K, 2, count, 1, 1)
    for k in range(K):
        for factor, matrix in enumerate(reference.factors(lu[k].double(), None if sign is None else sign[k])):
            for j in range(count):
                part = slice(j * block, min((j + 1) * block, D))
                width = part.stop - part.start
                blocks[k, factor, j, :width, :width] = torch.linalg.inv(matrix[part, part])
    return blocks.float()


class Case:
    """A layer's arguments amid NaN, and what float64 says of its inverse."""

    def __init__(
        self,
        K: int,
        N: int,
        D: int,
        kind: tuple[Any, Any] = (None, None),
        *,
        permuted: bool = False,
        signed: bool = True,
        has_bias: bool = True,
        spread: float = 0.5,
        dtype: torch.dtype = torch.float32,
        lu: Tensor | None = None,
    ) -> None:
        self.slopes, self.exact = kind
        self.shape = (K, N, D)
        lu = random_lu(D, spread, K) if lu is None else lu
        y = torch.randn(K, N, D).to(dtype)
        bias = torch.randn(K, D) if has_bias else None
        sign = torch.where(torch.rand(K, D) < 0.5, -1.0, 1.0) if signed else None
        self.permutation = torch.randperm(D) if permuted and K == 1 else None
        self.y, self.lu, self.bias, self.sign = amid_nan(y), amid_nan(lu), amid_nan(bias), amid_nan(sign)

        exact_sign = None if sign is None else sign.double()
        self.W = stacked(lambda m, s: reference.lu_weight(m, s, self.permutation), lu.double(), exact_sign)
        self.kappa = float(torch.linalg.cond(self.W).max()) * slope_ratio(self.exact)
        self.h = (
            y.double() if self.exact is None else reference.leaky_softplus_inverse(y.double(), self.exact)
        )
        self.x = stacked(
            lambda h, m, b, s: reference.affine_inverse(h, Matrix(m, s, self.permutation, b)),
            self.h,
            lu.double(),
            None if bias is None else bias.double(),
            exact_sign,
        )
        self.constant = stacked(reference.lu_logabsdet, lu.double())
        self.logabsdet = -self.constant[:, None].expand(K, N)
        if self.exact is not None:
            self.logabsdet = self.logabsdet - reference.log_derivative_sum(self.h, self.exact)

    def prepare(self, *, explicit: bool = False, kernel: bool = False) -> PreparedInverse:
        """What the inverse needs; the blocks' inverses are PyTorch's unless the kernel's are asked for."""
        inverses, logabsdet = exact_blocks(self.lu, self.sign), reference.log_diagonal(self.lu).sum(-1)
        weight = condition = None
        with guarded():
            if kernel:
                block = tiles.substitution_block(self.shape[-1])
                inverses, logabsdet = invert_blocks(self.lu, self.sign, block=block)
            if explicit:
                weight, condition = inverse_weight(
                    *(self.lu, self.sign, self.permutation, amid_nan(inverses)), precision="tf32x3"
                )
        return PreparedInverse(amid_nan(inverses), amid_nan(logabsdet), amid_nan(weight), amid_nan(condition))

    def invert(
        self,
        prepared: PreparedInverse,
        *,
        y: Tensor | None = None,
        logabsdet: bool = True,
        save: bool = True,
        precision: str = "ieee",
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with guarded():
            return layer_inverse(
                *(self.y if y is None else y, self.lu, prepared.inverses, self.bias, self.slopes),
                permutation=self.permutation,
                logabsdet=logabsdet,
                save=save,
                precision=precision,
                constant=prepared.logabsdet,
                weight=prepared.weight,
                condition=prepared.condition,
            )

    def gradients(
        self, grad_x: Tensor, grad_logabsdet: Tensor | None, precision: str = "ieee"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        h = None if self.exact is None else amid_nan(self.h.to(grad_x.dtype))
        with guarded():
            return layer_inverse_backward(
                *(
                    amid_nan(grad_x),
                    amid_nan(grad_logabsdet),
                    h,
                    self.lu,
                    self.prepare().inverses,
                    self.slopes,
                ),
                permutation=self.permutation,
                precision=precision,
            )


def check_inverse(case: Case, *, logabsdet: bool, save: bool, precision: str, explicit: bool) -> None:
    prepared = case.prepare(explicit=explicit)
    x, total, h = case.invert(prepared, logabsdet=logabsdet, save=save, precision=precision)
    assert normwise(x, case.x) <= LIMIT * case.kappa
    assert (total is not None) == logabsdet
    assert (h is not None) == (save and case.exact is not None)
    if total is not None:
        assert normwise(total, case.logabsdet) <= LIMIT * slope_ratio(case.exact)
    if h is not None:
        assert normwise(h, case.h) <= LIMIT * slope_ratio(case.exact)


def check_gradients(case: Case, *, with_logabsdet: bool, precision: str) -> None:
    K, N, D = case.shape
    grad_x, grad_logabsdet = torch.randn(K, N, D), torch.randn(K, N) if with_logabsdet else None
    grad_right, grad_y, grad_slopes = case.gradients(grad_x, grad_logabsdet, precision)

    right = torch.linalg.solve(case.W.mT, grad_x.double().mT).mT
    assert normwise(grad_right, right) <= LIMIT * case.kappa
    if case.exact is None:
        assert grad_y is grad_right
        assert grad_slopes is None
        return
    learnt = isinstance(case.slopes, Tensor)
    exact = case.exact.clone().requires_grad_() if learnt else case.exact
    y = case.y.double().requires_grad_()
    h, total = reference.leaky_softplus_inverse_and_logabsdet(y, exact)
    scalar = (h * right).sum()
    if grad_logabsdet is not None:
        scalar = scalar + (total * grad_logabsdet.double()).sum()
    by_y, *by_slopes = torch.autograd.grad(scalar, [y, exact] if learnt else [y])
    assert normwise(grad_y, by_y) <= LIMIT * case.kappa
    assert (grad_slopes is not None) == learnt
    if learnt:
        assert grad_slopes is not None
        assert grad_slopes.shape == case.slopes.shape
        assert normwise(grad_slopes, by_slopes[0]) <= LIMIT * case.kappa * math.sqrt(max(N, 1))


@st.composite
def cases(draw: Any, rows: Any = ROWS, features: Any = FEATURES) -> Case:
    K, D = draw(st.sampled_from([1, 1, 2, 3])), draw(features)
    # Long rows take the interpreter longest: there one program of one member does.
    N = draw(rows) if D <= 64 else draw(rows) % 64
    K = K if D <= 64 else 1
    flags = {name: draw(st.booleans()) for name in ("permuted", "signed", "has_bias")}
    return Case(K, N, D, draw(slopes(D)), **flags)


# --- the blocks and W⁻¹ ---------------------------------------------------------------------------------


@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([16, 32]), st.booleans())
def test_inverted_blocks(K: int, D: int, block: int, signed: bool) -> None:
    lu = random_lu(D, 2.0, K)
    sign = torch.where(torch.rand(K, D) < 0.5, -1.0, 1.0) if signed else None
    with guarded():
        inverses, logabsdet = invert_blocks(amid_nan(lu), amid_nan(sign), block=block)
    assert normwise(logabsdet, reference.log_diagonal(lu).double().sum(-1)) <= LIMIT
    exact = exact_blocks(lu, sign, block).double()
    assert inverses.shape == exact.shape
    for found, one in zip(inverses.flatten(0, 2), exact.flatten(0, 2), strict=True):
        assert normwise(found, one) <= LIMIT * torch.linalg.cond(one).item()


def test_log_diagonal_is_clamped() -> None:
    lu = torch.zeros(1, 3, 3)
    lu[0].diagonal().copy_(torch.tensor([100.0, -100.0, 1.0]))
    inverses, logabsdet = invert_blocks(lu, None, block=16)
    exact = torch.tensor([-80.0, 80.0, -1.0]).double().exp()
    assert bool(((inverses[0, 1, 0].diagonal()[:3].double() / exact - 1.0).abs() < 1e-6).all())
    assert logabsdet.item() == 1.0


@pytest.mark.parametrize(
    ("K", "D", "permuted"), [(1, 1, False), (2, 33, False), (1, 70, True), (1, 130, True)]
)
def test_inverse_weight(K: int, D: int, permuted: bool) -> None:
    case = Case(K, 1, D, permuted=permuted)
    prepared = case.prepare(explicit=True)
    assert prepared.weight is not None
    assert prepared.condition is not None
    assert normwise(prepared.weight, torch.linalg.inv(case.W)) <= LIMIT * case.kappa
    for k in range(K):
        lower, upper = reference.factors(case.lu[k].double(), case.sign[k].double())
        skeel = (torch.linalg.inv(lower @ upper).abs() @ lower.abs() @ upper.abs()).sum(-1).max()
        assert prepared.condition[k].item() == pytest.approx(skeel.item(), rel=1e-5)


def test_preparation_follows_the_table() -> None:
    sizes = [(8, None, False), (17, None, True), (17, 17, False), (17, 1 << 18, True), (130, 130, False)]
    for D, N, tried in [*sizes, (130, 131, True)]:
        prepared = prepare_inverse(random_lu(D, K=1), None, None, precision="tf32", N=N)
        assert (prepared.weight is not None) == (prepared.condition is not None) == tried


# --- the inverse ----------------------------------------------------------------------------------------


@given(cases(), st.booleans(), st.booleans(), st.sampled_from(PRECISIONS), st.booleans())
def test_inverse(case: Case, logabsdet: bool, save: bool, precision: str, explicit: bool) -> None:
    explicit = explicit and case.shape[-1] <= 130  # and the rows of W⁻¹ are many
    check_inverse(case, logabsdet=logabsdet, save=save, precision=precision, explicit=explicit)


#: One row, one column, whole blocks, one more than a block or than what registers hold, several programs.
CORNERS = [(1, 1, 1), (2, 65, 16), (1, 65, 17), (2, 3, 64), (1, 70, 65), (1, 1, 257)]


@pytest.mark.parametrize(("K", "N", "D"), CORNERS)
def test_corners(K: int, N: int, D: int) -> None:
    floats = FAMILIES[(N + D) % len(FAMILIES)]
    case = Case(K, N, D, (floats, floats), permuted=D % 2 == 1)
    check_inverse(case, logabsdet=True, save=True, precision="ieee", explicit=D in (16, 65))
    check_gradients(case, with_logabsdet=True, precision="tf32x3")


def test_many_features() -> None:
    case = Case(1, 2, 520, (FAMILIES[0], FAMILIES[0]), permuted=True)
    check_inverse(case, logabsdet=True, save=True, precision="tf32x3", explicit=False)


@pytest.mark.parametrize("kappa", [1e2, 1e5])
@pytest.mark.parametrize("D", [24, 70])
def test_badly_conditioned(kappa: float, D: int) -> None:
    """Diagonals graded over κ, and large entries beside them; the inverse does not fail before its bound."""
    lu = random_lu(D, 0.0, 1) * 0.5
    lu[0].diagonal().copy_(torch.linspace(0.0, -math.log(kappa), D)[torch.randperm(D)])
    upper = lu[0].triu(1) * lu[0].diagonal().exp()[:, None]
    lu[0].copy_(lu[0].tril() + upper)
    for explicit in (False, True):
        case = Case(1, 20, D, (FAMILIES[0], FAMILIES[0]), permuted=True, lu=lu)
        assert case.kappa > kappa
        check_inverse(case, logabsdet=True, save=True, precision="tf32x3", explicit=explicit)
    check_gradients(case, with_logabsdet=True, precision="tf32x3")


@pytest.mark.parametrize(("D", "explicit"), [(8, False), (60, False), (60, True)])
def test_round_trip(D: int, explicit: bool) -> None:
    case = Case(1, 30, D, (FAMILIES[0], FAMILIES[0]), permuted=True)
    x, total, _ = case.invert(case.prepare(explicit=explicit, kernel=True))
    y, back = reference.lu_dense_and_logabsdet(
        x[0].double(),
        case.lu[0].double(),
        case.bias[0].double(),
        sign=case.sign[0].double(),
        permutation=case.permutation,
        slopes=case.exact,
    )
    assert normwise(case.y[0], y) <= LIMIT * case.kappa
    assert total is not None
    assert normwise(total[0], -back) <= LIMIT * case.kappa


@pytest.mark.parametrize("activation", [False, True])
def test_bad_condition_falls_back_to_substitution(activation: bool) -> None:
    """Of two members the badly conditioned one gets substitution's bits, the other those of the product."""
    D = 40
    kind = (FAMILIES[0], FAMILIES[0]) if activation else (None, None)
    lu = random_lu(D, 0.1, 3) * 0.3
    lu[1].diagonal()[10] = -9.0
    case = Case(3, 5, D, kind, lu=lu)
    by_product = case.prepare(explicit=True)
    assert by_product.condition is not None
    within = by_product.condition <= EXPLICIT_INVERSE_LIMIT.value
    assert within.tolist() == [True, False, True]
    substituted = case.invert(case.prepare())
    chosen = case.invert(by_product)
    for one, other in zip(substituted, chosen, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one[1], other[1])
    assert not torch.equal(substituted[0][0], chosen[0][0])
    assert normwise(chosen[0][::2], case.x[::2]) <= LIMIT * case.kappa
    # A condition that is not a number is none to trust.
    unknown = by_product._replace(condition=torch.full((3,), math.nan))
    assert all(
        one is None or torch.equal(one, other)
        for one, other in zip(substituted, case.invert(unknown), strict=True)
    )


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the choice of the path nor the slopes' steps read a value: graphs can record the launches."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor's value was read on the host")

    lu, y, learnt = random_lu(130, K=1), torch.randn(1, 3, 130), torch.tensor([0.1, 0.9, 1.0])
    launches = []
    for module_kernel in (
        "solve.layer_inv_kernel",
        "inverse.inverse_product_kernel",
        "inverse.inverse_weight_kernel",
    ):
        recorder = _Recorder(module_kernel.rpartition(".")[2], launches)
        monkeypatch.setattr(f"lunet_fast.kernels.{module_kernel}", recorder)
    for method in ("item", "__bool__", "__float__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, method, refuse)
    prepared = prepare_inverse(lu, None, None, precision="tf32x3")
    layer_inverse(
        *(y, lu, prepared.inverses, None, learnt),
        permutation=None,
        logabsdet=True,
        save=False,
        precision="tf32x3",
        weight=prepared.weight,
        condition=prepared.condition,
    )
    assert launches == ["inverse_weight_kernel", "inverse_product_kernel", "layer_inv_kernel"]


class _Recorder:
    """Stands in for a kernel: the interpreter itself reads values."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: self.launches.append(self.name)


@pytest.mark.parametrize(("D", "explicit"), [(30, False), (60, False), (60, True)])
def test_bfloat16(D: int, explicit: bool) -> None:
    """In and out in bfloat16, float32 between: against float64 of the same rounded inputs."""
    lu = random_lu(D, K=1).bfloat16()
    case = Case(1, 20, D, (FAMILIES[0], FAMILIES[0]), permuted=True, dtype=torch.bfloat16, lu=lu)
    x, total, h = case.invert(case.prepare(explicit=explicit))
    assert h is not None
    assert total is not None
    assert (x.dtype, h.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    # 8 bits, and the interpreter cuts where a GPU rounds.
    assert normwise(x, case.x) <= 8e-3
    assert normwise(h, case.h) <= 8e-3
    # The sum leaves in float32, so it must not have passed through bfloat16.
    assert normwise(total, case.logabsdet) <= LIMIT * slope_ratio(case.exact)
    grad_x = torch.randn(1, 20, D).bfloat16()
    grad_right, grad_y, _ = case.gradients(grad_x, torch.randn(1, 20))
    assert (grad_right.dtype, grad_y.dtype) == (torch.bfloat16, torch.bfloat16)
    assert normwise(grad_right, torch.linalg.solve(case.W.mT, grad_x.double().mT).mT) <= 8e-3


# --- the gradients --------------------------------------------------------------------------------------


@given(cases(), st.booleans(), st.sampled_from(PRECISIONS))
def test_gradients(case: Case, with_logabsdet: bool, precision: str) -> None:
    check_gradients(case, with_logabsdet=with_logabsdet, precision=precision)


def test_the_matrix_gradient_follows() -> None:
    """−g_rᵀ x is the gradient of W, by which ``ops.cpu`` and autograd agree on that of lu."""
    case = Case(1, 12, 20, (FAMILIES[0], FAMILIES[0]), signed=False, has_bias=False)
    grad_x = torch.randn(1, 12, 20)
    grad_right, _, _ = case.gradients(grad_x, None)
    lu = case.lu[0].double().requires_grad_()
    x = reference.lu_dense_inverse(case.y[0].double(), lu, slopes=case.exact)
    (exact,) = torch.autograd.grad((x * grad_x[0].double()).sum(), lu)
    packed = Packed.of(Matrix(case.lu[0].double()))
    grad_lu = compose_backward(-grad_right[0].double().T @ case.x[0], packed)
    grad_lu.diagonal().mul_(packed.diagonal)
    assert normwise(grad_lu, exact) <= LIMIT * case.kappa


# --- of both --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [20, 50, 80])
def test_only_blocks_beside_the_diagonal_are_read(D: int) -> None:
    """NaN in the diagonal blocks of lu, whose inverses are given, changes nothing."""
    case = Case(1, 6, D, (FAMILIES[0], FAMILIES[0]), permuted=True)
    prepared, grad_x = case.prepare(), torch.randn(1, 6, D)
    block = tiles.substitution_block(D)
    hollow = case.lu.clone()
    for start in range(0, D, block):
        hollow[:, start : start + block, start : start + block] = math.nan
    plain = case.invert(prepared)[0], case.gradients(grad_x, None)[0]
    inverses = case.prepare().inverses
    case.lu = hollow
    case.prepare = lambda **_: prepared._replace(inverses=inverses)  # type: ignore[method-assign]
    assert torch.equal(case.invert(prepared)[0], plain[0])
    assert torch.equal(case.gradients(grad_x, None)[0], plain[1])


def test_only_the_wanted_path_reads() -> None:
    """Within the limit substitution reads nothing, and beyond it the product does not."""
    case = Case(1, 6, 40, (FAMILIES[0], FAMILIES[0]))
    prepared = case.prepare(explicit=True)
    substituted, multiplied = case.invert(case.prepare()), case.invert(prepared)
    assert prepared.weight is not None
    limit = torch.tensor([EXPLICIT_INVERSE_LIMIT.value])
    refused = prepared._replace(
        weight=torch.full_like(prepared.weight, math.nan),
        condition=torch.nextafter(limit, 2 * limit),
    )
    assert torch.equal(case.invert(refused)[0], substituted[0])
    prepared = prepared._replace(condition=limit)
    case.lu = torch.full_like(case.lu, math.nan)
    assert torch.equal(case.invert(prepared)[0], multiplied[0])


@pytest.mark.parametrize(("N", "D"), [(70, 20), (65, 66)])
def test_rows_keep_to_themselves_and_bits_repeat(N: int, D: int) -> None:
    slopes_tensor = torch.tensor(FAMILIES[1])
    case = Case(2, N, D, (slopes_tensor, slopes_tensor.double()))
    prepared = case.prepare(explicit=D > 64)
    grad = torch.randn(2, N, D)

    def outcome(rows: slice, y: Tensor, grad_x: Tensor) -> list[Tensor]:
        part = case.invert(prepared, y=y[:, rows].contiguous())
        case_rows = layer_inverse_backward(
            *(grad_x[:, rows].contiguous(), None, part[2], case.lu, prepared.inverses, case.slopes),
            permutation=None,
            precision="ieee",
        )
        return [*(p for p in part if p is not None), *case_rows[:2]]

    everything = slice(0, N)
    whole = outcome(everything, case.y, grad)
    assert len(whole) == 5
    assert all(torch.equal(p, q) for p, q in zip(whole, outcome(everything, case.y, grad), strict=True))
    # A row's result does not depend on the batch.
    few = slice(0, 5)
    for p, q in zip(whole, outcome(few, case.y, grad), strict=True):
        assert torch.equal(p[:, few], q)
    y, grad_x = case.y.clone(), grad.clone()
    y[1, 3, D // 2] = grad_x[1, 3, D // 2] = math.nan
    others = torch.ones(2, N, dtype=torch.bool)
    others[1, 3] = False
    for before, after in zip(whole, outcome(everything, y, grad_x), strict=True):
        assert bool(after[1, 3].isnan().any())
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(("K", "D"), [(0, 1), (0, 130), (1, 1), (2, 33)])
def test_empty(K: int, D: int) -> None:
    N = 3 if K == 0 else 0
    lu, y, learnt = torch.zeros(K, D, D), torch.zeros(K, N, D), torch.ones(3)
    prepared = prepare_inverse(lu, None, None, precision="ieee")
    x, total, h = layer_inverse(
        *(y, lu, prepared.inverses, None, learnt),
        permutation=None,
        logabsdet=True,
        save=True,
        precision="ieee",
        weight=prepared.weight,
        condition=prepared.condition,
    )
    assert h is not None
    assert total is not None
    assert (x.shape, total.shape, h.shape) == ((K, N, D), (K, N), (K, N, D))
    gradients = layer_inverse_backward(
        *(y, None, h, lu, prepared.inverses, learnt), permutation=None, precision="ieee"
    )
    assert [tuple(g.shape) for g in gradients if g is not None] == [(K, N, D), (K, N, D), (3,)]
    assert gradients[2] is not None
    assert gradients[2].tolist() == [0.0, 0.0, 0.0]


x8 = torch.randn(2, 8, 8)
inverses8 = torch.zeros(2, 2, 1, 16, 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": x8.mT}, "y must be contiguous rows"),
        ({"y": x8.double()}, "float32 or bfloat16"),
        ({"lu": x8.mT}, "lu must be contiguous"),
        ({"lu": x8[:1]}, "lu must be contiguous"),
        ({"lu": x8.double()}, "lu must be float32 or bfloat16"),
        ({"inverses": inverses8[..., :8]}, "inverses must be contiguous"),
        ({"inverses": inverses8.double()}, "inverses must be torch.float32"),
        ({"bias": torch.zeros(8)}, "bias must be contiguous"),
        ({"constant": torch.zeros(())}, "constant must be contiguous"),
        ({"permutation": torch.arange(8)}, "permutation must be None for stacked"),
        ({"weight": x8}, "must be given together"),
        ({"slopes": torch.ones(3, 7)}, "slopes must be contiguous"),
        ({"slopes": (0.1, 0.9, 1.0), "steps": 0}, "steps must be at least 1"),
        ({"precision": "high"}, "precision must be one of"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "y": x8,
        "lu": x8,
        "inverses": inverses8,
        "bias": None,
        "slopes": None,
        "permutation": None,
        "precision": "ieee",
    }
    with pytest.raises(ValueError, match=message):
        layer_inverse(**(arguments | changed), logabsdet=False, save=False)


def test_backward_refuses_h_without_slopes() -> None:
    with pytest.raises(ValueError, match="h and slopes must be given together"):
        layer_inverse_backward(x8, None, x8, x8, inverses8, None, permutation=None, precision="ieee")


def test_block_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="block must be a power of two"):
        invert_blocks(x8, None, block=24)
