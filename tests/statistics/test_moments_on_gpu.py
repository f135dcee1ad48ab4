"""Moments of activations on a stand-in for a GPU, whose totals are kept in the host's memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretend_gpu import pretend_gpu

from distprune.layers.sites import FFN_OUTPUT, QUERIES
from distprune.statistics import Cross, Gram, HeadGram, LayerStatistics, Mean, Peak, Power, ScalingPower

pytestmark = pytest.mark.alone  # see conftest

WIDTHS = {QUERIES: 720, FFN_OUTPUT: 480, QUERIES.gradient: 720}  # so that products come in several strips of rows
X, Y, G = WIDTHS
EVERYTHING = [Mean(X), Power(X), Peak(X), Gram(X), Cross(X, Y), HeadGram(X, 3), ScalingPower(X, G, 3, 120)]


@pytest.mark.parametrize("moment", EVERYTHING, ids=str)
def test_totals_are_kept_in_the_hosts_memory_if_so_told(moment):
    generator = torch.Generator().manual_seed(0)
    activations = {site: torch.randn(50, width, generator=generator).bfloat16() for site, width in WIDTHS.items()}
    statistics = LayerStatistics([moment], torch.device("cpu"))
    with pretend_gpu() as gpu:
        moved = {site: values.to(gpu) for site, values in activations.items()}
        for start in (0, 25):
            statistics.update({site: values[start : start + 25] for site, values in moved.items()})
    average = statistics._average(moment)
    assert average.device.type == "cpu"
    here = LayerStatistics([moment])
    here.update(activations)
    expected = here._average(moment).double().numpy()
    np.testing.assert_allclose(average.double().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
