"""Where and in what the suites of ``test_suites.py`` are run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suites")
    group.addoption("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    group.addoption("--dtype", default="float32", choices=("float32", "bfloat16"), help="default float32")
    group.addoption("--scale", default="quick", choices=("quick", "all"), help="default quick")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contest."""
    if "spec" not in metafunc.fixturenames:
        return
    from lunet_fast.bench import results

    scale = metafunc.config.getoption("--scale")
    specs = [spec for suite in results.SUITES.values() for spec in suite.specs(scale)]
    metafunc.parametrize("spec", specs, ids=[f"{spec.suite}: {spec}" for spec in specs])
