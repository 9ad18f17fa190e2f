"""Tensors on their way into the native loops."""

from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def capsule(tensor: Tensor) -> object:
    """Return ``tensor`` as a DLPack capsule, which a native function reads and writes in place.

    Passed as it is, a tensor would go through torch's ``__dlpack__``, written in Python and
    many times slower. The tensor may require grad: loops see its values only.
    """
    return to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
