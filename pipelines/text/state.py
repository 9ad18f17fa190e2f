"""Where fine-tuning stands, on the disk: a killed stage goes on as if it had never stopped.

    <scratch>/step-00000120/   model.safetensors, optimizer.safetensors, compression.safetensors,
                               state.json
    <scratch>/best/            model.safetensors and compression.safetensors of the best so far

Each is a folder renamed into place when complete; nothing in it is a pickle.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from dqrm.compress.transforms.base import Compression
from dqrm.data.files import new_folder, write_json

_MODEL = "model.safetensors"
_COMPRESSION = "compression.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_RNG = "rng.torch"


@dataclass
class TextState:
    """Where fine-tuning stands. A step is one batch; ``batch`` counts within the epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_step: int | None = None
    best: dict[str, float] | None = None
    """Metrics of the best model so far."""
    seconds: float = 0.0
    """Of training steps alone."""
    samples: int = 0
    loss_sum: float = 0.0
    """Of the rows since the last logged loss."""
    loss_rows: int = 0


def save_state(
    folder: Path,
    model: torch.nn.Module,
    compression: Compression,
    optimizer: torch.optim.Optimizer,
    state: TextState,
) -> None:
    """Write where fine-tuning stands, and drop what was written before."""
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as temporary:
        _save_model(temporary, model, compression)
        tensors = {
            f"{index}/{name}": torch.as_tensor(value).contiguous()
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file({**tensors, _RNG: torch.get_rng_state()}, temporary / _OPTIMIZER)
        write_json(temporary / _STATE, asdict(state))
    for other in _saved(folder):
        if other != path:
            shutil.rmtree(other)


def load_state(
    folder: Path,
    model: torch.nn.Module,
    compression: Compression,
    optimizer: torch.optim.Optimizer,
) -> TextState | None:
    """Put the newest state into all of these and torch; None where there is none."""
    saved = _saved(folder)
    if not saved:
        return None
    _load_model(saved[-1], model, compression)
    tensors = load_file(saved[-1] / _OPTIMIZER)
    torch.set_rng_state(tensors.pop(_RNG))
    values: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        values.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": values, "param_groups": groups})
    return TextState(**json.loads((saved[-1] / _STATE).read_text(encoding="utf-8")))


def save_best(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    """Keep the best model so far."""
    with new_folder(folder / "best") as temporary:
        _save_model(temporary, model, compression)


def load_best(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    """Put what was best into ``model``, and its compression into ``compression``."""
    _load_model(folder / "best", model, compression)


def _save_model(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    save_model(model, str(folder / _MODEL))
    save_file(
        {name: value.contiguous() for name, value in compression.state_dict().items()},
        folder / _COMPRESSION,
    )


def _load_model(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    load_model(model, folder / _MODEL)
    compression.load_state_dict(load_file(folder / _COMPRESSION))


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _STATE).is_file())
