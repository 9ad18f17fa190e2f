"""Checkpoints: everything a run needs to go on as if it had never stopped.

    <run>/checkpoints/step-00001200/
        model.safetensors       parameters and buffers
        optimizer.safetensors   optimizer state and the random generator's state
        residuals.safetensors   what each rank's exchange still owes; of several processes only
        state.json              position in the data, best model so far, history, versions
        config.yaml             the whole configuration

A checkpoint is a folder renamed into place when complete; nothing in it is a pickle.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dqrm import __version__
from dqrm.config import RunConfig
from dqrm.configuration import load, to_yaml
from dqrm.data.files import new_folder, write_json
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.models.sharded import ShardedEmbeddingBags
from dqrm.training.metrics import Metrics
from dqrm.training.optimizer import Optimizer
from dqrm.training.residuals import read_residuals, write_residuals
from dqrm.training.sharded_checkpoint import gather_model, gather_optimizer
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.world import World

FORMAT_VERSION = 1


@dataclass
class TrainState:
    """Where a run stands. A step is one batch; ``batch`` counts within the epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_step: int | None = None
    best_value: float | None = None
    validations_since_best: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    """Of this process and all its threads, in training steps alone."""
    samples: int = 0
    loss_sum: float = 0.0
    """Sum of the losses since the last logged one, over ``loss_rows`` rows."""
    loss_rows: int = 0
    logged_step: int = 0
    """Step of the last logged loss."""
    logged_seconds: float = 0.0
    """``train_seconds`` at that step."""
    logged_cpu_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    dataset_digest: str = ""
    features_digest: str = ""
    features: dict[str, Any] = field(default_factory=dict)
    """Columns and tables of the data; see Manifest.features."""

    def best_validation(self) -> Metrics | None:
        """Return what validation measured at the best step, if there was one."""
        for entry in self.history:
            if entry["step"] == self.best_step and "val/auc" in entry:
                values = {k.removeprefix("val/"): v for k, v in entry.items() if k[:4] == "val/"}
                num_rows = int(values.pop("num_rows"))
                return Metrics(num_rows=num_rows, **values)
        return None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: configuration and state; tensors are loaded on demand."""

    path: Path
    config: RunConfig
    state: TrainState

    @property
    def run_dir(self) -> Path:
        """Folder of the run the checkpoint belongs to."""
        return self.path.parent.parent

    def load_model(self, model: DLRM) -> None:
        """Put the parameters into ``model``; shapes and types must agree."""
        tensors = self.model_tensors()
        if isinstance(model.emb_l, ShardedEmbeddingBags):
            try:
                model.emb_l.load_whole(self._tables())
            except ValueError as error:
                raise ValueError(f"{self.path} does not fit the model: {error}") from error
            tensors = {n: t for n, t in tensors.items() if not n.startswith("emb_l.")}
            tensors |= model.emb_l.state_dict(prefix="emb_l.")
        for name, own in model.state_dict().items():
            if name in tensors and tensors[name].dtype != own.dtype:
                raise ValueError(
                    f"{self.path} does not fit the model: {name} holds {tensors[name].dtype}, "
                    f"the model {own.dtype}; was quant.storage another?"
                )
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} does not fit the model: {_first_difference(error)}"
            ) from error
        if isinstance(model.emb_l, EmbeddingBagCollection | ShardedEmbeddingBags):
            model.emb_l.restore_scales()

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name, mapped into memory."""
        return _load_tensors(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state by name, without that of the random generator."""
        tensors = _load_tensors(self.path / "optimizer.safetensors")
        del tensors["rng.torch"]
        return tensors

    def tables(self, model: DLRM) -> Iterator[EmbeddingBagCollection]:
        """Yield the tables of a model in their order, one at a time, with the values saved here.

        Args:
            model: that has the tables, or a part of them.
        """
        if isinstance(model.emb_l, EmbeddingBagCollection):
            yield model.emb_l
            return
        assert isinstance(model.emb_l, ShardedEmbeddingBags)
        yield from model.emb_l.one_by_one(self._tables())

    def _tables(self) -> dict[str, torch.Tensor]:
        """Return the state of the collection of all tables; rows are read when they are needed."""
        tensors = self.model_tensors()
        prefix = "emb_l."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def load_optimizer(self, optimizer: Optimizer | ShardedOptimizer) -> None:
        """Put optimizer state into ``optimizer`` and the generator's state into torch."""
        tensors = _load_tensors(self.path / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng.torch"))
        optimizer.load_state(tensors)

    def residuals(self) -> list[dict[str, torch.Tensor]]:
        """Return what the exchange of each rank owed; empty where one process trained alone."""
        return read_residuals(self.path)


def save_checkpoint(
    folder: Path,
    model: DLRM,
    optimizer: Optimizer | ShardedOptimizer,
    state: TrainState,
    config: RunConfig,
    residuals: Sequence[dict[str, torch.Tensor]] | None = None,
    world: World | None = None,
) -> Path:
    """Write ``folder/step-<step>`` atomically and return it.

    Args:
        folder: of all checkpoints of the run.
        model: its parameters and buffers are saved.
        optimizer: its state is saved.
        state: where the run stands.
        config: the run's.
        residuals: what the exchange of each rank still owes, in a world of several.
        world: of the ranks that share out the tables; the others call send_checkpoint
            of dqrm.training.sharded_checkpoint.
    """
    path = folder / f"step-{state.step:08d}"
    with new_folder(path) as temporary:
        model_path, optimizer_path = (
            temporary / "model.safetensors",
            temporary / "optimizer.safetensors",
        )
        rng = {"rng.torch": torch.get_rng_state()}
        if isinstance(optimizer, ShardedOptimizer):
            assert world is not None
            gather_model(model_path, model, optimizer.bags, world)
            gather_optimizer(optimizer_path, optimizer, rng, world)
        else:
            save_file(
                {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                model_path,
            )
            tensors = {name: t.detach().contiguous() for name, t in optimizer.state().items()}
            save_file(tensors | rng, optimizer_path)
        if residuals is not None:
            write_residuals(temporary, residuals)
        (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        write_json(
            temporary / "state.json",
            {
                "format_version": FORMAT_VERSION,
                "dqrm_version": __version__,
                "torch_version": torch.__version__,
                **asdict(state),
            },
        )
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's configuration and state.

    Raises:
        ValueError: ``path`` is no checkpoint, or one of a newer format.
    """
    state_path = path / "state.json"
    if not state_path.is_file():
        raise ValueError(f"{path} is no checkpoint: it has no state.json")
    fields = _read_json(state_path)
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{state_path}: format_version {version} is unknown; this dqrm reads {FORMAT_VERSION}"
        )
    fields.pop("dqrm_version")
    fields.pop("torch_version")
    return Checkpoint(path, load(RunConfig, path / "config.yaml"), TrainState(**fields))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the best one."""
    for path in list_checkpoints(folder)[:-keep_last]:
        if best_step is None or path.name != f"step-{best_step:08d}":
            shutil.rmtree(path)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; use an earlier checkpoint") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; use an earlier checkpoint") from error
    return fields


def _first_difference(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return (lines[1] if len(lines) > 1 else lines[0]).strip()
