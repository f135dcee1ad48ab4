"""Rotations of a KV group's value neurons, to be absorbed in its value and output projections.

A rotation V of the value space leaves attention's function as it is: values become x W_vᵀ V and output slices W_o V.
What it buys is a basis in which some neurons matter little and can go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors

#: The least eigenvalue of a Gram matrix, over the mean of its diagonal. Float32 sums leave those of fewer tokens than
#: channels anywhere near zero, below it too.
LEAST_EIGENVALUE = 1e-6


def uncorrelated_rotation(value_gram: Tensor) -> Tensor:
    """The rotation after which a group's value neurons are uncorrelated, by falling energy: PCA of what they carry.

    Args:
        value_gram: (groups, v, v), the second moment of the attended values, averaged over a group's query heads.

    Returns:
        (groups, v, v) orthogonal, of the same dtype.
    """
    return leading_eigenvectors(value_gram.double()).to(value_gram.dtype)


def orthogonal_output_rotation(output_weights: Tensor, output_rms: Tensor) -> Tensor:
    """The rotation after which a group's output columns are orthogonal, by falling energy (Olica's fast form).

    The output slices of the group's query heads, rows scaled by the output's root mean square, are stacked to a
    matrix S (m·d, v); V holds its right singular vectors, found as the eigenvectors of SᵀS. Working on this factor in
    place of the d×d product of W_v and W_o is what makes the form fast.

    Args:
        output_weights: (groups, m, d, v), the output projection's columns for each of a group's m query heads.
        output_rms: (d,).

    Returns:
        (groups, v, v) orthogonal, of the weights' dtype.
    """
    scaled = (output_weights * output_rms[:, None]).flatten(1, 2).double()
    return leading_eigenvectors(scaled.mT @ scaled).to(output_weights.dtype)


def output_aware_rotation(output_weights: Tensor, value_gram: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation after which a group's first value neurons are those that its output can least do without.

    With H = L Lᵀ the values' second moment and W the group's stacked output slices, the least error that v of the
    directions leave is the sum of the squared singular values of W L after the first v, by Eckart and Young. Spans of
    leading directions are nested, so one orthogonal basis holds the best for every v.

    Args:
        output_weights: (groups, m, d, v), the output projection's columns for each of a group's m query heads. Errors
            count by their Euclidean norm: for another metric, multiply the weights by its root.
        value_gram: (groups, v, v), the second moment of the attended values, averaged over a group's query heads.

    Returns:
        (groups, v, v) orthogonal, of the weights' dtype; and the error tr(ΔHΔᵀ) when the first 0, 1... v neurons stay,
        (groups, v + 1) in float64.
    """
    stacked, gram = output_weights.flatten(1, 2).double(), value_gram.double()
    scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    powers, axes = torch.linalg.eigh(gram)
    root = torch.where(scale > 0, powers.maximum(LEAST_EIGENVALUE * scale), 1.0).sqrt()[:, None]
    factor = axes * root
    seen = factor.mT @ (stacked.mT @ stacked) @ factor
    vectors = leading_eigenvectors(seen)
    energies = (vectors * (seen @ vectors)).sum(dim=1).clamp(min=0)
    errors = torch.cat([energies.flip(1).cumsum(1).flip(1), torch.zeros_like(energies[:, :1])], dim=1)
    directions = (axes / root) @ vectors
    return torch.linalg.qr(directions).Q.to(output_weights.dtype), errors
