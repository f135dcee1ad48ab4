"""A linear map beside a pruned one, from inputs of its own, that makes up for what has gone.

The idea of Olica's linear calibration (He & Lin, ICML 2025): what an FFN's dropped neurons gave is in part a linear
function of the FFN's input, which is still there. Here the neurons that stay are fitted along with it, so that the map
is asked for nothing that they can give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.selection import others


def linear_branch(
    weight: Tensor, kept: Tensor, gram: Tensor, input_gram: Tensor, cross: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The B of argmin over B and D of E‖z W_goneᵀ - z_kept Dᵀ - x Bᵀ‖² + λ‖D‖² + μ‖B‖².

    λ and μ are ``damping`` times the mean of the diagonals of E[zᵀz] and E[xᵀx].

    Args:
        weight: W, (out, f).
        kept: indices of the inputs z that stay, (k,).
        gram: E[zᵀz], (f, f).
        input_gram: E[xᵀx], (d, d).
        cross: E[xᵀz], (d, f).
        damping: > 0.

    Returns:
        B, (out, d), and what its error is measured by: the damped second moment of what ``kept`` does not tell of x,
        (d, d), both in float32. tr(B S Bᵀ) is how much less the least error is than without x.

    Raises:
        torch.linalg.LinAlgError: the moments are further from positive semidefinite than the damping makes up for.
    """
    gone = others(kept, len(gram))
    lost = weight[:, gone].double().mT

    known = gram[kept[:, None], kept].double()
    known.diagonal().add_(penalty(gram, damping))
    factor = torch.linalg.cholesky(known, out=known)
    coupling = torch.linalg.solve_triangular(factor, cross[:, kept].double().mT, upper=False)
    explained = torch.linalg.solve_triangular(factor, gram[kept[:, None], gone].double() @ lost, upper=False)

    unknown = input_gram.double() - coupling.mT @ coupling
    unknown.diagonal().add_(penalty(input_gram, damping))
    missing = cross[:, gone].double() @ lost - coupling.mT @ explained
    solution = torch.cholesky_solve(missing, torch.linalg.cholesky(unknown))
    return solution.mT.float(), unknown.float()


def penalty(gram: Tensor, damping: float) -> Tensor:
    """The mean of the diagonal, damped; one where there is nothing to measure by."""
    scale = gram.diagonal().mean().double()
    return torch.where(scale > 0, damping * scale, 1.0)
