# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disable-error-code="assignment, var-annotated"
# ruff: noqa: RUF005, RET505 (the compiler knows a sum of tuples; what follows a ``return`` it compiles too)
"""The activation φ as kernels see it, whichever kind it is; and φ, φ⁻¹ and their gradients row by row.

``leaky_softplus.py`` and ``spline.py`` are the two kinds. Which of them a kernel is compiled for says
``Activation.BINS``, a constant, so that of the other nothing is left. (With ``else``: what stands behind a
``return`` is compiled too, and has to be of the same type.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lunet_fast.kernels import leaky_softplus, spline, tiles
from lunet_fast.kernels.launch import check_parameter, check_rows, launch
from lunet_fast.kernels.leaky_softplus import LN2, PARAMETERS, inverse_steps, repeated
from lunet_fast.kernels.spline import Spline

Slopes = Sequence[float] | Tensor | Spline

#: Steps of the inverse for slopes in a tensor, whose values the host does not wait for: enough for
#: a/c ≥ 2^-13. ``inverse_steps`` says how many are needed.
LEARNT_STEPS = 2


# --- the activation as kernels see it -------------------------------------------------------------------
#
# Kernels hand on an ``Activation`` and what ``load_family`` read of it, and look into neither: this file
# alone knows what an activation is made of. They are two because a jitted function returns no constants, nor
# does a tuple of local values keep them.


class Activation(NamedTuple):
    """φ as one argument of a kernel."""

    slopes: Tensor | None
    """[3] or [3, D], of several layers [layers, 3] or [layers, 3, D]; None: the three numbers. Of a spline,
    its table [layers, 3·BINS + 4, D]."""
    a: float
    c: float
    kappa: float
    ACTIVE: tl.constexpr
    """False: the identity."""
    PER_COLUMN: tl.constexpr
    """Whether the slopes differ from column to column."""
    STEPS: tl.constexpr
    """Steps of the inverse."""
    BINS: tl.constexpr
    """Of a spline; 0: φ is of the family of ``leaky_softplus``."""


@triton.jit
def load_family(activation, layer, cols, D):
    """φ of a layer in these columns [COLUMNS], which the functions below take with the activation itself."""
    if activation.BINS > 0:
        return spline.load_spline(activation.slopes, layer, cols, D, activation.BINS)
    else:
        return leaky_softplus.load_family(activation, layer, cols, D)


@triton.jit
def located(x, family, activation):
    """x as the functions below take it: (x,), or for a spline x in its bin, looked up once for all."""
    if activation.BINS > 0:
        return spline.in_bin(x, family, activation.BINS)
    else:
        return (x,)


@triton.jit
def located_inverse(y, family, activation):
    """φ⁻¹(y), elementwise, as ``located`` gives an x: φ⁻¹(y) itself comes first."""
    if activation.BINS > 0:
        return spline.in_bin_of_value(y, family, activation.BINS)
    else:
        return (leaky_softplus.phi_inverse(y, family, activation.STEPS),)


@triton.jit
def phi(at, family, activation):
    """φ(x), elementwise."""
    if activation.BINS > 0:
        return spline.value(at, family)
    else:
        return leaky_softplus.phi(at[0], family)


@triton.jit
def log2_phi_derivative(at, family, activation):
    """log₂ φ′(x), elementwise: of which a row's sum is multiplied by ``LN2``, not each."""
    if activation.BINS > 0:
        return leaky_softplus.log2(spline.slope(at))
    else:
        return leaky_softplus.log2(leaky_softplus.phi_derivative(at[0], family))


@triton.jit
def phi_backward(g, ld, at, family, activation, INVERSE: tl.constexpr):
    """g·φ′(x) + ld·φ″(x)/φ′(x), the gradient of x from g, that of φ(x), and ld, that of log φ′(x) or None.

    INVERSE: (g − ld·φ″/φ′)/φ′, the gradient of y from those of x = φ⁻¹(y) and of −log φ′(x).
    """
    if activation.BINS > 0:
        return spline.backward(g, ld, at, INVERSE)
    else:
        return leaky_softplus.phi_backward(g, ld, at[0], family, INVERSE)


@triton.jit
def slope_gradients(g, ld, at, family, activation):
    """g·∂φ/∂θ + ld·∂log φ′/∂θ at x for the ``PARAMETERS`` θ of the family of ``leaky_softplus``.

    Of a spline they would be as many as it has knots, which no thread could hold: it has
    ``spline.add_gradient_sums``.
    """
    return leaky_softplus.slope_gradients(g, ld, at[0], family)


# --- row-wise kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def activation_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    logabsdet_ptr,  # [N] float32, or None
    activation,
    N,
    D,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = φ(x), and Σ_d log φ′(x_d) for each row; INVERSE, y = φ⁻¹(x) and −Σ_d log φ′(y_d).

    One program does ROWS rows, each added up in one order.
    """
    # The first row's address is 64 bits wide, the rest of a tile counts from it in 32: half the registers.
    first = tl.program_id(0).to(tl.int64) * ROWS
    x_ptr += first * D
    y_ptr += first * D
    rows = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        cols = start + tl.arange(0, COLUMNS)
        valid = (rows[:, None] < N - first) & (cols[None, :] < D)
        offsets = rows[:, None] * D + cols[None, :]
        family = load_family(activation, 0, cols, D)
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if INVERSE:
            at = located_inverse(x, family, activation)
            y = at[0]
        else:
            at = located(x, family, activation)
            y = phi(at, family, activation)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)
        if logabsdet_ptr is not None:
            if INVERSE:
                total -= tl.where(valid, log2_phi_derivative(at, family, activation), 0.0)
            else:
                total += tl.where(valid, log2_phi_derivative(at, family, activation), 0.0)
    if logabsdet_ptr is not None:
        tl.store(logabsdet_ptr + first + rows, tl.sum(total, 1) * LN2, mask=rows < N - first)


@triton.jit
def store_sums(sums_ptr, sums, cols, D, COLUMN_SUMS: tl.constexpr, SLOPE_SUMS: tl.constexpr):
    """Sums over rows in these columns: of the slopes' terms and, last, of the rows themselves, if asked for.

    In memory the rows' stand first, and the others below. SLOPE_SUMS is how many those are: ``PARAMETERS``,
    or 0. A spline's are in memory already.
    """
    if COLUMN_SUMS:
        tl.store(sums_ptr + cols, sums[PARAMETERS], mask=cols < D)
    if SLOPE_SUMS > 0:
        for k in tl.static_range(PARAMETERS):
            tl.store(sums_ptr + (COLUMN_SUMS + k) * D + cols, sums[k], mask=cols < D)


@triton.jit(do_not_specialize=["N"])
def activation_bwd_kernel(
    grad_ptr,  # [K, N, D], of φ(x); INVERSE: of x = φ⁻¹(y)
    grad_logabsdet_ptr,  # [K, N] float32, of Σ log φ′(x); INVERSE: of −Σ log φ′(x); or None
    x_ptr,  # [K, N, D]
    out_ptr,  # [K, N, D], the gradient of x; INVERSE: of y
    sums_ptr,  # [K, programs, COLUMN_SUMS + SLOPE_SUMS, D] float32, or None
    activation,
    N,
    D,
    INVERSE: tl.constexpr,
    COLUMN_SUMS: tl.constexpr,
    SLOPE_SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients through φ or φ⁻¹; sums over this program's rows of what it stores and of the slopes' terms.

    A program keeps one block of columns and walks the tiles of ROWS rows, in steps of all the programs.
    """
    blocks = tl.cdiv(D, COLUMNS)
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    member = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    family = load_family(activation, 0, cols, D)
    offsets = rows[:, None] * D + cols[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    slope_totals = repeated(total, PARAMETERS)
    slope_ptr = None
    if SLOPE_SUMS > 0 and activation.BINS > 0:
        slope_ptr = sums_ptr + ((member * programs + program) * (COLUMN_SUMS + SLOPE_SUMS) + COLUMN_SUMS) * D
    # 64 bits for the step too: without sums it is N rounded up, which may pass 2³¹ where N does not.
    for first in range(program.to(tl.int64) * ROWS, N, programs.to(tl.int64) * ROWS):
        base = (member * N + first) * D
        here = rows < N - first
        valid = here[:, None] & (cols[None, :] < D)
        x = tl.load(x_ptr + base + offsets, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + base + offsets, mask=valid, other=0.0).to(tl.float32)
        ld = None
        if grad_logabsdet_ptr is not None:
            ld = tl.load(grad_logabsdet_ptr + member * N + first + rows, mask=here, other=0.0)[:, None]
        at = located(x, family, activation)
        out = phi_backward(g, ld, at, family, activation, INVERSE)
        tl.store(out_ptr + base + offsets, out.to(out_ptr.dtype.element_ty), mask=valid)
        if COLUMN_SUMS:
            total += tl.where(valid, out, 0.0)
        if SLOPE_SUMS > 0:
            if INVERSE:
                g = -out
                if ld is not None:
                    ld = -ld
            if slope_ptr is not None:
                again = first > program * ROWS
                spline.add_gradient_sums(slope_ptr, again, g, ld, at, family, cols, D, activation.BINS)
                tl.debug_barrier()  # the next tile adds to what other threads have stored
            else:
                terms = slope_gradients(g, ld, at, family, activation)
                sums = ()
                for k in tl.static_range(PARAMETERS):
                    sums = sums + (slope_totals[k] + tl.where(valid, terms[k], 0.0),)
                slope_totals = sums
    if sums_ptr is not None:
        sums_ptr += (member * programs + program) * (COLUMN_SUMS + SLOPE_SUMS) * D
        column_sum = tl.sum(total, 0)
        sums = ()
        for k in tl.static_range(PARAMETERS):
            sums = sums + (tl.sum(slope_totals[k], 0),)
        HELD: tl.constexpr = SLOPE_SUMS if activation.BINS == 0 else 0
        store_sums(sums_ptr, sums + (column_sum,), cols, D, COLUMN_SUMS, HELD)


# --- launchers ------------------------------------------------------------------------------------------


def activation_of(slopes: Slopes | None, D: int, *, layers: int | None = None, steps: int = 0) -> Activation:
    """The kernels' argument that describes φ, of three floats (a, c, κ), a tensor [3] or [3, D] or a spline,
    whose table is made here; None: the identity. With ``layers`` a tensor has their number as leading
    dimension, and of none it is the identity.
    """
    leading = () if layers is None else (layers,)
    numbers: tuple[float, ...] = (0.0,) * 3
    given, per_column, bins = None, False, 0
    if isinstance(slopes, Spline) and layers != 0:
        given, bins = spline.table_of(slopes, D, layers), slopes.bins
    elif isinstance(slopes, Tensor) and layers != 0:
        if slopes.shape not in ((*leading, 3), (*leading, 3, D)) or not slopes.is_contiguous():
            shapes = [[*leading, 3], [*leading, 3, D]]
            raise ValueError(
                f"slopes must be contiguous {shapes[0]} or {shapes[1]}, got {list(slopes.shape)}"
            )
        given, per_column = slopes, slopes.dim() == len(leading) + 2
    else:
        none = slopes is None or is_learnt(slopes)
        numbers = (1.0, 1.0, 1.0) if none else tuple(map(float, slopes))  # type: ignore[arg-type]
    constants = (slopes is not None, per_column, steps, bins)
    return Activation(given, *numbers, *map(tl.constexpr, constants))


def is_learnt(slopes: Slopes | None) -> bool:
    """Whether the slopes have a gradient."""
    return isinstance(slopes, (Tensor, Spline))


def slope_rows(slopes: Slopes | None) -> int:
    """How many rows of sums the slopes' gradient takes; 0 where they have none."""
    if isinstance(slopes, Spline):
        return spline.gradient_rows(slopes)
    return PARAMETERS.value if is_learnt(slopes) else 0


def steps_of(slopes: Slopes, steps: int | None) -> int:
    """``steps`` of the inverse, or where None as many as float slopes need, ``LEARNT_STEPS`` for a tensor; a
    spline takes none."""
    if isinstance(slopes, Spline):
        return 0
    if steps is None:
        return LEARNT_STEPS if isinstance(slopes, Tensor) else inverse_steps(slopes[0] / slopes[1])
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


def activation_forward(x: Tensor, slopes: Slopes, *, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """(φ(x) [N, D], Σ log φ′ [N] float32 or None) of contiguous rows x [N, D], float32 or bfloat16."""
    check_rows("x", x, dims=2)
    y, total = outputs_by_row(x, logabsdet)
    row_wise(x, y, total, activation_of(slopes, x.shape[1]), inverse=False)
    return y, total


def activation_inverse(
    y: Tensor, slopes: Slopes, *, logabsdet: bool, steps: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """(φ⁻¹(y) [N, D], −Σ log φ′ [N] float32 or None) of contiguous rows y [N, D], float32 or bfloat16.

    ``steps`` ≥ 1 of Halley's iteration: by default as many as float slopes need, or ``LEARNT_STEPS`` for a
    tensor, since to look at its values the host would have to wait for the device.
    """
    check_rows("y", y, dims=2)
    x, total = outputs_by_row(y, logabsdet)
    activation = activation_of(slopes, y.shape[1], steps=steps_of(slopes, steps))
    row_wise(y, x, total, activation, inverse=True)
    return x, total


def outputs_by_row(x: Tensor, logabsdet: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for rows like x [..., D] and, if asked for, a float32 for each."""
    total = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if logabsdet else None
    return torch.empty_like(x), total


def row_wise(x: Tensor, y: Tensor, total: Tensor | None, activation: Activation, *, inverse: bool) -> None:
    """y ← φ(x) and total ← Σ log φ′(x), or, ``inverse``, φ⁻¹(x) and −Σ log φ′(y), of rows [..., D]."""
    D = x.shape[-1]
    N = x.numel() // D
    tile = tiles.activation_tile("inverse" if inverse else "forward", D)
    launch(
        *(activation_kernel, (tiles.ceil_div(N, tile.rows),), tile),
        *(x, y, total, activation, N, D),
        INVERSE=inverse,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def activation_backward(
    grad_y: Tensor, grad_logabsdet: Tensor | None, x: Tensor, slopes: Slopes
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [N, D], and of ``slopes`` if a tensor, from those of φ(x) [N, D] and of Σ log φ′(x) [N].

    g_x = g_y·φ′ + g_ld·φ″/φ′, and g_θ = Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ for θ = a, c, κ. ``grad_y`` and x are
    contiguous and of one dtype, float32 or bfloat16, and so is the gradient of x; ``grad_logabsdet`` and the
    gradient of slopes, in their shape, are float32. One launch, and one sum of its programs' sums.
    """
    grad_x, _, grad_slopes = row_gradients(
        *_one_member(grad_y, grad_logabsdet, x), slopes, inverse=False, column_sums=False
    )
    return grad_x.squeeze(0), grad_slopes


def activation_inverse_backward(
    grad_x: Tensor, grad_logabsdet: Tensor | None, x: Tensor, slopes: Slopes
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y [N, D], and of ``slopes`` if a tensor, from those of x = φ⁻¹(y) and of −Σ log φ′(x) [N].

    g_y = (g_x − g_ld·φ″/φ′)/φ′, and g_θ = −Σ g_y·∂φ/∂θ + g_ld·∂log φ′/∂θ for θ = a, c, κ, all at x, which
    the inverse returned; otherwise as ``activation_backward``.
    """
    grad_y, _, grad_slopes = row_gradients(
        *_one_member(grad_x, grad_logabsdet, x), slopes, inverse=True, column_sums=False
    )
    return grad_y.squeeze(0), grad_slopes


def _one_member(grad: Tensor, grad_logabsdet: Tensor | None, x: Tensor) -> tuple[Any, Any, Any]:
    """Rows [N, D] as those of K = 1 member."""
    check_rows("x", x, dims=2)
    return (
        grad.unsqueeze(0),
        None if grad_logabsdet is None else grad_logabsdet.unsqueeze(0),
        x.unsqueeze(0),
    )


def row_gradients(
    grad: Tensor,
    grad_logabsdet: Tensor | None,
    x: Tensor,
    slopes: Slopes,
    *,
    inverse: bool,
    column_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of x, its sums over the rows [K, D] or None, gradient of ``slopes`` or None).

    ``activation_backward``, or, ``inverse``, ``activation_inverse_backward``, for the rows [K, N, D] of K
    members, ``grad_logabsdet`` [K, N]; with ``column_sums``, float32, in the same launch.
    """
    check_rows("x", x)
    K, N, D = x.shape
    check_parameter("the gradient of the rows", grad, (K, N, D), x.dtype)
    check_parameter("grad_logabsdet", grad_logabsdet, (K, N), torch.float32)
    slope_sums = slope_rows(slopes)
    tile = tiles.activation_tile("backward", D)
    blocks, programs = tiles.ceil_div(D, tile.columns), tiles.ceil_div(N, tile.rows)
    out = torch.empty_like(x)
    if column_sums or slope_sums:
        programs = min(programs, tiles.programs(8, K * blocks, tiles.architecture(x)))
    sums = memory_for_sums(x, programs, column_sums, slope_sums)
    launch(
        *(activation_bwd_kernel, (programs * blocks, K), tile),
        *(grad, grad_logabsdet, x, out, sums, activation_of(slopes, D), N, D),
        INVERSE=inverse,
        COLUMN_SUMS=column_sums,
        SLOPE_SUMS=slope_sums,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return out, *split_sums(sums, slopes, column_sums)


def memory_for_sums(x: Tensor, programs: int, column_sums: bool, slope_sums: int) -> Tensor | None:
    """For the sums over rows x [K, N, D] that each program keeps, of the slopes' gradient in ``slope_sums``
    rows (``slope_rows``); None for none."""
    K, _, D = x.shape
    if not (column_sums or slope_sums):
        return None
    shape = (K, programs, column_sums + slope_sums, D)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def split_sums(
    sums: Tensor | None, slopes: Slopes | None, column_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """([K, D] or None, gradient of ``slopes`` or None) of the programs' sums [K, programs, rows, D]."""
    if sums is None:
        return None, None
    totals = sums.sum(1)
    columns = totals[:, 0].contiguous() if column_sums else None
    return columns, slopes_gradient(totals[:, int(column_sums) :].sum(0), slopes)


def slopes_gradient(sums: Tensor, slopes: Slopes | None) -> Tensor | None:
    """The gradient of ``slopes``, or None, from the sums [..., rows, D] of all programs."""
    if isinstance(slopes, Spline):
        return spline.parameter_gradient(sums)
    if not isinstance(slopes, Tensor):
        return None
    return sums if slopes.dim() == sums.dim() else sums.sum(-1)
