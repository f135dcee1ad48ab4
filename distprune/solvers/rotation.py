"""Fused PCA of a value/output product: the rotation that makes value neurons orthogonal (Olica, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors


def neuron_rotation(output_weights: Tensor, output_rms: Tensor) -> Tensor:
    """The rotation V of one KV group's value neurons, ordered by the energy they carry to the output.

    The output slices of the group's query heads, rows scaled by the output's root mean square, are stacked to a
    matrix S (m·d, v); V holds its right singular vectors, found as the eigenvectors of SᵀS. Working on this factor in
    place of the d×d product W_vᵀW_oᵀ is the fast form of the decomposition. With one query head a group it is the
    published one; a group's heads share their values, so they must share the rotation.

    Args:
        output_weights: (groups, m, d, v), the output projection's columns for each of a group's m query heads.
        output_rms: (d,).

    Returns:
        (groups, v, v) orthogonal, in float32: values become x W_vᵀ V and output slices W_o V.
    """
    scaled = (output_weights * output_rms[:, None]).flatten(1, 2).double()
    return leading_eigenvectors(scaled.mT @ scaled).to(output_weights.dtype)
