# SPDX-License-Identifier: Apache-2.0
"""The contract: schema, checks and fake of every op, in one place.

Each op is defined once in torch's dispatcher under `lorax_kernels::`. Its reference
(`lorax_kernels.ops`) answers on every device; the compiled extension adds kernels for CUDA tensors
under the same name, so an op exists, traces and runs where nothing was built. Every public op
function runs its check before any backend sees a tensor.
"""

from collections.abc import Callable, Sequence

import torch

NAMESPACE = "lorax_kernels"
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _define(name: str, schema: str, fake: Callable) -> None:
    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


def _block(name: str, X: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A batch of matrices with at least one row, one column and a known dtype."""
    if X.dim() != 3:
        raise ValueError(f"{name} must be a batch (b, rows, columns), got shape {tuple(X.shape)}")
    if X.dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be one of {known}, got {X.dtype}; convert it first")


def _same(what: str, left: object, right: object) -> None:
    if left != right:
        raise ValueError(f"{what} must agree, got {left} and {right}")


def check_thin_matmul(W: torch.Tensor, X: torch.Tensor, transpose: bool, pieces: int) -> None:
    """Raises ValueError or TypeError unless `thin_matmul` can take these arguments."""
    _block("W", W, WEIGHT_DTYPES)
    _block("X", X, (torch.float32,))
    _same("batch sizes of W and X", W.shape[0], X.shape[0])
    _same("inner sizes of W and X", W.shape[1 if transpose else 2], X.shape[1])
    _same("devices of W and X", W.device, X.device)
    if pieces not in (1, 2, 3):
        raise ValueError(f"pieces must be 1, 2 or 3, got {pieces}")


def _thin_matmul_fake(
    W: torch.Tensor, X: torch.Tensor, transpose: bool, pieces: int
) -> torch.Tensor:
    check_thin_matmul(W, X, transpose, pieces)
    return X.new_empty(W.shape[0], W.shape[2 if transpose else 1], X.shape[2])


def check_normal_matmul(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> None:
    """Raises ValueError or TypeError unless `normal_matmul` can take these arguments."""
    if W.dtype != torch.float16:
        raise TypeError(
            f"W must be float16, got {W.dtype}; use thin_matmul twice for other weights"
        )
    check_thin_matmul(W, X, transpose, 1)


def _normal_matmul_fake(W: torch.Tensor, X: torch.Tensor, transpose: bool) -> torch.Tensor:
    check_normal_matmul(W, X, transpose)
    return torch.empty_like(X, memory_format=torch.contiguous_format)


def check_gram(X: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError or TypeError unless `gram` can take these arguments."""
    _block("X", X, (*WEIGHT_DTYPES, torch.float64))
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a Gram matrix is float32 or float64, got {dtype}")


def _gram_fake(X: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_gram(X, dtype)
    return X.new_empty(X.shape[0], X.shape[2], X.shape[2], dtype=dtype)


def check_gram_halves(X: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `gram_halves` can take this batch."""
    _block("X", X, (torch.float16,))


def _gram_halves_fake(X: torch.Tensor) -> torch.Tensor:
    check_gram_halves(X)
    return X.new_empty(2, X.shape[0], X.shape[2], X.shape[2])


def check_orthonormalize(X: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `orthonormalize` can take this block."""
    _block("X", X, (torch.float32,))
    if X.shape[2] > X.shape[1]:
        raise ValueError(
            f"a block to orthonormalise needs no more columns than rows, got {tuple(X.shape)}"
        )


def _orthonormalize_fake(X: torch.Tensor, quick: bool) -> torch.Tensor:
    check_orthonormalize(X)
    return torch.empty_like(X, memory_format=torch.contiguous_format)


def check_cholesky_qr(X: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `cholesky_qr` can take this block."""
    check_orthonormalize(X)


def _cholesky_qr_fake(X: torch.Tensor) -> torch.Tensor:
    check_cholesky_qr(X)
    return torch.empty_like(X, memory_format=torch.contiguous_format)


def check_ritz(Q: torch.Tensor, B: torch.Tensor, k: int) -> None:
    """Raises ValueError or TypeError unless `ritz` can take these arguments."""
    _block("Q", Q, (torch.float32,))
    _block("B", B, (torch.float32,))
    _same("batch sizes of Q and B", Q.shape[0], B.shape[0])
    _same("columns of Q and B", Q.shape[2], B.shape[2])
    _same("devices of Q and B", Q.device, B.device)
    if not 1 <= k <= Q.shape[2]:
        raise ValueError(f"k must be from 1 to the {Q.shape[2]} columns of Q, got {k}")


def _ritz_fake(
    Q: torch.Tensor, B: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_ritz(Q, B, k)
    shapes = (Q.shape[0], Q.shape[1], k), (Q.shape[0], k), (B.shape[0], B.shape[1], k)
    U, S, V = (Q.new_empty(shape) for shape in shapes)
    return U, S, V, Q.new_empty(Q.shape[0], dtype=torch.int32)


def check_symmetric_eigh(H: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `symmetric_eigh` can take this batch."""
    _block("H", H, (torch.float32, torch.float64))
    _same("rows and columns of H", H.shape[1], H.shape[2])


def _symmetric_eigh_fake(H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_symmetric_eigh(H)
    return H.new_empty(H.shape[0], H.shape[1]), H.new_empty(H.shape)


def check_subspace_error(C: torch.Tensor, theta: torch.Tensor, known: int, k: int) -> None:
    """Raises ValueError or TypeError unless `subspace_error` can take these arguments."""
    for name, X in (("C", C), ("theta", theta)):
        if X.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {X.dtype}; convert it first")
    if theta.dim() != 2:
        raise ValueError(f"theta must be (b, l), got shape {tuple(theta.shape)}")
    b, l = theta.shape
    if tuple(C.shape) not in ((b, l, l), (b, l)):
        raise ValueError(
            f"C must be {(b, l, l)}, or {(b, l)} of squared lengths, beside theta {(b, l)}; got "
            f"{tuple(C.shape)}"
        )
    for name, number in (("known", known), ("k", k)):
        if not 1 <= number <= l:
            raise ValueError(f"{name} must be from 1 to the {l} values, got {number}")
    _same("devices of C and theta", C.device, theta.device)


def _subspace_error_fake(
    C: torch.Tensor, theta: torch.Tensor, known: int, k: int, rows: int
) -> torch.Tensor:
    check_subspace_error(C, theta, known, k)
    return C.new_empty(3, C.shape[0], dtype=torch.float64)


def check_rotate(X: torch.Tensor, R: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `rotate` can take these arguments."""
    _block("X", X, (torch.float32,))
    _block("R", R, (torch.float32, torch.float64))
    _same("batch sizes of X and R", X.shape[0], R.shape[0])
    _same("inner sizes of X and R", X.shape[2], R.shape[1])
    _same("devices of X and R", X.device, R.device)


def _rotate_fake(X: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    check_rotate(X, R)
    return X.new_empty(X.shape[0], X.shape[1], R.shape[2])


def check_shift(Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> None:
    """Raises ValueError or TypeError unless `shift` can take these arguments."""
    _block("Z", Z, (torch.float32,))
    _block("X", X, (torch.float32,))
    _same("shapes of Z and X", tuple(Z.shape), tuple(X.shape))
    for name, values in (("a", a), ("s", s)):
        if values.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {values.dtype}; convert it first")
        _same(f"devices of Z and {name}", Z.device, values.device)
    _same("shape of a and (batch,)", tuple(a.shape), (Z.shape[0],))
    _same("shape of s and (batch, columns)", tuple(s.shape), (Z.shape[0], Z.shape[2]))
    _same("devices of Z and X", Z.device, X.device)


def _shift_fake(Z: torch.Tensor, X: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    check_shift(Z, X, a, s)
    return torch.empty_like(Z, memory_format=torch.contiguous_format)


def check_stack_halves(matrices: Sequence[torch.Tensor], exponents: Sequence[int]) -> None:
    """Raises ValueError or TypeError unless `stack_halves` can take these lists."""
    if not matrices or len(matrices) != len(exponents):
        raise ValueError(
            "there must be a matrix, and an exponent for each, got "
            f"{len(matrices)} and {len(exponents)}"
        )
    first = matrices[0]
    if first.dim() != 2:
        raise ValueError(f"matrices must have two sides, got shape {tuple(first.shape)}")
    if first.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"matrices must be bfloat16 or float16, got {first.dtype}")
    for matrix in matrices:
        _same("shapes of all matrices", tuple(first.shape), tuple(matrix.shape))
        _same("dtypes of all matrices", first.dtype, matrix.dtype)
        _same("devices of all matrices", first.device, matrix.device)
    for exponent in exponents:
        if abs(exponent) > 200:
            raise ValueError(f"exponents must be from -200 to 200, got {exponent}")


def _stack_halves_fake(
    matrices: Sequence[torch.Tensor], exponents: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    check_stack_halves(matrices, exponents)
    first, b = matrices[0], len(matrices)
    stacked = first.new_empty(b, *first.shape, dtype=torch.float16)
    return stacked, first.new_empty(b, dtype=torch.float32)


def _is_basis(X: torch.Tensor) -> bool:
    return X.dim() == 2 or (X.dim() == 3 and len(X) == 2 and X.dtype == torch.bfloat16)


def check_project(
    blocks: Sequence[torch.Tensor], read: Sequence[torch.Tensor], write: Sequence[torch.Tensor]
) -> None:
    """Raises ValueError or TypeError unless `project` can take these lists."""
    if not len(blocks) == len(read) == len(write):
        raise ValueError(
            "blocks, read and write bases must be lists of one length, got "
            f"{len(blocks)}, {len(read)} and {len(write)}"
        )
    for i, (B, Q, P) in enumerate(zip(blocks, read, write, strict=True)):
        if not (B.is_floating_point() and Q.is_floating_point() and P.is_floating_point()):
            raise TypeError(
                f"entry {i}: block and bases must be floating point, got {B.dtype}, {Q.dtype} "
                f"and {P.dtype}"
            )
        if B.dim() != 2 or not _is_basis(Q) or not _is_basis(P):
            raise ValueError(
                f"entry {i}: block and bases must be matrices, or a basis two bfloat16 pieces "
                f"(2, rows, rank), got shapes {tuple(B.shape)}, {tuple(Q.shape)} and "
                f"{tuple(P.shape)} in {B.dtype}, {Q.dtype} and {P.dtype}"
            )
        _same(f"entry {i}: rows of the block and of its read basis", B.shape[0], Q.shape[-2])
        _same(f"entry {i}: ranks of the two bases", Q.shape[-1], P.shape[-1])
        if not B.device == Q.device == P.device:
            raise ValueError(
                f"entry {i}: block and bases must be on one device, got {B.device}, {Q.device} "
                f"and {P.device}"
            )
    if len({B.device for B in blocks}) > 1:
        raise ValueError(
            "all layers must be on one device, got "
            + ", ".join(sorted({str(B.device) for B in blocks}))
        )


def _project_fake(
    blocks: Sequence[torch.Tensor], read: Sequence[torch.Tensor], write: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    check_project(blocks, read, write)
    return [B.new_empty(P.shape[-2], B.shape[1]) for B, P in zip(blocks, write, strict=True)]


_define(
    "thin_matmul",
    "(Tensor W, Tensor X, bool transpose, int pieces) -> Tensor",
    _thin_matmul_fake,
)
_define("normal_matmul", "(Tensor W, Tensor X, bool transpose) -> Tensor", _normal_matmul_fake)
_define("gram", "(Tensor X, ScalarType dtype) -> Tensor", _gram_fake)
_define("gram_halves", "(Tensor X) -> Tensor", _gram_halves_fake)
_define("orthonormalize", "(Tensor X, bool quick) -> Tensor", _orthonormalize_fake)
_define("cholesky_qr", "(Tensor X) -> Tensor", _cholesky_qr_fake)
_define("ritz", "(Tensor Q, Tensor B, int k) -> (Tensor, Tensor, Tensor, Tensor)", _ritz_fake)
_define("symmetric_eigh", "(Tensor H) -> (Tensor, Tensor)", _symmetric_eigh_fake)
_define(
    "subspace_error",
    "(Tensor C, Tensor theta, int known, int k, int rows) -> Tensor",
    _subspace_error_fake,
)
_define("rotate", "(Tensor X, Tensor R) -> Tensor", _rotate_fake)
_define("shift", "(Tensor Z, Tensor X, Tensor a, Tensor s) -> Tensor", _shift_fake)
_define("project", "(Tensor[] blocks, Tensor[] read, Tensor[] write) -> Tensor[]", _project_fake)
_define(
    "stack_halves",
    "(Tensor[] matrices, int[] exponents) -> (Tensor, Tensor)",
    _stack_halves_fake,
)
