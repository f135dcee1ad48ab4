"""The kernels that torch's operations run: how many floating-point operations of which kind, and bytes gone over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten

#: The kinds of operations, which hardware is more or less fast at: products of 16-bit numbers, all else in float32 and
#: in float64, and decompositions into eigenvectors and singular vectors.
HALF, FLOAT32, FLOAT64, EIGEN = "half", "float32", "float64", "eigen"
#: No operations but passes over arrays, and copies between a GPU and its host.
PASS, LINK = "memory", "link"


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel.

    Attributes:
        kind: of its operations.
        device: the kind of device that it runs on.
        flops: floating-point operations.
        bytes: read and written.
        workspace: bytes that it takes while it runs.
    """

    kind: str
    device: str
    flops: float
    bytes: float
    workspace: float = 0.0


def kernel_of(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: list[Tensor], made: list[Tensor]
) -> Kernel | None:
    """What an operation runs; None where that is nothing, as of views and of memory that is not filled.

    Args:
        function: the operation.
        args, kwargs: its arguments.
        given: the tensors among them.
        made: those that it gave.
    """
    name = function.overloadpacket.__name__
    if not made or name.startswith(NOTHING) or is_view(function):
        return None
    device, devices = made[0].device.type, {tensor.device.type for tensor in (*given, *made)}
    if "meta" in devices:
        return None
    if len(devices) > 1 and name in COPIES:
        return Kernel(LINK, device, 0.0, size_of(made[0]))
    if name in DECOMPOSITIONS:
        return Kernel(EIGEN, device, *DECOMPOSITIONS[name](given[0], args, kwargs))
    if flops := flops_of(function, name, args, kwargs, given, made):
        workspace = WORKSPACES.get(name, _none)(given) if device != "cpu" else 0.0
        return Kernel(kind_of(given), device, flops, sum(map(size_of, (*given, *made))), workspace)
    return Kernel(PASS, device, 0.0, passed(name, given, made))


#: Operations by what their names begin with that do nothing.
NOTHING = ("empty", "new_empty", "detach", "_fused_sdp_choice", "lift_fresh", "_unsafe_view", "_reshape_alias")
COPIES = ("_to_copy", "copy_", "copy")
#: Those that read no more of a large tensor than they give.
PICKS = ("index", "gather", "index_select", "embedding")


def is_view(function: Any) -> bool:
    """Whether an operation gives its argument's memory under another shape."""
    returns = function._schema.returns
    return bool(returns) and all(each.alias_info is not None and not each.alias_info.is_write for each in returns)


def passed(name: str, given: list[Tensor], made: list[Tensor]) -> float:
    if name in PICKS:
        return 2.0 * sum(map(size_of, made))
    return float(sum(map(size_of, (*given, *made))))


def size_of(tensor: Tensor) -> int:
    """Bytes of its numbers, those that it repeats once."""
    return tensor.itemsize * prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def kind_of(given: list[Tensor]) -> str:
    """Products of float32 count as such of 16 bits where torch is told that these hold all of their operands."""
    dtype = given[0].dtype
    if dtype == torch.float64:
        return FLOAT64
    is_half = dtype.itemsize == 2 or torch.get_float32_matmul_precision() == "medium"
    return HALF if is_half else FLOAT32


def flops_of(
    function: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: list[Tensor],
    made: list[Tensor],
) -> float:
    """Floating-point operations of products, attention and solves; 0 of all else."""
    if solve := SOLVES.get(name):
        return solve(given)
    if attention := ATTENTION.get(name):
        return float(attention(*(tensor.shape for tensor in given)))
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=made[0]))
    if name.removesuffix("_") in ("mv", "addmv", "dot", "ger"):
        return 2.0 * max(tensor.numel() for tensor in given)
    return 0.0


ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_: sdpa_flop(q, k, v),
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda g, q, k, v, *_: sdpa_backward_flop(g, q, k, v),
}


# ---------------------------------------------------------------- linear algebra, which torch's counter does not know


def _square(tensor: Tensor) -> tuple[int, int]:
    """How many matrices a tensor holds, and how many rows each has."""
    return prod(tensor.shape[:-2]), tensor.shape[-1]


def _cholesky(given: list[Tensor]) -> float:
    count, n = _square(given[0])
    return count * n**3 / 3


def _cholesky_inverse(given: list[Tensor]) -> float:
    count, n = _square(given[0])
    return count * 2 * n**3 / 3


def _triangular(given: list[Tensor]) -> float:
    count, n = _square(given[0])
    return 1.0 * n * given[1].numel() if count else 0.0


def _cholesky_solve(given: list[Tensor]) -> float:
    return 2.0 * given[1].shape[-1] * given[0].numel()


def _orthonormal(given: list[Tensor]) -> float:
    """Householder's reflections, and the basis made of them."""
    rows, columns = given[0].shape[-2:]
    least = min(rows, columns)
    return prod(given[0].shape[:-2]) * (4.0 * rows * columns * least - 4 / 3 * least**3)


def _inverse(given: list[Tensor]) -> float:
    count, n = _square(given[0])
    return count * 2.0 * n**3


def _lu(given: list[Tensor]) -> float:
    count, n = _square(given[0])
    return count * 2 * n**3 / 3


SOLVES: dict[str, Callable[[list[Tensor]], float]] = {
    "linalg_cholesky_ex": _cholesky,
    "cholesky_inverse": _cholesky_inverse,
    "linalg_solve_triangular": _triangular,
    "cholesky_solve": _cholesky_solve,
    "_cholesky_solve_helper": _cholesky_solve,
    "linalg_qr": _orthonormal,
    "linalg_inv_ex": _inverse,
    "linalg_lu_factor_ex": _lu,
    "_linalg_solve_ex": _lu,
}


# ---------------------------------------------------------------- what kernels of a GPU take while they run


def _none(given: list[Tensor]) -> float:
    return 0.0


def _one_more(given: list[Tensor]) -> float:
    """Another matrix like the first."""
    return size_of(given[0])


def _attention_backward(given: list[Tensor]) -> float:
    """The queries' gradient in float32, and those of keys and values for each query head."""
    _, query, key, _ = given[:4]
    return 4.0 * query.numel() + (2.0 * size_of(query) if key.shape[1] != query.shape[1] else 0.0)


WORKSPACES: dict[str, Callable[[list[Tensor]], float]] = {
    "cholesky_inverse": _one_more,
    "linalg_cholesky_ex": _one_more,
    "linalg_solve_triangular": lambda given: size_of(given[1]),
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
}


def _eigenvectors(matrix: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float, float]:
    """Operations, bytes and workspace: 9n³ with vectors, 4n³/3 without; LAPACK's own copies are two matrices."""
    count, n = _square(matrix)
    with_vectors = args[2] if len(args) > 2 else kwargs.get("compute_v", True)
    size = matrix.itemsize * n * n
    return count * (9.0 if with_vectors else 4 / 3) * n**3, 2.0 * count * size, (2.0 if with_vectors else 0.0) * size


def _singular_vectors(matrix: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, float, float]:
    rows, columns = matrix.shape[-2:]
    least, count = min(rows, columns), prod(matrix.shape[:-2])
    size = matrix.itemsize * rows * columns
    return count * (4.0 * rows * columns * least + 9.0 * least**3), 2.0 * count * size, 2.0 * size


DECOMPOSITIONS: dict[str, Callable[..., tuple[float, float, float]]] = {
    "_linalg_eigh": _eigenvectors,
    "_linalg_svd": _singular_vectors,
}
