"""Outlier-weighted layer sparsities (OWL, Yin et al., ICML 2024): a layer with more outliers loses less."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def outlier_ratio(weighted_magnitudes: list[Tensor], multiple: float) -> Tensor:
    """The share of a layer's |W|·rms(x) entries above ``multiple`` times the layer's mean, ()."""
    entries = sum(magnitudes.numel() for magnitudes in weighted_magnitudes)
    mean = reduce(torch.add, (magnitudes.sum() for magnitudes in weighted_magnitudes)) / entries
    return reduce(torch.add, ((magnitudes > multiple * mean).sum() for magnitudes in weighted_magnitudes)) / entries


def outlier_weighted(sparsity: float, ratios: Tensor, span: float) -> Tensor:
    """Layer sparsities of mean ``sparsity``, within ± ``span`` of it, falling with the ``ratios`` of outliers, (L,)."""
    excess = ratios.double() - ratios.double().mean()
    largest = excess.abs().max()
    span = min(span, sparsity, 1 - sparsity)
    return sparsity - span * (excess / largest if largest > 0 else torch.zeros_like(excess))
