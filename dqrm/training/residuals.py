"""What the exchange of each rank still owes, as one file of a saved state."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

RESIDUALS_FILE = "residuals.safetensors"
"""Its name; tensors are called <rank>/<name of the exchange's state>."""


def write_residuals(folder: Path, residuals: Sequence[dict[str, Tensor]]) -> None:
    """Write what :meth:`dqrm.comm.exchange.Exchange.state_dict` returned, by rank."""
    tensors = {
        f"{rank}/{name}": tensor.contiguous()
        for rank, of_rank in enumerate(residuals)
        for name, tensor in of_rank.items()
    }
    save_file(tensors, folder / RESIDUALS_FILE, {"world_size": str(len(residuals))})


def read_residuals(folder: Path) -> list[dict[str, Tensor]]:
    """Return what was written, by rank; empty where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RESIDUALS_FILE
    if not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            world_size = int(file.metadata()["world_size"])
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; use an earlier checkpoint") from error
    states: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    for key, tensor in tensors.items():
        rank, _, name = key.partition("/")
        states[int(rank)][name] = tensor
    return states
