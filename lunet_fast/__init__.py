"""lunet-fast: LU-factorised invertible layers for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lunet_fast import functional
from lunet_fast.layers.activations import BijectiveActivation, GeneralizedLeakySoftplus, LeakySoftplus
from lunet_fast.layers.conditional import ConditionalLUNet
from lunet_fast.layers.flow import LUFlow, NormalMixture, StandardNormal
from lunet_fast.layers.lu_dense import LUDense
from lunet_fast.layers.lunet import Condition, ConditionWarning, LUNet
from lunet_fast.ops import reference
from lunet_fast.ops.dispatch import get_backend, set_backend

if TYPE_CHECKING:
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
    "NormalMixture",
    "StandardNormal",
    "functional",
    "get_backend",
    "reference",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    # The recommender needs pandas; someone who wants the layers alone should not wait for it.
    if name == "LUNetRecommender":
        return importlib.import_module("lunet_fast.recsys.serving.recommend").LUNetRecommender
    raise AttributeError(f"module 'lunet_fast' has no attribute {name!r}")
