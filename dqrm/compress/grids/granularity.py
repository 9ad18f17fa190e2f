"""Which weights share a scale: views of a matrix whose last dimension is one group.

For a weight [R, C] (further dimensions are counted to C):

    kind         size              view                        scale
    tensor                         [1, R * C]                  [1, 1]
    row                            [R, C]                      [R, 1]
    row_groups   groups a matrix   [size, R * C / size]        [size, 1]
    k_groups     columns a group   [R, ceil(C / size), size]   [R, ceil(C / size), 1]

``row_groups`` are DeepSpeed's "groups": blocks of rows. ``k_groups`` are the group_size of GPTQ
and torchao, along the inputs; a last group that is not full is filled with zeros.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["tensor", "row", "row_groups", "k_groups"]


@dataclass(frozen=True)
class Granularity:
    """The weights that one scale is for."""

    kind: Kind = "row"
    size: int = 0
    """Groups of a matrix for row_groups, columns of a group for k_groups, else 0."""

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "row", "row_groups", "k_groups"):
            raise ValueError(f"granularity {self.kind}: must be tensor, row, row_groups, k_groups")
        sized = self.kind in ("row_groups", "k_groups")
        if sized != (self.size > 0) or self.size < 0:
            allowed = "1 or more" if sized else "0"
            raise ValueError(f"granularity {self.kind} of size {self.size}: must be {allowed}")

    def view(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as groups; a view of its memory unless a last group was filled up.

        Args:
            weight: [R, ...], any dtype.

        Raises:
            ValueError: row_groups that do not divide the weights.
        """
        rows, columns = matrix_shape(weight.shape)
        if self.kind == "tensor":
            return weight.reshape(1, rows * columns)
        if self.kind == "row":
            return weight.reshape(rows, columns)
        if self.kind == "row_groups":
            return weight.reshape(self.scale_shape(weight.shape)[0], rows * columns // self.size)
        groups = -(-columns // self.size)
        matrix = weight.reshape(rows, columns)
        if columns % self.size:
            matrix = functional.pad(matrix, (0, groups * self.size - columns))
        return matrix.view(rows, groups, self.size)

    def restore(self, view: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight of ``shape`` of which ``view`` was made."""
        if self.kind == "k_groups":
            rows, columns = matrix_shape(shape)
            view = view.reshape(rows, view.shape[-2] * view.shape[-1])[:, :columns]
        return view.reshape(tuple(shape))

    def filled(self, weight: Tensor) -> Tensor | None:
        """Return where the view of ``weight`` holds weights (bool); None: everywhere."""
        if self.kind != "k_groups" or matrix_shape(weight.shape)[1] % self.size == 0:
            return None
        return self.view(torch.ones_like(weight, dtype=torch.bool))

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the scales of a weight of ``shape``.

        Raises:
            ValueError: row_groups that do not divide the weights.
        """
        rows, columns = matrix_shape(shape)
        if self.kind == "tensor":
            return 1, 1
        if self.kind == "row":
            return rows, 1
        if self.kind == "row_groups":
            if rows * columns % self.size:
                raise ValueError(
                    f"a weight of {rows} x {columns} cannot be cut into {self.size} groups of rows"
                )
            return self.size, 1
        return rows, -(-columns // self.size), 1

    def __str__(self) -> str:
        return f"{self.kind}({self.size})" if self.size else self.kind


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a weight as a matrix: a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
