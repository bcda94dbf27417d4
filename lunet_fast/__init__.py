"""lunet-fast: LU-factorised invertible layers for PyTorch.

A public name is imported when it is first used (PEP 562), so that ``lunet-fast --help`` does not wait for
PyTorch. The operations ``torch.ops.lunet_fast.*`` are registered with the first of them; a program that loads
an exported graph and needs nothing else says ``import lunet_fast.functional``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunet_fast import functional
    from lunet_fast.layers.activations import BijectiveActivation, GeneralizedLeakySoftplus, LeakySoftplus
    from lunet_fast.layers.cached import cached
    from lunet_fast.layers.conditional import ConditionalLUNet
    from lunet_fast.layers.flow import LUFlow, NormalMixture, StandardNormal
    from lunet_fast.layers.lu_dense import LUDense
    from lunet_fast.layers.lunet import Condition, ConditionWarning, LUNet
    from lunet_fast.layers.splines import MonotoneSpline
    from lunet_fast.ops import reference
    from lunet_fast.ops.dispatch import get_backend, set_backend
    from lunet_fast.recsys.serving.recommend import LUNetRecommender

__version__ = "0.1.0"

__all__ = [
    "BijectiveActivation",
    "Condition",
    "ConditionWarning",
    "ConditionalLUNet",
    "GeneralizedLeakySoftplus",
    "LUDense",
    "LUFlow",
    "LUNet",
    "LUNetRecommender",
    "LeakySoftplus",
    "MonotoneSpline",
    "NormalMixture",
    "StandardNormal",
    "cached",
    "functional",
    "get_backend",
    "reference",
    "set_backend",
]

_MODULES = {
    "BijectiveActivation": "layers.activations",
    "Condition": "layers.lunet",
    "ConditionWarning": "layers.lunet",
    "ConditionalLUNet": "layers.conditional",
    "GeneralizedLeakySoftplus": "layers.activations",
    "LUDense": "layers.lu_dense",
    "LUFlow": "layers.flow",
    "LUNet": "layers.lunet",
    "LUNetRecommender": "recsys.serving.recommend",
    "LeakySoftplus": "layers.activations",
    "MonotoneSpline": "layers.splines",
    "NormalMixture": "layers.flow",
    "StandardNormal": "layers.flow",
    "cached": "layers.cached",
    "functional": "functional",
    "get_backend": "ops.dispatch",
    "reference": "ops.reference",
    "set_backend": "ops.dispatch",
}
"""Where each public name is; ``functional`` and ``reference`` are modules themselves."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lunet_fast' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"lunet_fast.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if name != "LUNetRecommender" or (error.name or "").startswith("lunet_fast"):
            raise
        raise ImportError(
            f"LUNetRecommender needs {error.name}: pip install 'lunet-fast[train]'", name=error.name
        ) from error
    value = getattr(module, name, module)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
