"""Pictures of splines: what is drawn is φ′."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lunet_fast import MonotoneSpline

pytest.importorskip("matplotlib")

from lunet_fast.density.pictures import show_slopes
from lunet_fast.training.figures import new_figure


def test_slopes_are_drawn_over_each_interval() -> None:
    spline = MonotoneSpline(3, bins=4)
    spline.fit_range(torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5)
    with torch.no_grad():
        spline.raw.normal_()
    axes = new_figure(3.0, 3.0).subplots()
    show_slopes(axes, spline)
    lines = axes.get_lines()
    assert len(lines) == 3
    for line, knots in zip(lines, spline.slopes().detach().T.double().numpy(), strict=True):
        place, slope = line.get_xdata(), line.get_ydata()
        expected = np.interp(place, np.linspace(0, 1, 5), knots)  # constant beyond, linear between
        assert np.allclose(slope, expected, rtol=1e-4)
