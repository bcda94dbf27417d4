"""LUNet with memory="reversible": the gradients of "saved", next to nothing kept, and no wrong one unsaid."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import truth
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacrev, jvp, vmap

from lunet_fast import GeneralizedLeakySoftplus, LeakySoftplus, LUDense, LUFlow, LUNet
from lunet_fast.layers import reversible

ACTIVATIONS = {
    "leaky": lambda: LeakySoftplus(0.3),
    "learnable": lambda: LeakySoftplus(0.3, learnable=True),
    "generalized-learnable": lambda: GeneralizedLeakySoftplus(1.5, 0.4, learnable=True),
}
METHODS = ["forward", "inverse", "forward_and_logabsdet", "inverse_and_logabsdet"]
D = 5

methods = pytest.mark.parametrize("method", METHODS)


def make(
    d: int = D,
    layers: int = 3,
    activation: str = "learnable",
    *,
    seed: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    memory: str = "reversible",
    **scales: float,
) -> LUNet:
    net = LUNet(d, layers, ACTIVATIONS[activation](), bias, dtype=dtype, memory=memory)
    for index, layer in enumerate(net.layers):
        truth.randomise(layer, 100 * seed + index, **({"coupling": 0.3} | scales))
    return net


def ill_conditioned(index: int, dtype: torch.dtype = torch.float32) -> LUNet:
    """A reversible net, one layer of which cannot be inverted to any digit."""
    net = make(dtype=dtype)
    with torch.no_grad():
        net.layers[index].lu[2, 2] = -40.0
    return net


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 2)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


def outputs(net: LUNet, method: str, x: Tensor) -> tuple[Tensor, ...]:
    found = getattr(net, method)(x)
    return found if isinstance(found, tuple) else (found,)


def gradients(net: LUNet, method: str, x: Tensor, memory: str) -> list[Tensor | None]:
    """Of x and of every parameter that requires one, for random cotangents."""
    net.memory = memory
    wanted = [t for t in (x, *net.parameters()) if t.requires_grad]
    found = outputs(net, method, x)
    cotangents = [normal(*f.shape, seed=7, dtype=f.dtype) for f in found]
    return list(torch.autograd.grad(found, wanted, cotangents, allow_unused=True))


def assert_same(found: list[Any], expected: list[Any], tolerance: float = 1e-10) -> None:
    for f, e in zip(found, expected, strict=True):
        if e is None:
            assert f is None
        else:
            assert f.shape == e.shape
            assert (f - e).norm() <= tolerance * (e.norm() + 1e-3)


def kept_bytes(net: LUNet, method: str, x: Tensor) -> int:
    """Bytes that a call keeps for backward, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = outputs(net, method, x)
    assert held[0].requires_grad
    return sum(kept.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that is allocated at once while ``step`` runs, over what was there before."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


# ---- the attribute


def test_memory_is_saved_unless_asked_for() -> None:
    net = LUNet(4, 2)
    assert net.memory == "saved"
    net.memory = "reversible"
    assert net.memory == "reversible"
    assert LUNet(4, 2, memory="reversible").memory == "reversible"
    for value in ("inverse", "", None):
        with pytest.raises(ValueError, match="memory must be one of saved, reversible, got"):
            net.memory = value
    with pytest.raises(ValueError, match="'other'"):
        LUNet(4, 2, memory="other")
    assert net.memory == "reversible"


def test_memory_follows_copies_and_not_states() -> None:
    net = make()
    assert copy.deepcopy(net).memory == "reversible"
    assert pickle.loads(pickle.dumps(net)).memory == "reversible"
    other = make(seed=3, memory="saved")
    other.load_state_dict(net.state_dict())
    assert other.memory == "saved"


# ---- values and gradients


@methods
@pytest.mark.parametrize("shape", [(), (1,), (0,), (40,), (3, 4), (2, 0)], ids=str)
@pytest.mark.parametrize("layers", [1, 4])
def test_values_are_those_of_saved(method: str, shape: tuple[int, ...], layers: int) -> None:
    net = make(layers=layers)
    x = normal(*shape, D)
    found = outputs(net, method, x)
    with torch.no_grad():
        without_gradient = outputs(net, method, x)
    net.memory = "saved"
    for f, w, e in zip(found, without_gradient, outputs(net, method, x), strict=True):
        # A saved net this small is computed by PyTorch's own operations, in another order.
        torch.testing.assert_close(f, e, rtol=1e-13, atol=1e-13)
        assert torch.equal(f, w)
        assert f.requires_grad
        assert not w.requires_grad


@methods
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (40,), (4, 12)], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_gradients_are_those_of_saved(
    method: str, activation: str, shape: tuple[int, ...], layers: int
) -> None:
    """Random signs, learnable slopes, and fewer and more rows than columns."""
    net = make(layers=layers, activation=activation)
    x = normal(*shape, D).requires_grad_()
    expected = gradients(net, method, x, "saved")
    assert_same(gradients(net, method, x, "reversible"), expected)


@methods
@given(
    d=st.integers(1, 150),
    layers=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 31, 32, 33, 65, 300]),
    seed=st.integers(0, 1000),
    bias=st.booleans(),
)
def test_gradients_of_drawn_sizes(method: str, d: int, layers: int, rows: int, seed: int, bias: bool) -> None:
    net = make(d, layers, seed=seed, bias=bias)
    x = normal(rows, d, seed=seed).requires_grad_()
    expected = gradients(net, method, x, "saved")
    assert_same(gradients(net, method, x, "reversible"), expected, 1e-9)


@methods
def test_gradients_in_single_precision(method: str) -> None:
    net = make(32, 4, dtype=torch.float32)
    x = normal(200, 32, dtype=torch.float32).requires_grad_()
    found = gradients(net, method, x, "reversible")
    assert all(f.dtype == torch.float32 for f in found)
    wide = copy.deepcopy(net).double()
    expected = gradients(wide, method, x.detach().double().requires_grad_(), "saved")
    assert_same(found, expected, 1e-4)


@methods
def test_gradients_of_layers_with_permutations(method: str) -> None:
    net = make(layers=3)
    net.layers[1] = LUDense.from_linear(nn.Linear(D, D, dtype=torch.float64), LeakySoftplus(0.3))
    assert net.layers[1].permutation is not None
    x = normal(9, D).requires_grad_()
    expected = gradients(net, method, x, "saved")
    assert_same(gradients(net, method, x, "reversible"), expected)


@pytest.mark.parametrize("method", ["forward_and_logabsdet", "inverse_and_logabsdet"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_is_used(method: str, used: int) -> None:
    net = make()
    x = normal(12, D).requires_grad_()
    wanted = [x, *net.parameters()]
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        loss = outputs(net, method, x)[used].square().sum()
        given_ = torch.autograd.grad(loss, wanted, allow_unused=True)
        found[memory] = [torch.zeros_like(t) if g is None else g for g, t in zip(given_, wanted, strict=True)]
    assert_same(found["reversible"], found["saved"])


@methods
def test_gradcheck(method: str) -> None:
    """Against finite differences, to second order, in x and in every parameter."""
    net = make(2, 2)
    names = [name for name, _ in net.named_parameters()]
    state = [p.detach().clone().requires_grad_() for p in net.parameters()]

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return outputs(self.net, method, x)

    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        named = {f"net.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(Call(), named, (x,))

    x = normal(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *state))
    assert torch.autograd.gradgradcheck(call, (x, *state))


@methods
def test_second_order_is_that_of_saved(method: str) -> None:
    """A gradient penalty, and a third derivative."""
    net = make()
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        x = normal(7, D).requires_grad_()
        loss = sum(f.square().sum() for f in outputs(net, method, x))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        wanted = [x, *net.parameters()]
        second = torch.autograd.grad(first.square().sum(), wanted, create_graph=True)
        third = torch.autograd.grad(sum(s.sin().sum() for s in second), wanted)
        found[memory] = [first, *second, *third]
    assert_same(found["reversible"], found["saved"], 1e-8)


def test_second_order_with_the_input_fixed() -> None:
    net = make()
    x = normal(7, D)
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        wanted = list(net.parameters())
        first = torch.autograd.grad(net(x).square().sum(), wanted, create_graph=True)
        found[memory] = list(torch.autograd.grad(sum(f.square().sum() for f in first), wanted))
    assert_same(found["reversible"], found["saved"], 1e-9)


@methods
def test_strided_inputs_and_gradients(method: str) -> None:
    net = make()
    base = normal(D, 40).requires_grad_()
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        strided = outputs(net, method, base.T[::2])[0].sum()
        expanded = outputs(net, method, base[:, 0].expand(6, D))[0].sum()
        found[memory] = torch.autograd.grad(strided + expanded, [base, *net.parameters()])
    assert_same(found["reversible"], found["saved"])


# ---- what is wanted decides what is done


@methods
@pytest.mark.parametrize("trained", ["x", "layers.0", "layers.1", "layers.2", "bias", "raw_alpha", "lu"])
def test_gradients_of_some(method: str, trained: str) -> None:
    """x alone, one layer alone, one kind of parameter alone."""
    net = make()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trained in name)
    x = normal(9, D).requires_grad_(trained == "x")
    expected = gradients(net, method, x, "saved")
    assert_same(gradients(net, method, x, "reversible"), expected)
    assert expected


def test_layers_before_the_first_gradient_are_not_walked() -> None:
    """They are neither inverted nor judged: the one that cannot be inverted is not missed."""
    net = ill_conditioned(0)
    x = normal(9, D, dtype=torch.float32)
    net.layers[0].requires_grad_(False)
    expected = gradients(net, "forward", x, "saved")
    assert_same(gradients(net, "forward", x, "reversible"), expected, 1e-4)
    net.layers[0].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="layers.0"):
        gradients(net, "forward", x, "reversible")


def test_nothing_wanted_nothing_recorded() -> None:
    net = make().requires_grad_(False)
    assert net(normal(3, D)).grad_fn is None


# ---- what is kept


@methods
def test_what_is_kept_does_not_grow_with_depth(method: str) -> None:
    rows, d = 4000, 4
    for layers in (1, 2, 8, 16):
        net = make(d, layers, "leaky", dtype=torch.float32)
        kept = kept_bytes(net, method, normal(rows, d, dtype=torch.float32).requires_grad_())
        samples = math.ceil(rows / math.ceil(rows / reversible.SAMPLED))
        assert kept == 4 * d * (rows + layers * samples)
        assert samples <= reversible.SAMPLED
        net.memory = "saved"
        saved = kept_bytes(net, method, normal(rows, d, dtype=torch.float32).requires_grad_())
        assert saved >= 4 * d * rows * layers


@methods
def test_the_peak_of_a_step_does_not_grow_with_depth(method: str) -> None:
    """Nothing hidden is held either, by what is kept or on the way."""
    rows, d = 20_000, 8
    peaks = []
    for layers in (4, 16):
        net = make(d, layers, "leaky", coupling=0.1, spread=0.1)
        x = normal(rows, d)

        def step(net: LUNet = net, x: Tensor = x) -> None:
            outputs(net, method, x)[0].sum().backward()

        step()
        peaks.append(peak_bytes(step))
    assert peaks[0] <= 10 * 8 * rows * d
    assert peaks[1] <= 1.05 * peaks[0]


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    net = make()
    x = normal(9, D).requires_grad_()
    expected = gradients(net, "forward", x, "saved")
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(net, "forward", x, "reversible"), expected)


def test_backward_twice() -> None:
    net = make()
    x = normal(9, D).requires_grad_()
    loss = net(x).square().sum()
    first = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


# ---- the guard


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guard_names_the_layer_that_cannot_be_inverted(index: int, dtype: torch.dtype) -> None:
    net = ill_conditioned(index, dtype)
    y, logabsdet = net.forward_and_logabsdet(normal(300, D, dtype=dtype))
    with pytest.raises(RuntimeError, match=rf"layers\.{index} is off") as caught:
        (y.sum() + logabsdet.sum()).backward()
    for part in ("memory='saved'", "LUNet.condition()", str(dtype), f"{reversible.tolerance(dtype):.1e}"):
        assert part in str(caught.value)
    assert all(p.grad is None for p in net.parameters())


def test_the_guard_works_for_the_inverse() -> None:
    """A net that throws digits away in its inverse: u_ii = exp(40)."""
    net = make(dtype=torch.float32)
    with torch.no_grad():
        net.layers[1].lu[2, 2] = 40.0
    with pytest.raises(RuntimeError, match=r"layers\.1 is off"):
        net.inverse(normal(300, D, dtype=torch.float32)).sum().backward()


def test_the_guard_works_for_second_derivatives() -> None:
    net = ill_conditioned(1)
    x = normal(9, D, dtype=torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"layers\.1 is off"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("change", [0.01, math.nan, math.inf])
def test_the_guard_sees_parameters_changed_behind_autograd(change: float) -> None:
    net = make()
    y = net(normal(40, D))
    net.layers[1].lu.data.add_(change)
    with pytest.raises(RuntimeError, match=r"layers\.1 is off"):
        y.sum().backward()


def test_the_guard_speaks_of_the_precision_of_products() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(RuntimeError, match=r"set_float32_matmul_precision\('highest'\)"):
            ill_conditioned(1)(normal(9, D, dtype=torch.float32)).sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)


@methods
@given(
    d=st.integers(1, 40),
    layers=st.integers(1, 24),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 0.5, 1.5]),
    size=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_gradients_are_right_or_refused(
    method: str, d: int, layers: int, seed: int, spread: float, size: float
) -> None:
    """Whatever passes the guard has lost no more than ten times what the guard lets pass."""
    net = make(d, layers, "leaky", seed=seed, dtype=torch.float32, spread=spread)
    x = (size * normal(200, d, seed=seed, dtype=torch.float32)).requires_grad_()
    try:
        found = gradients(net, method, x, "reversible")
    except RuntimeError as error:
        assert "is off by a relative" in str(error)  # noqa: PT017
        return
    assert_same(found, gradients(net, method, x, "saved"), 10 * reversible.tolerance(torch.float32))


@pytest.mark.parametrize("activation", ["leaky", "generalized-learnable"])
def test_the_guard_lets_ordinary_nets_pass(activation: str) -> None:
    """Fresh ones of eight layers, at any batch size, and at a batch of zeros."""
    net = LUNet(16, 8, ACTIVATIONS[activation](), memory="reversible")
    for rows in (1, 5, 33, 1000):
        net(normal(rows, 16, dtype=torch.float32)).sum().backward()
        net(torch.zeros(rows, 16)).sum().backward()


def test_rows_that_are_not_finite_stay_by_themselves() -> None:
    """A NaN or an infinity in the data is not an error of inversion; its row alone has no gradient."""
    net = make(layers=3, activation="leaky")
    clean = normal(9, D)
    for value in (math.nan, math.inf):
        x = clean.clone()
        x[4, 1] = value
        x.requires_grad_()
        (found,) = torch.autograd.grad(net(x).sum(), x)
        (expected,) = torch.autograd.grad(net(clean.requires_grad_()).sum(), clean)
        rows = torch.arange(9) != 4
        torch.testing.assert_close(found[rows], expected[rows])


# ---- precision


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_refused(method: str, dtype: torch.dtype) -> None:
    net = make(dtype=torch.float32).to(dtype)
    with pytest.raises(TypeError, match="needs a float32 or float64 net"):
        getattr(net, method)(normal(3, D).to(dtype))
    net.memory = "saved"
    assert outputs(net, method, normal(3, D).to(dtype))[0].dtype == dtype


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(method: str, dtype: torch.dtype) -> None:
    net = make(dtype=torch.float32)
    x = normal(40, D, dtype=torch.float32).to(dtype).requires_grad_()
    plain = gradients(net, method, x.detach().float().requires_grad_(), "reversible")
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, method, x, "reversible")
        with torch.no_grad():
            results = outputs(net, method, x)
    assert found[0].dtype == dtype
    assert_same([f.float() for f in found[:1]], [plain[0].to(dtype).float()])
    assert_same(found[1:], plain[1:])
    assert all(r.dtype == torch.float32 for r in results)
    net(x.float()).sum().backward()
    with pytest.raises(TypeError, match="use autocast"):
        net(x.bfloat16())


# ---- composition


@methods
def test_a_result_modified_in_place_is_noticed(method: str) -> None:
    net = make()
    y = outputs(net, method, normal(9, D))[0]
    y += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_log_determinant_may_be_modified_in_place() -> None:
    net = make()
    y, logabsdet = net.forward_and_logabsdet(normal(9, D))
    logabsdet += 1.0
    (y.sum() + logabsdet.sum()).backward()


def test_parameters_modified_before_backward_are_noticed() -> None:
    net = make()
    y = net(normal(9, D))
    with torch.no_grad():
        net.layers[0].bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_input_may_be_modified_afterwards() -> None:
    """It is not kept."""
    net = make()
    x = normal(9, D)
    expected = gradients(net, "forward", x, "saved")
    net.memory = "reversible"
    y = net(x)
    cotangent = normal(9, D, seed=7)
    x.zero_()
    assert_same(list(torch.autograd.grad(y, list(net.parameters()), cotangent)), expected)


def test_hooks_on_parameters_fire_once() -> None:
    net = make()
    seen: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_hook(lambda g, name=name: seen.append(name))
    net(normal(9, D)).sum().backward()
    assert sorted(seen) == sorted(name for name, _ in net.named_parameters())


def test_hooks_on_layers_are_called() -> None:
    net = make()
    x = normal(9, D)
    expected = net(x)
    seen = []
    net.layers[1].register_forward_hook(lambda module, inputs, result: seen.append(result))
    assert torch.equal(net(x), expected)
    assert len(seen) == 1
    net.layers[1].register_forward_hook(lambda module, inputs, result: 2.0 * result)
    assert_same(gradients(net, "forward", x, "reversible"), gradients(net, "forward", x, "saved"))


def test_layers_of_other_kinds_are_called() -> None:
    class Doubled(LUDense):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    net = make()
    x = normal(9, D)
    net.layers[1] = Doubled(D, dtype=torch.float64)
    assert_same(gradients(net, "forward", x, "reversible"), gradients(net, "forward", x, "saved"))
    net.layers[1] = nn.Linear(D, D, dtype=torch.float64)
    assert_same(gradients(net, "forward", x, "reversible"), gradients(net, "forward", x, "saved"))


def test_parametrized_layers() -> None:
    net = make()

    class Scaled(nn.Module):
        def forward(self, lu: Tensor) -> Tensor:
            return 0.5 * lu

    nn.utils.parametrize.register_parametrization(net.layers[1], "lu", Scaled())
    x = normal(9, D).requires_grad_()
    assert_same(gradients(net, "forward", x, "reversible"), gradients(net, "forward", x, "saved"))
    net.memory = "reversible"
    assert kept_bytes(net, "forward", normal(2000, D)) < 2 * 2000 * D * 8


def test_functional_call() -> None:
    net, other = make(), make(seed=3)
    x = normal(9, D)
    values = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    buffers = dict(other.named_buffers())
    found = torch.autograd.grad(
        functional_call(net, {**values, **buffers}, (x,)).sum(), list(values.values())
    )
    expected = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    assert_same(list(found), list(expected))


TRANSFORMS: dict[str, Callable[[LUNet, Tensor], Any]] = {
    "vmap": lambda net, x: vmap(net)(x),
    "jacrev": lambda net, x: jacrev(net)(x),
    "jvp": lambda net, x: jvp(net, (x,), (torch.ones_like(x),)),
    "hessian": lambda net, x: hessian(lambda q: net(q).square().sum())(x),
    "grad": lambda net, x: torch.func.grad(lambda q: net.inverse(q).square().sum())(x),
    "compile": lambda net, x: torch.compile(net, backend="aot_eager", fullgraph=True)(x),
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x, vectorize=True),
    "checkpoint": lambda net, x: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str) -> None:
    """What they compute, and the gradients of that."""
    net = make()
    x = normal(3, D)
    values, parameters = {}, {}
    for memory in ("saved", "reversible"):
        torch.compiler.reset()
        net.memory = memory
        values[memory] = TRANSFORMS[transform](net, x)
        if isinstance(values[memory], Tensor) and values[memory].requires_grad:
            loss = values[memory].square().sum()
            parameters[memory] = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    torch.testing.assert_close(values["reversible"], values["saved"])
    if parameters:
        assert_same(parameters["reversible"], parameters["saved"])


@methods
def test_forward_mode(method: str) -> None:
    net = make()
    x, tangent = normal(3, D), normal(3, D, seed=4)
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        with forward_ad.dual_level():
            results = outputs(net, method, forward_ad.make_dual(x, tangent))
            found[memory] = [forward_ad.unpack_dual(r).tangent for r in results]
    assert_same(found["reversible"], found["saved"])


def test_batched_cotangents() -> None:
    net = make()
    x = normal(6, D).requires_grad_()
    cotangents = normal(4, 6, D, seed=5)
    found = {}
    for memory in ("saved", "reversible"):
        net.memory = memory
        wanted = [x, *net.parameters()]
        found[memory] = list(torch.autograd.grad(net(x), wanted, cotangents, is_grads_batched=True))
    assert_same(found["reversible"], found["saved"])


def test_anomaly_mode() -> None:
    net = make()
    with torch.autograd.detect_anomaly(check_nan=True):
        net(normal(9, D)).sum().backward()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_distributed_data_parallel() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = make()
        parallel = nn.parallel.DistributedDataParallel(net)
        x = normal(9, D)
        parallel(x).square().sum().backward()
        found = [p.grad.clone() for p in net.parameters()]
        net.memory = "saved"
        expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        assert_same(found, list(expected))
    finally:
        torch.distributed.destroy_process_group()


def test_training_goes_as_saved() -> None:
    """Thirty steps of a flow end at the same parameters."""
    x = normal(200, 8)
    ends = []
    for memory in ("saved", "reversible"):
        flow = LUFlow(make(8, 4, memory=memory))
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            loss = -flow.log_prob(x).mean()
            loss.backward()
            optimizer.step()
        ends.append(list(flow.parameters()))
    assert_same(ends[1], ends[0], 1e-6)
