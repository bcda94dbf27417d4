"""These tests run the kernels in Triton's interpreter, which must be chosen before Triton is imported.

``tests/kernels/test_interpreter.py`` runs them in a process of their own; by hand:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os

import hypothesis
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


class TorchRandom:
    """PyTorch's generator, which hypothesis resets before each example: a failing one can be replayed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)
