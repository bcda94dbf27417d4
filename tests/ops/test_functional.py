"""The stateless functions against explicit matrices, their derivatives, and the choice of backend."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lunet_fast
from lunet_fast import functional
from lunet_fast.ops import reference

NAMES = [
    "lu_dense",
    "lu_dense_and_logabsdet",
    "lu_dense_inverse",
    "lu_dense_inverse_and_logabsdet",
]
ACTIVATION_NAMES = [
    "leaky_softplus",
    "leaky_softplus_and_logabsdet",
    "leaky_softplus_inverse",
    "leaky_softplus_inverse_and_logabsdet",
]
IMPLEMENTATIONS = pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
FLOATS = (0.1, 0.9, 1.0)


def inputs(
    d: int, batch: tuple[int, ...], seed: int = 0, *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random legal arguments of a layer, every sign and the order of rows drawn."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return {
        "x": (2 * normal(*batch, d)).to(dtype),
        "lu": (0.5 * normal(d, d) / d**0.5).to(dtype),
        "bias": normal(d).to(dtype),
        "sign": (2 * torch.randint(0, 2, (d,), generator=rng) - 1).to(dtype),
        "permutation": torch.randperm(d, generator=rng),
    }


def slopes_variants(d: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(9)
    column = torch.rand(3, d, generator=rng, dtype=torch.float64) + 0.2
    return {
        "none": None,
        "floats": FLOATS,
        "tensor": torch.tensor([0.3, 0.7, 1.7], dtype=torch.float64),
        "per-feature": column,
    }


@pytest.fixture(autouse=True)
def backend_restored() -> Iterator[None]:
    before = lunet_fast.get_backend()
    yield
    lunet_fast.set_backend(before)


VARIANTS = ["none", "floats", "tensor", "per-feature"]


def expected(name: str, x: Tensor, layer: truth.Layer) -> tuple[Tensor, ...]:
    value, logabsdet = (truth.inverse if "inverse" in name else truth.forward)(x, layer)
    return (value, logabsdet) if name.endswith("logabsdet") else (value,)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def test_uninitialised_memory_is_poisoned() -> None:
    """The fixture that would show a read of memory nobody wrote is on."""
    x = torch.ones(3)
    for empty in (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,))):
        assert empty.isnan().all()


@pytest.mark.parametrize(
    "name",
    [*NAMES, *ACTIVATION_NAMES, "lu_weight", "lu_logabsdet"],
)
def test_the_reference_has_the_same_names_and_signatures(name: str) -> None:
    ours, plain = (inspect.signature(getattr(m, name)) for m in (functional, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in plain.parameters.values()
    ]


# ---- values


@IMPLEMENTATIONS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (64,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values(module: Any, name: str, batch: tuple[int, ...], variant: str) -> None:
    d = 6
    given_ = inputs(d, batch)
    x = given_.pop("x")
    slopes = slopes_variants(d)[variant]
    layer = truth.Layer(given_["lu"], given_["bias"], given_["sign"], given_["permutation"], slopes)
    found = as_tuple(getattr(module, name)(x, slopes=slopes, **given_))
    for value, true in zip(found, expected(name, x, layer), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-11, atol=1e-11)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without", ["bias", "sign", "permutation"])
def test_optional_arguments(module: Any, name: str, without: str) -> None:
    given_ = inputs(5, (7,)) | {without: None}
    x = given_.pop("x")
    layer = truth.Layer(slopes=FLOATS, **given_)
    positional = (x, given_.pop("lu"), given_.pop("bias"))
    found = as_tuple(getattr(module, name)(*positional, slopes=FLOATS, **given_))
    for value, true in zip(found, expected(name, x, layer), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-11, atol=1e-11)


@IMPLEMENTATIONS
@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_values(module: Any, name: str, variant: str) -> None:
    slopes = slopes_variants(6)[variant]
    x = 3 * torch.randn(2, 4, 6, dtype=torch.float64)
    if "inverse" in name:
        value = truth.phi_inverse(x, slopes)
        logabsdet = -torch.log(truth.phi_prime(value, slopes)).sum(-1)
    else:
        value = truth.phi(x, slopes)
        logabsdet = torch.log(truth.phi_prime(x, slopes)).sum(-1)
    true = (value, logabsdet) if name.endswith("logabsdet") else (value,)
    for found, exact in zip(as_tuple(getattr(module, name)(x, slopes)), true, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@IMPLEMENTATIONS
@pytest.mark.parametrize("kappa", [1.0, 0.3])
def test_softplus_is_not_cut_off_in_float64(module: Any, kappa: float) -> None:
    """F.softplus returns x beyond 20, which is off by 2e-9 there."""
    x = torch.linspace(19.5, 36.0, 34, dtype=torch.float64) / kappa
    for slopes in ((0.5, 0.5, kappa), torch.tensor([0.5, 0.5, kappa], dtype=torch.float64)):
        y = module.leaky_softplus(x, slopes)
        torch.testing.assert_close(y, truth.phi(x, slopes), rtol=4e-16, atol=0)
        torch.testing.assert_close(module.leaky_softplus_inverse(y, slopes), x, rtol=1e-15, atol=0)


@IMPLEMENTATIONS
@given(d=st.integers(1, 40), seed=st.integers(0, 1000), signed=st.booleans(), permuted=st.booleans())
def test_weight_and_its_logabsdet(module: Any, d: int, seed: int, signed: bool, permuted: bool) -> None:
    given_ = inputs(d, (1,), seed)
    sign = given_["sign"] if signed else None
    permutation = given_["permutation"] if permuted else None
    lu = given_["lu"].requires_grad_()
    weight = module.lu_weight(lu, sign, permutation)
    exact = truth.weight(lu, sign, permutation)
    torch.testing.assert_close(weight, exact, rtol=1e-13, atol=1e-14)
    logabsdet = module.lu_logabsdet(lu)
    assert logabsdet.shape == ()
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(exact)[1], rtol=1e-10, atol=1e-12)
    cotangent = torch.randn(d, d, dtype=torch.float64)
    (found,) = torch.autograd.grad((weight * cotangent).sum() + 3 * logabsdet, lu)
    (true,) = torch.autograd.grad((exact * cotangent).sum() + 3 * lu.diagonal().sum(), lu)
    torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)


@IMPLEMENTATIONS
def test_rows_are_permuted_in_the_direction_the_contract_says(module: Any) -> None:
    """(P A)[i] = A[permutation[i]] for a permutation that is not its own inverse."""
    permutation = torch.tensor([1, 2, 0])
    given_ = inputs(3, (4,))
    lower_upper = module.lu_weight(given_["lu"], given_["sign"])
    weight = module.lu_weight(given_["lu"], given_["sign"], permutation)
    torch.testing.assert_close(weight[permutation], lower_upper)
    assert not torch.allclose(weight, lower_upper[permutation])


# ---- gradients


def call_with(module: Any, name: str, variant: str, constants: dict[str, Tensor]) -> Any:
    """A function of (x, lu, bias[, slopes]) for gradcheck."""

    def function(x: Tensor, lu: Tensor, bias: Tensor, slopes: Tensor | None = None) -> Any:
        chosen = {"none": None, "floats": FLOATS}.get(variant, slopes)
        return getattr(module, name)(x, lu, bias, slopes=chosen, **constants)

    return function


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [(), (2,), (5,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, batch: tuple[int, ...], variant: str) -> None:
    """First and second derivatives by x, lu, bias and slopes, for batches below and above D."""
    d = 3
    given_ = inputs(d, batch, 5)
    arguments = [given_.pop(k).requires_grad_() for k in ("x", "lu", "bias")]
    slopes = slopes_variants(d)[variant]
    if isinstance(slopes, Tensor):
        arguments.append(slopes.requires_grad_())
    function = call_with(functional, name, variant, given_)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("variant", VARIANTS[2:])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activation_gradcheck(name: str, variant: str) -> None:
    slopes = slopes_variants(3)[variant].requires_grad_()
    x = (2 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(getattr(functional, name), (x, slopes))
    assert torch.autograd.gradgradcheck(getattr(functional, name), (x, slopes))


@pytest.mark.parametrize("name", NAMES)
@given(
    d=st.integers(1, 33),
    rows=st.sampled_from([1, 2, 7, 40, 130]),
    seed=st.integers(0, 1000),
    variant=st.sampled_from(VARIANTS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_gradients(name: str, d: int, rows: int, seed: int, variant: str, dtype: torch.dtype) -> None:
    """Gradients by x, lu, bias and slopes against float64 autograd through explicit L and U."""
    given_ = inputs(d, (rows,), seed, dtype=dtype)
    slopes = slopes_variants(d)[variant]
    leaves = [given_[k].requires_grad_() for k in ("x", "lu", "bias")]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_slopes = slopes
    if isinstance(slopes, Tensor):
        slopes = slopes.to(dtype).requires_grad_()
        leaves.append(slopes)
        exact_slopes = slopes.detach().double().requires_grad_()
        exact_leaves.append(exact_slopes)
    sign, permutation = given_["sign"], given_["permutation"]

    result = as_tuple(
        getattr(functional, name)(*leaves[:3], sign=sign, permutation=permutation, slopes=slopes)
    )
    layer = truth.Layer(exact_leaves[1], exact_leaves[2], sign.double(), permutation, exact_slopes)
    exact = expected(name, exact_leaves[0], layer)
    cotangents = [torch.randn(v.shape, dtype=torch.float64) for v in exact]
    found = torch.autograd.grad(
        result, leaves, [c.to(v.dtype) for c, v in zip(cotangents, result, strict=True)]
    )
    # A log-det without an activation does not depend on x or the bias.
    true = torch.autograd.grad(exact, exact_leaves, cotangents)

    # Normwise: rounding in W is magnified by its condition, in phi' by the ratio of slopes.
    singular = torch.linalg.svdvals(truth.weight(exact_leaves[1].detach(), sign.double(), permutation))
    condition = float(singular[0] / singular[-1])
    ratio = 1.0
    if exact_slopes is not None:
        a, c, _ = (torch.as_tensor(s).detach().double() for s in exact_slopes)
        ratio = float(((a + c) / a).max())
    tolerance = 60 * torch.finfo(dtype).eps * condition * ratio
    for f, t in zip(found, true, strict=True):
        assert f.dtype == dtype
        assert f.shape == t.shape
        assert (f.double() - t).norm() <= tolerance * (t.norm() + rows**0.5)


@pytest.mark.parametrize(
    ("variant", "wanted"),
    [(v, w) for v in ("none", "floats") for w in [(0,), (1,), (2,), (0, 2)]]
    + [("tensor", w) for w in [(0,), (1,), (2,), (3,), (0, 2), (1, 3)]],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_some_arguments_only(name: str, wanted: tuple[int, ...], variant: str) -> None:
    """Frozen arguments get no gradient, and freezing them does not change the others'."""
    given_ = inputs(4, (9,))
    values = [given_.pop(k) for k in ("x", "lu", "bias")] + [slopes_variants(4)["tensor"]]
    function = call_with(functional, name, variant, given_)
    all_leaves = [v.clone().requires_grad_() for v in values]
    cotangents = [torch.randn_like(v) for v in as_tuple(function(*values))]
    full = torch.autograd.grad(as_tuple(function(*all_leaves)), all_leaves, cotangents, allow_unused=True)
    some = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(values)]
    outputs = [v for v in as_tuple(function(*some)) if v.requires_grad]
    kept = [c for v, c in zip(as_tuple(function(*some)), cotangents, strict=True) if v.requires_grad]
    found = torch.autograd.grad(outputs, [some[i] for i in wanted], kept, allow_unused=True)
    for index, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, full[index])


@pytest.mark.parametrize("name", ["lu_dense_and_logabsdet", "lu_dense_inverse_and_logabsdet"])
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("variant", ["none", "tensor"])
def test_gradient_of_one_output_of_a_pair(name: str, used: int, variant: str) -> None:
    """The value without the log-det, and the log-det without the value."""
    given_ = inputs(4, (9,))
    arguments = [given_.pop(k).requires_grad_() for k in ("x", "lu", "bias")]
    slopes = slopes_variants(4)[variant]
    layer = truth.Layer(arguments[1], arguments[2], given_["sign"], given_["permutation"], slopes)
    result = getattr(functional, name)(*arguments, slopes=slopes, **given_)[used]
    exact = expected(name, arguments[0], layer)[used]
    cotangent = torch.randn_like(exact)
    found = torch.autograd.grad(result, arguments, cotangent, allow_unused=True, materialize_grads=True)
    true = torch.autograd.grad(exact, arguments, cotangent, allow_unused=True, materialize_grads=True)
    for f, t in zip(found, true, strict=True):
        torch.testing.assert_close(f, t, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_expanded_gradients(name: str) -> None:
    """A gradient from .sum() has stride 0; others arrive transposed or with gaps."""
    given_ = inputs(4, (10,))
    arguments = [given_.pop(k).requires_grad_() for k in ("x", "lu", "bias")]
    value = as_tuple(getattr(functional, name)(*arguments, slopes=FLOATS, **given_))[0]
    cotangents = [
        torch.ones(1, 1, dtype=torch.float64).expand(10, 4),
        torch.randn(4, 10, dtype=torch.float64).t(),
        torch.randn(10, 8, dtype=torch.float64)[:, ::2],
        torch.randn(10, dtype=torch.float64)[:, None].expand(10, 4),
    ]
    for cotangent in cotangents:
        found = torch.autograd.grad(value, arguments, cotangent, retain_graph=True)
        dense = torch.autograd.grad(value, arguments, cotangent.contiguous(), retain_graph=True)
        for f, d in zip(found, dense, strict=True):
            torch.testing.assert_close(f, d, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changed", ["x", "lu"])
def test_changing_what_backward_needs_is_an_error(name: str, changed: str) -> None:
    """As for nn.Linear: never a gradient of values that are no longer there."""
    given_ = inputs(4, (10,))
    arguments = {k: given_.pop(k).requires_grad_() for k in ("x", "lu", "bias")}
    # A clone is what can be changed in place; the leaf cannot.
    kept = {k: v.clone() for k, v in arguments.items()}
    before = [v.detach().clone() for v in arguments.values()]
    result = as_tuple(getattr(functional, name)(*kept.values(), slopes=FLOATS, **given_))
    kept[changed].detach().mul_(1.5)
    try:
        found = torch.autograd.grad(sum(v.sum() for v in result), list(arguments.values()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    # Not saved, so not needed: then the gradient is that of the old value.
    leaves = [v.requires_grad_() for v in before]
    again = as_tuple(getattr(functional, name)(*leaves, slopes=FLOATS, **given_))
    for f, t in zip(found, torch.autograd.grad(sum(v.sum() for v in again), leaves), strict=True):
        torch.testing.assert_close(f, t)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_does_not_reach_the_others(name: str, bad: float) -> None:
    d = 5
    for rows in (3, 40):
        given_ = inputs(d, (rows,), dtype=torch.float32)
        clean = given_.pop("x").requires_grad_()
        dirty = clean.detach().clone()
        dirty[1] = bad
        dirty.requires_grad_()
        others = torch.arange(rows) != 1
        outputs = []
        for x in (clean, dirty):
            result = as_tuple(getattr(functional, name)(x, slopes=FLOATS, **given_))
            (gradient,) = torch.autograd.grad(sum(v.sum() for v in result), x)
            outputs.append([*(v.detach() for v in result), gradient])
        for without, with_bad in zip(*outputs, strict=True):
            torch.testing.assert_close(with_bad[others], without[others], rtol=1e-6, atol=1e-6)


# ---- errors


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    function = getattr(functional, name)
    x, lu = torch.zeros(2, 5), torch.zeros(5, 5)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)7.*5|5.*7"):
        function(torch.zeros(2, 7), lu)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)5.*4|4.*5"):
        function(x, torch.zeros(5, 4))
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)3.*5|5.*3"):
        function(x, lu, torch.zeros(3))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("bias", torch.ones(1)),
        ("bias", torch.ones(2, 5)),
        ("sign", torch.ones(1)),
        ("sign", torch.ones(3)),
        ("permutation", torch.arange(3)),
        ("slopes", torch.ones(4)),
        ("slopes", torch.ones(3, 4)),
        ("slopes", (0.1, 1.0)),
        ("slopes", (0.1, 0.0, 1.0)),
        ("slopes", (-0.1, 1.0, 1.0)),
    ],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, Tensor) else str(v),
)
def test_wrong_shapes_of_the_other_arguments_are_named(
    name: str, argument: str, value: Any, rows: int
) -> None:
    """What would broadcast, too: a bias of one number is not a bias of D."""
    x, lu = torch.zeros(rows, 5), torch.zeros(5, 5)
    with pytest.raises(ValueError, match=argument):
        getattr(functional, name)(x, lu, **{argument: value})


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("slopes", [torch.ones(4), torch.ones(3, 4), (0.1, 1.0)], ids=["4", "3 by 4", "two"])
def test_wrong_slopes_of_an_activation_are_named(name: str, slopes: Any) -> None:
    with pytest.raises(ValueError, match="slopes"):
        getattr(functional, name)(torch.zeros(2, 5), slopes)


@pytest.mark.parametrize("name", [*NAMES, *ACTIVATION_NAMES])
def test_integers_are_refused(name: str) -> None:
    """phi(1) = 1.28 in an integer tensor would be 1."""
    second = torch.zeros(5, 5) if name in NAMES else FLOATS
    with pytest.raises((TypeError, RuntimeError), match=r"int64|Long"):
        getattr(functional, name)(torch.ones(2, 5, dtype=torch.int64), second)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_not_mixed_silently(name: str) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        getattr(functional, name)(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5, 5))


# ---- backends


def test_set_backend_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"(?s)cuda.*auto.*reference.*triton|auto.*reference.*triton.*cuda"):
        lunet_fast.set_backend("cuda")
    assert lunet_fast.get_backend() in ("auto", "reference", "triton")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_set_backend_is_read_back(backend: str) -> None:
    lunet_fast.set_backend(backend)
    assert lunet_fast.get_backend() == backend
    given_ = inputs(4, (9,), dtype=torch.float32)
    layer = truth.Layer(*(v.double() for v in list(given_.values())[1:4]), given_["permutation"], FLOATS)
    exact = truth.forward(given_["x"].double(), layer)[0]
    torch.testing.assert_close(
        functional.lu_dense(slopes=FLOATS, **given_).double(), exact, rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can run here")
def test_triton_on_the_cpu_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lunet_fast.set_backend("reference")
    with pytest.raises(RuntimeError, match=r"(?s)CUDA.*TRITON_INTERPRET"):
        lunet_fast.set_backend("triton")
    assert lunet_fast.get_backend() == "reference"


@pytest.mark.parametrize("name", NAMES)
def test_triton_leaves_float64_and_empty_batches_to_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough for set_backend; no kernel is launched for these inputs.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lunet_fast.set_backend("triton")
    given_ = inputs(4, (9,))
    x = given_.pop("x")
    layer = truth.Layer(slopes=FLOATS, **given_)
    found = as_tuple(getattr(functional, name)(x, slopes=FLOATS, **given_))
    for value, true in zip(found, expected(name, x, layer), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-11, atol=1e-11)
    given_ = inputs(4, (0,), dtype=torch.float32)
    found = as_tuple(getattr(functional, name)(given_.pop("x"), slopes=FLOATS, **given_))
    assert found[0].shape == (0, 4)


@pytest.mark.parametrize(("value", "outcome"), [("reference", "reference"), ("cudnn", "LUNET_FAST_BACKEND")])
def test_backend_from_the_environment(value: str, outcome: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import lunet_fast; print(lunet_fast.get_backend())"],
        env={**os.environ, "LUNET_FAST_BACKEND": value},
        cwd=os.path.dirname(os.path.dirname(lunet_fast.__file__)),
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome == value:
        assert result.stdout.strip() == value, result.stderr
    else:
        assert result.returncode != 0
        assert outcome in result.stderr
        assert value in result.stderr
