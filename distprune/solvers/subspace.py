"""The leading left singular vectors of a matrix, without the others where there are many others."""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.factorization import leading_eigenvectors

#: Below this size all vectors are found as soon as some.
SMALL = 1024
#: Above this share of all vectors, iterating for them takes longer than finding all.
FEW = 1 / 4
#: Iterations, and vectors beside the wanted ones as a share of all. On a matrix of independent normal entries, whose
#: singular values fall as slowly as any, the error of the truncation is then 0.07% above the least at most.
ITERATIONS, SPARE = 4, 1 / 8


def leading_left_vectors(matrix: Tensor, count: int) -> Tensor:
    """The left singular vectors of ``matrix`` M, (m, n), of the ``count`` greatest singular values, (m, count) in
    float32, by falling singular value; or, where they are few of many, vectors whose truncation of M is as good.
    """
    if is_few(count, *matrix.shape):
        vectors = iterated(matrix.float(), count)
        if vectors.isfinite().all():
            return vectors
    return decomposed(matrix, count)


def is_few(count: int, rows: int, columns: int) -> bool:
    """Whether so many vectors of a matrix of that shape are quicker iterated for than found among all."""
    least = min(rows, columns)
    return least >= SMALL and count <= FEW * least


def decomposed(matrix: Tensor, count: int) -> Tensor:
    """By the eigenvectors of M Mᵀ. In float64: it squares the singular values, and beside an outlier channel float32
    loses the others."""
    matrix = matrix.double()
    gram = matrix @ matrix.mT
    del matrix
    return leading_eigenvectors(gram, count).float()


def iterated(matrix: Tensor, count: int) -> Tensor:
    """By block subspace iteration and a Rayleigh-Ritz step (Halko, Martinsson & Tropp, SIAM Review 2011).

    The basis is made orthonormal after each product with M or Mᵀ, so that float32 serves beside outlier channels. It
    starts from the same random numbers every time.
    """
    width = count + int(SPARE * min(matrix.shape))
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    left = torch.linalg.qr(matrix @ start).Q
    for _ in range(ITERATIONS):
        right = torch.linalg.qr(matrix.mT @ left).Q
        left = torch.linalg.qr(matrix @ right).Q
    # M is now nearly left @ inner, the singular vectors of which take little.
    inner = torch.linalg.qr(matrix.mT @ left, mode="r").R.mT.double()
    return left @ leading_eigenvectors(inner @ inner.mT, count).float()
