"""FactoredMatrix: a product of a tall and a wide matrix that is never built."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mechinterp.errors import ModelError


@dataclass(frozen=True, eq=False, repr=False)
class FactoredMatrix:
    """A @ B by its factors, over any leading axes such as heads; its cost is that of the inner size r.

    ``@`` takes a tensor or another `FactoredMatrix` on either side and gives a `FactoredMatrix`, so that
    ``model.W_E @ model.OV(3) @ model.W_U.T``, a vocab × vocab matrix for each head, is held as vocab × d_head
    factors. Indexing selects leading axes: ``model.OV(3)[5]`` is head 5.

    Half-precision factors are held, and computed with, in float32.

    Attributes:
        A: left factor, ``*lead m r``.
        B: right factor, ``*lead r n``; its leading axes broadcast against those of `A`.
    Raises:
        ModelError: shapes that do not fit.
    """

    A: Float[Tensor, "..."]
    B: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        shapes = f"factors of shapes {tuple(self.A.shape)} and {tuple(self.B.shape)}"
        if self.A.ndim < 2 or self.B.ndim < 2:
            raise ModelError(
                f"{shapes} are not both matrices; write x[None] for a row vector x, and x[:, None] for a column"
            )
        if self.A.shape[-1] != self.B.shape[-2]:
            raise ModelError(
                f"{shapes} cannot be multiplied; the last axis of the left one must be as long as the last but one"
                " of the right one"
            )
        try:
            torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        except RuntimeError:
            raise ModelError(
                f"{shapes} have leading axes that do not broadcast; index or unsqueeze one first"
            ) from None
        # At least float32: products of half-precision weights lose the digits that circuits are told apart by.
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32)
        object.__setattr__(self, "A", self.A.to(dtype))
        object.__setattr__(self, "B", self.B.to(dtype))

    @property
    def shape(self) -> torch.Size:
        """Shape of the product, ``*lead m n``."""
        lead = torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        return torch.Size([*lead, self.A.shape[-2], self.B.shape[-1]])

    @property
    def AB(self) -> Float[Tensor, "*lead m n"]:
        """The whole product, built now."""
        return self.A @ self.B

    @property
    def T(self) -> "FactoredMatrix":
        """The last two axes swapped."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def norm(self) -> Float[Tensor, "*lead"]:
        """Frobenius norm."""
        # By QR rather than as the root of trace(AᵀA BBᵀ), which would square the rounding error.
        left, right = torch.linalg.qr(self.A, mode="r").R, torch.linalg.qr(self.B.mT, mode="r").R
        return torch.linalg.matrix_norm(left @ right.mT)

    @property
    def eigenvalues(self) -> Complex[Tensor, "*lead k"]:
        """The min(m, r) eigenvalues of a square product that may differ from zero, in no order.

        Those of the r × r matrix B A, which are also those of A B.

        Raises:
            ModelError: the product is not square.
        """
        if self.shape[-2] != self.shape[-1]:
            raise ModelError(f"a matrix of shape {tuple(self.shape)} has no eigenvalues; use svd()")
        small = self.B @ self.A if self.A.shape[-1] <= self.A.shape[-2] else self.AB
        return torch.linalg.eigvals(small)

    def svd(self) -> tuple[Float[Tensor, "*lead m k"], Float[Tensor, "*lead k"], Float[Tensor, "*lead k n"]]:
        """U, S and Vh with ``U @ diag(S) @ Vh`` the product and k at most min(m, r, n), S falling."""
        left, right = torch.linalg.qr(self.A), torch.linalg.qr(self.B.mT)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        return left.Q @ U, S, Vh @ right.Q.mT

    def __matmul__(self, other: "FactoredMatrix | Float[Tensor, '...']") -> "FactoredMatrix":
        if isinstance(other, FactoredMatrix):
            middle = _product(self.B, other.A)
            if self.A.shape[-1] <= other.A.shape[-1]:
                return FactoredMatrix(self.A, _product(middle, other.B))
            return FactoredMatrix(_product(self.A, middle), other.B)
        if self.A.shape[-1] <= self.B.shape[-1]:
            return FactoredMatrix(self.A, _product(self.B, other))
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Float[Tensor, "..."]) -> "FactoredMatrix":
        if self.A.shape[-1] <= self.A.shape[-2]:
            return FactoredMatrix(_product(other, self.A), self.B)
        return FactoredMatrix(other, self.AB)

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Leading axes selected as torch does: numbers, slices, lists, masks, None."""
        lead = self.shape[:-2]
        chosen: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in chosen) or sum(i is not None for i in chosen) > len(lead):
            raise ModelError(
                f"an index selects among the {len(lead)} leading axes of a matrix of shape {tuple(self.shape)};"
                " use .AB for its rows and columns"
            )
        A = self.A.expand(*lead, *self.A.shape[-2:])
        B = self.B.expand(*lead, *self.B.shape[-2:])
        return FactoredMatrix(A[index], B[index])

    def __repr__(self) -> str:
        dtype = str(self.A.dtype).removeprefix("torch.")
        return f"FactoredMatrix {tuple(self.shape)}, inner size {self.A.shape[-1]}, {dtype} on {self.A.device}"


def _product(left: Tensor, right: Tensor) -> Tensor:
    return FactoredMatrix(left, right).AB  # so that shapes are checked, and dtypes made one, in one place
