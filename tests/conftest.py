"""What every test runs under: poisoned memory, one thread, a fixed seed, hypothesis profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HERE = Path(__file__).parent

# The quick profile draws the same examples at every run; the thorough one new ones each time.
settings.register_profile("quick", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if "slow" in expression and "not slow" not in expression:
        settings.load_profile("thorough")
    # Tests use small tensors, where a second thread costs more than it gives.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let torch.empty, empty_like, new_empty and empty_strided give NaN (the largest integer for integers).

    PyTorch fills new memory itself when algorithms are to be deterministic, below vmap, torch.compile
    and torch.export, and also inside its own operations. Deterministic algorithms would hide
    the differences between two runs that the recommender's tests look for, so those run without.
    """
    if HERE / "recsys" in request.path.parents:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
