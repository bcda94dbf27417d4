"""The table of a single training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lunet_fast.recsys.data.datasets import dataset_title

TABLE_2 = (
    ("paper: classic MLP", "ML-100K", 0.9200, 0.0050),
    ("paper: invertible model", "ML-100K", 0.8880, 0.0000),
    ("paper: invertible model", "ML-1M", 0.7955, 0.0000),
)
"""The paper's table 2: model, data, test MSE, embedding reconstruction error."""

PRINTED = {data: mse for model, data, mse, _ in TABLE_2 if "invertible" in model}
"""The test MSE that the paper prints for its invertible model, by data set."""


def table_2(values: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (model, data, test MSE, reconstruction error): the paper's table 2, then the run's own figures.

    ``values`` is the content of ``metrics.json``. Our errors are far below the four decimals of the paper, so
    theirs are written as printed and ours with an exponent.
    """
    rows = [(model, data, f"{mse:.4f}", f"{error:.4f}") for model, data, mse, error in TABLE_2]
    data = dataset_title(str(values["dataset"]))
    if "mlp_test_mse" in values:
        error = f"{values['mlp_reconstruction_error']:.4f}"
        rows.append(("ours: classic MLP", data, f"{values['mlp_test_mse']:.4f}", error))
    if "test_mse" in values:
        error = f"{values['reconstruction_error']:.1e}"
        # Runs of before do not say; their f was always a network.
        f = "f = identity" if values.get("network") == "identity" else "LU-Net"
        rows.append((f"ours: {f}, recipe {values['recipe']}", data, f"{values['test_mse']:.4f}", error))
    return rows
