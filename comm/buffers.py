"""Tensors as the contiguous memory that transports read and write."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


def listed(tensors: Any) -> list[Tensor]:
    """The tensors of an argument that torch gives as a list or as one tensor."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def checked(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless all tensors are dense, on the CPU and of one dtype."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            kind = f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{name} takes dense tensors on the CPU, got one that is {kind}")
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"{name} got both {tensors[0].dtype} and {tensor.dtype}")


def require(name: str, holds: bool, otherwise: str) -> None:
    """Raise ValueError about the arguments of a collective."""
    if not holds:
        raise ValueError(f"{name}: {otherwise}")


def bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes [n], which share its memory if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def shares_memory(values: Tensor, tensor: Tensor) -> bool:
    """Whether values made of a tensor are the tensor's own."""
    return values.data_ptr() == tensor.data_ptr()


def put_back(values: Tensor, tensor: Tensor) -> None:
    """Copy values into the tensor they were made of, unless they share its memory."""
    if not shares_memory(values, tensor):
        tensor.detach().copy_(values.view(tensor.dtype).view(tensor.shape))


def room_for(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Room for all the tensors' bytes, and how many each has."""
    splits = [tensor.numel() * tensor.itemsize for tensor in tensors]
    return torch.empty(sum(splits), dtype=torch.uint8), splits


def unpacking(
    packed: Tensor, splits: Sequence[int], tensors: Sequence[Tensor]
) -> Callable[[], None]:
    """Return what copies packed bytes [sum(splits)] into the tensors they are of."""

    def unpack() -> None:
        for part, tensor in zip(torch.split(packed, list(splits)), tensors, strict=True):
            tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    return unpack


def split_values(tensor: Tensor, splits: Sequence[int], count: int, which: str) -> list[int]:
    """How many values of a tensor go to each of ``count`` ranks.

    Args:
        tensor: split along its first dimension.
        splits: rows for each rank; none for equal parts.
        count: number of ranks.
        which: the tensor's name in messages.
    """
    rows = tensor.shape[0] if tensor.dim() else 1
    if not splits:
        require("all_to_all", rows % count == 0,
                f"{rows} rows of {which} are not {count} equal parts")  # fmt: skip
        splits = [rows // count] * count
    require("all_to_all", len(splits) == count, f"{len(splits)} {which} splits, {count} ranks")
    require("all_to_all", sum(splits) == rows,
            f"{which} splits sum to {sum(splits)}, the tensor has {rows} rows")  # fmt: skip
    width = prod(tensor.shape[1:])
    return [split * width for split in splits]
