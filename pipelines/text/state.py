"""Where fine-tuning stands, on the disk: a killed stage goes on as if it had never stopped.

    <scratch>/step-00000120/   model.safetensors, optimizer.safetensors, compression.safetensors,
                               state.json; of several processes residuals.safetensors
    <scratch>/best/            model.safetensors and compression.safetensors of the best so far

Each is a folder renamed into place when complete; nothing in it is a pickle.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from dqrm.compress.transforms.base import Compression
from dqrm.data.files import new_folder, write_json
from dqrm.training.residuals import read_residuals, write_residuals
from dqrm.training.world import World

if TYPE_CHECKING:
    from dqrm.pipelines.text.replicas import Replicas

log = logging.getLogger(__name__)

_MODEL = "model.safetensors"
_COMPRESSION = "compression.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


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
    replicas: "Replicas | None" = None,
) -> None:
    """Write where fine-tuning stands, and drop what was written before.

    Of several processes each calls this, and rank 0 writes.

    Args:
        folder: of states.
        model: in training.
        compression: attached to it.
        optimizer: of it.
        state: where it stands.
        replicas: of several processes.
    """
    random, residuals = [torch.get_rng_state()], None
    if replicas is not None:
        replicas.require_equal()
        random, residuals = replicas.gather_state()
        if not replicas.world.is_main:
            return
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as temporary:
        _save_model(temporary, model, compression)
        tensors = {
            f"{index}/{name}": torch.as_tensor(value).contiguous()
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        for rank, of_rank in enumerate(random):
            tensors[_rng(rank)] = of_rank
        save_file(tensors, temporary / _OPTIMIZER)
        if residuals is not None:
            write_residuals(temporary, residuals)
        write_json(temporary / _STATE, asdict(state))
    for other in _saved(folder):
        if other != path:
            shutil.rmtree(other)


def load_state(
    folder: Path,
    model: torch.nn.Module,
    compression: Compression,
    optimizer: torch.optim.Optimizer,
    replicas: "Replicas | None" = None,
) -> TextState | None:
    """Put the newest state into all of these and torch; None where there is none.

    It may be that of any number of processes. One that was not among them keeps its own random
    generator's state.
    """
    saved = _saved(folder)
    path = saved[-1] if saved else None
    world = World() if replicas is None else replicas.world
    if replicas is not None:
        # What rank 0 finds, should others see the folder differently.
        found = world.from_main(str(path or "") if world.is_main else None)
        path = Path(found) if found else None
    if path is None:
        return None
    _load_model(path, model, compression)
    tensors = load_file(path / _OPTIMIZER)
    random = tensors.get(_rng(world.rank))
    if random is not None:
        torch.set_rng_state(random)
    values: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        if index.isdecimal():
            values.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": values, "param_groups": groups})
    residuals = read_residuals(path)
    if replicas is not None:
        replicas.load_residuals(residuals)
    elif any(residuals):
        log.warning(
            "%s was written by %d processes; what they still owed each other is dropped",
            path,
            len(residuals),
        )
    return TextState(**json.loads((path / _STATE).read_text(encoding="utf-8")))


def save_best(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    """Keep the best model so far."""
    with new_folder(folder / "best") as temporary:
        _save_model(temporary, model, compression)


def load_best(folder: Path, model: torch.nn.Module, compression: Compression) -> None:
    """Put what was best into ``model``, and its compression into ``compression``."""
    _load_model(folder / "best", model, compression)


def _rng(rank: int) -> str:
    """Name of the state of a process's random generator."""
    return f"rng.torch/{rank}" if rank else "rng.torch"


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
