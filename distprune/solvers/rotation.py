"""Rotations of a KV group's value neurons, to be absorbed in its value and output projections.

A rotation V of the value space leaves attention's function as it is: values become x W_vᵀ V and output slices W_o V.
What it buys is a basis in which some neurons matter little and can go.
"""

from __future__ import annotations

from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors


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
