"""Rotations of a KV group's value neurons, to be absorbed in its value and output projections.

A rotation V of the value space leaves attention's function as it is: values become x W_vᵀ V and output slices W_o V.
What it buys is a basis in which some neurons matter little and can go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors

#: What keeps a Gram matrix of fewer tokens than channels factorable, over the mean of its diagonal.
JITTER = 1e-6


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
    scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    jitter = torch.where(scale > 0, JITTER * scale, 1.0)[:, None, None]
    factor = torch.linalg.cholesky(gram + jitter * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device))
    seen = factor.mT @ (stacked.mT @ stacked) @ factor
    vectors = leading_eigenvectors(seen)
    energies = (vectors * (seen @ vectors)).sum(dim=1).clamp(min=0)
    errors = torch.cat([energies.flip(1).cumsum(1).flip(1), torch.zeros_like(energies[:, :1])], dim=1)
    directions = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    return torch.linalg.qr(directions).Q.to(output_weights.dtype), errors
