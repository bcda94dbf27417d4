"""``import lunet_fast`` is cheap, and its public names are there all the same."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

import lunet_fast


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_every_public_name_is_there() -> None:
    assert set(lunet_fast.__all__) == set(lunet_fast._MODULES)
    for name in lunet_fast.__all__:
        assert getattr(lunet_fast, name) is not None
        assert name in dir(lunet_fast)
    with pytest.raises(AttributeError, match="has no attribute 'LUNets'"):
        _ = lunet_fast.LUNets  # type: ignore[attr-defined]


def test_torch_waits_for_the_first_name() -> None:
    done = python(
        "import sys, lunet_fast\n"
        "print('torch' in sys.modules, 'LUNet' in dir(lunet_fast))\n"
        "from lunet_fast import LUNet, functional, reference\n"
        "print('torch' in sys.modules, functional.__name__, reference.__name__, lunet_fast.get_backend())\n"
        "print('pandas' in sys.modules, 'pydantic' in sys.modules)",
        LUNET_FAST_BACKEND="reference",
    )
    assert done.stdout.splitlines() == [
        "False True",
        "True lunet_fast.functional lunet_fast.ops.reference reference",
        "False False",
    ], done.stderr


def test_a_wrong_backend_in_the_environment_is_told_with_the_first_name() -> None:
    done = python("import lunet_fast; lunet_fast.LUNet", LUNET_FAST_BACKEND="abacus")
    assert "environment variable LUNET_FAST_BACKEND" in done.stderr


def test_the_layers_need_neither_pandas_nor_an_extra() -> None:
    extras = ("pandas", "pydantic", "typer", "rich", "matplotlib", "safetensors", "pooch", "pyarrow")
    done = python(
        f"import sys; sys.modules.update(dict.fromkeys({extras!r}))\n"  # None: as if not installed
        "import torch, lunet_fast\n"
        "net = lunet_fast.LUNet(4, 2)\n"
        "print(lunet_fast.LUFlow(net).log_prob(torch.zeros(2, 4)).shape)\n"
        "try:\n    lunet_fast.LUNetRecommender\n"
        "except ImportError as error:\n    print(error)"
    )
    assert done.stdout.splitlines() == [
        "torch.Size([2])",
        "LUNetRecommender needs pandas: pip install 'lunet-fast[train]'",
    ], done.stderr


def test_a_pickled_net_comes_back_where_nothing_is_imported() -> None:
    net = lunet_fast.LUNet(3, 2)
    done = python(
        f"import pickle; net = pickle.loads({pickle.dumps(net)!r})\n"
        "print(type(net).__name__, sum(p.numel() for p in net.parameters()))"
    )
    assert done.stdout.split() == ["LUNet", str(sum(p.numel() for p in net.parameters()))], done.stderr


def test_a_backend_is_set() -> None:
    before = lunet_fast.get_backend()
    lunet_fast.set_backend("reference")
    try:
        assert lunet_fast.get_backend() == "reference"
        assert lunet_fast.LUNet(2, 2)(torch.zeros(1, 2)).shape == (1, 2)
    finally:
        lunet_fast.set_backend(before)
