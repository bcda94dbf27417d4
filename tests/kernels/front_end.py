"""Every kernel through the front end of Triton's compiler, each optional argument there and not there.

    python -m tests.kernels.front_end      a line of JSON for each way of launching a kernel

What is launched depends on what is asked for: a kernel without a bias is another program than one with it,
and Triton's compiler meets each only when a user asks for it. The interpreter cannot stand in: it runs
Python, and takes what the compiler refuses. So the launchers are called in every combination, on tensors
without data, and what they launch is translated to Triton's own intermediate language, the stage
that refuses.

Two launches count as one if the same arguments are None and the same switches are set: block sizes and
dtypes are for ``benchmarks/gpu/kernel_resources.py``, which compiles to machine code.
"""

from __future__ import annotations

import inspect
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.gpu.kernel_calls import Setting
from benchmarks.gpu.kernel_resources import Launch, kernel_modules, recording, source_of

ARCHITECTURE = 80

#: D and arithmetic: rows held in registers and not, one block of columns and several, the fused kernels, what
#: replaces them from D = 65 on and what does beyond 128.
SETTINGS = ((48, "tf32x3"), (100, "tf32x3"), (200, "tf32x3"), (16, "ieee"))

SLOPES: tuple[str | None, ...] = (None, "floats", "tensor", "columns", "spline")

FLAGS = (False, True)


def launches() -> dict[tuple[Any, ...], Launch]:
    """One launch of each kind that the launchers make, by what distinguishes it."""
    found: dict[tuple[Any, ...], Launch] = {}
    with recording(ARCHITECTURE) as made:
        for (D, arithmetic), kind in itertools.product(SETTINGS, SLOPES):
            call_all(Setting(D, arithmetic, {} if kind in (None, "floats") else {"slopes": kind}), kind)
    for launch in made:
        found.setdefault((launch.kernel, switches_of(launch)), launch)
    return found


def call_all(s: Setting, kind: str | None) -> None:
    """Every launcher, with slopes of a kind."""
    call_row_wise(s, kind)
    call_layer(s, kind)
    call_inverse(s, kind)
    call_stack(s, kind)
    call_score(s, kind)
    call_matrix(s)


def switches_of(launch: Launch) -> tuple[tuple[Any, bool | None], ...]:
    """The arguments that are None, and the switches that are set."""
    return tuple((name, v if v is None else bool(v)) for name, v in launch.constants if is_switch(v))


def is_switch(value: Any) -> bool:
    return value is None or isinstance(value, int)


def either(condition: bool, value: Any) -> Any:
    return value if condition else None


def combinations(count: int) -> itertools.product[tuple[bool, ...]]:
    return itertools.product(FLAGS, repeat=count)


def call_row_wise(s: Setting, kind: str | None) -> None:
    from lunet_fast.kernels import activation

    if kind is None:
        return
    x, slopes = s.rows(1000), s.slopes()
    for wanted in FLAGS:
        ld = either(wanted, s.empty(1000))
        activation.activation_forward(x, slopes, logabsdet=wanted)
        activation.activation_inverse(x, slopes, logabsdet=wanted)
        for inverse, sums in combinations(2):
            activation.row_gradients(
                x[None], either(wanted, s.empty(1, 1000)), x[None], slopes, inverse=inverse, column_sums=sums
            )
        activation.activation_backward(x, ld, x, slopes)


def call_layer(s: Setting, kind: str | None) -> None:
    from lunet_fast.kernels import gradient, layer, tiles, triangular

    slopes, weight, precision = either(kind is not None, s.slopes()), s.matrix(1), s.precision
    x, few = s.rows(1, 1000), s.rows(1, 33)
    for biased, constant, logabsdet, save in combinations(4):
        layer.layer_forward(
            *(x, weight, either(biased, s.full(1)), slopes),
            logabsdet=logabsdet,
            save=save,
            precision=precision,
            constant=either(constant, s.empty(1)),
            transposed=not biased,
        )
    for signed, permuted, biased, logabsdet, save in combinations(5):
        triangular.layer_forward_rows(
            *(few, weight, either(signed, s.full(1)), either(permuted, s.empty(s.D, dtype=torch.int64))),
            *(either(biased, s.full(1)), slopes),
            logabsdet=logabsdet,
            save=save,
            precision=precision,
            constant=either(logabsdet, s.empty(1)),
        )
    for logabsdet, saved, biased, needs_x, needs_weight in combinations(5):
        h = either(kind is not None and (saved or not tiles.recomputes(s.D)), x)
        gradient.layer_backward(
            *(x, either(logabsdet, s.empty(1, 1000)), x, h, weight, either(biased, s.full(1)), slopes),
            needs_x=needs_x,
            needs_weight=needs_weight,
            needs_bias=biased,
            precision=precision,
        )
    gradient.weight_and_bias_gradients(x, x, precision=precision)


def call_inverse(s: Setting, kind: str | None) -> None:
    from lunet_fast.kernels import inverse, inverse_gradient

    slopes, lu, precision = either(kind is not None, s.slopes()), s.matrix(1), s.precision
    y = s.rows(1, 1000)
    for signed, permuted, biased, logabsdet, many in combinations(5):
        order = either(permuted, s.empty(s.D, dtype=torch.int64))
        prepared = inverse.prepare_inverse(
            lu, either(signed, s.full(1)), order, precision=precision, N=None if many else 0
        )
        inverse.layer_inverse(
            *(y, lu, prepared.inverses, either(biased, s.full(1)), slopes),
            permutation=order,
            logabsdet=logabsdet,
            save=signed,
            precision=precision,
            constant=either(biased, prepared.logabsdet),
            weight=prepared.weight,
            condition=prepared.condition,
        )
        inverse_gradient.layer_inverse_backward(
            *(y, either(logabsdet, s.empty(1, 1000)), either(kind is not None, y), lu, prepared.inverses),
            slopes,
            permutation=order,
            precision=precision,
        )
    if kind is None:
        # What the rows are solved in where neither x nor registers hold it.
        narrow = Setting(s.D, "bfloat16")
        prepared = inverse.prepare_inverse(narrow.matrix(1), None, None, precision="tf32x3")
        inverse.layer_inverse(
            *(narrow.rows(1, 1000), narrow.matrix(1), prepared.inverses, None, None),
            permutation=None,
            logabsdet=True,
            save=False,
            precision="tf32x3",
        )


def call_stack(s: Setting, kind: str | None) -> None:
    from lunet_fast.kernels import stack, stack_gradient, tiles

    M, x = 4, s.rows(1000)
    if kind is None or s.D > 64:
        return
    weights, slopes = s.matrix(M), s.slopes(M - 1)
    inner = {
        kernel: tile.inner
        for kernel in ("forward", "backward", "inverse", "inverse backward")
        if (tile := tiles.stack_tile(kernel, s.D, s.dtype, s.precision, ARCHITECTURE))
    }

    def blocks(kernel: str) -> torch.Tensor:
        return s.empty(M, 2, -(-s.D // inner[kernel]), inner[kernel], inner[kernel])

    for biased, constant, logabsdet, needs_weights in combinations(4):
        bias, ld = either(biased, s.full(M)), either(logabsdet, s.empty(1000))
        forward = {
            "constant": either(constant, s.empty(M)),
            "logabsdet": logabsdet,
            "precision": s.precision,
        }
        backward: dict[str, Any] = {"needs_weights": needs_weights, "precision": s.precision}
        if "forward" in inner:
            stack.stack_forward(x, weights, bias, slopes, **forward)
        if "backward" in inner:
            for needs_x in {True, not needs_weights}:
                stack_gradient.stack_backward(x, ld, x, weights, bias, slopes, needs_x=needs_x, **backward)
        if "inverse" in inner:
            stack.stack_inverse(x, weights, blocks("inverse"), bias, slopes, **forward)
        if "inverse backward" in inner:
            stack_gradient.stack_inverse_backward(
                *(x, ld, x, weights, weights, blocks("inverse backward"), bias, slopes), **backward
            )


def call_score(s: Setting, kind: str | None) -> None:
    from lunet_fast.kernels import score

    K, L, users, items, top = 1, 2, 257, 1000, 20
    if kind in (None, "columns", "spline") or s.D > score.LARGEST_D:
        return
    for layered, biased, curved, seen, activated in combinations(5):
        activations = activated + (L if layered else 0)
        score.score_topk(
            *(s.rows(K, users), s.rows(K, items), either(layered, s.matrix(K, L))),
            either(biased and layered, s.full(K, L)),
            s.empty(activations, 3) if kind == "tensor" else s.slopes(),
            *(s.full(K), either(curved, s.full(K)), s.empty(users), s.empty(items)),
            either(seen, (s.empty(users + 1, dtype=torch.int64), s.empty(1000, dtype=torch.int64))),
            top,
            activated=activated,
            precision=s.precision,
        )


def call_matrix(s: Setting) -> None:
    from lunet_fast.kernels import matrix

    for signed, permuted, logabsdet in combinations(3):
        sign, order = either(signed, s.full(1)), either(permuted, s.empty(s.D, dtype=torch.int64))
        matrix.compose(s.matrix(1), sign, order, s.dtype)
        gradient = s.matrix(1, dtype=torch.float32)
        matrix.compose_backward(gradient, either(logabsdet, s.empty(1)), s.matrix(1), sign, order)


def optional_arguments() -> dict[str, set[str]]:
    """The arguments of each kernel that its definition says may be None."""
    found = {}
    for module in kernel_modules():
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__:
                text = inspect.getsource(kernel.fn).partition("):\n")[0]
                found[name] = set(re.findall(r"^ +(\w+),? *#.*\bNone\b", text, re.MULTILINE))
    return found


def refusal(launch: Launch) -> str:
    """What the front end has against this launch; "" if nothing."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    source = source_of(launch)
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    given = {
        "target": target,
        "options": options,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
        "context": context,
    }
    # Older releases do not take all of these.
    taken: Callable[..., Any] = source.make_ir
    try:
        taken(**{name: given[name] for name in inspect.signature(taken).parameters})
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"{type(cause).__name__}: {cause}"
    return ""


def main() -> None:
    found = list(launches().values())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        refusals = list(pool.map(refusal, found, chunksize=16))
    optional = optional_arguments()
    for launch, why in zip(found, refusals, strict=True):
        missing = sorted(name for name, value in launch.constants if value is None and isinstance(name, str))
        row = {"kernel": launch.kernel, "D": dict(launch.constants).get("D"), "missing": missing}
        print(json.dumps({**row, "optional": sorted(optional[launch.kernel]), "refused": why}))


if __name__ == "__main__":
    main()
