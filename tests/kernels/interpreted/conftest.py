"""These tests run the kernels in Triton's interpreter, which must be chosen before Triton is imported, or
execute what Triton compiles.

``tests/kernels/test_interpreter.py`` runs them in a process of their own; by hand:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted``, and on the PTX for an architecture
``PTX_ARCHITECTURE=80 python -m pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

#: Whose PTX is executed; 0 for the interpreter.
ARCHITECTURE = int(os.environ.get("PTX_ARCHITECTURE", "0"))

collect_ignore_glob = [] if ARCHITECTURE or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


if not ARCHITECTURE and not collect_ignore_glob:
    import triton
    from triton.runtime.interpreter import InterpreterBuilder

    if triton.__version__ < "3.7":
        # Without NaN's propagation the other operand is the result; there it was NaN, as NumPy's minimum is,
        # and a bin's number made of it read from nowhere.
        InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
        InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)


class TorchRandom:
    """PyTorch's generator, which hypothesis resets before each example: a failing one can be replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def compiled_code() -> Iterator[None]:
    """Let launchers execute the PTX, if so asked, and find nothing wrong in it."""
    if not ARCHITECTURE:
        yield
        return
    from tests.ptx.cases import findings, on_ptx

    with on_ptx(ARCHITECTURE) as runs:
        yield
    assert findings(runs) == []
