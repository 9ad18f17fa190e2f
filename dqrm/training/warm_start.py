"""A new run that begins with the model of an earlier one.

What is taken over: the MLPs, the rows of every id that the earlier data had, and, where the
optimizer has the same name, its state of both. Rows of new ids, and their state, are those of any
new run. Step, rate schedule, random numbers and the count of periodic scales begin anew.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqrm.config import RunConfig
from dqrm.data.dataset import PreparedDataset
from dqrm.data.manifest import VOCABULARY_FOLDER
from dqrm.data.vocabulary import keys_digest, load_keys
from dqrm.models.dlrm import DLRM
from dqrm.models.embedding import EmbeddingBagCollection
from dqrm.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from dqrm.training.optimizer import Optimizer
from dqrm.training.sharded_optimizer import ShardedOptimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Rows:
    """Where the rows of one table are."""

    before: slice
    """In the earlier model."""
    now: slice
    """In the new one; as many."""


def find_model(path: Path, where: str | None = None) -> Checkpoint:
    """Return the checkpoint that ``path`` means: itself, or the selected one of a finished run.

    Raises:
        ValueError: there is none; ``where`` begins the message, or else the path.
    """
    where = where or str(path)
    for candidate in (path, path / "checkpoint"):
        if (candidate / "state.json").is_file():
            return read_checkpoint(candidate)
    found = list_checkpoints(path / "checkpoints")
    if not found:
        raise ValueError(f"{where}: holds no checkpoint; name a run's folder or a checkpoint")
    if not (path / "summary.json").is_file():
        raise ValueError(
            f"{where}: that run has not finished, so no model is selected; name "
            f"a checkpoint, such as {found[-1]}"
        )
    last = read_checkpoint(found[-1]).state
    return read_checkpoint(path / "checkpoints" / f"step-{last.best_step or last.step:08d}")


def check_start(path: Path, dataset: PreparedDataset) -> None:
    """Raise ValueError unless a model for ``dataset`` can begin with the one at ``path``."""
    list(_table_rows(_find_start(path), dataset))


def start_from(
    path: Path,
    config: RunConfig,
    dataset: PreparedDataset,
    model: DLRM,
    optimizer: Optimizer | ShardedOptimizer,
) -> None:
    """Put the values of an earlier model into a new one.

    Args:
        path: a run's folder or a checkpoint, see :func:`find_model`.
        config: of the new run.
        dataset: that the new run trains on.
        model: as it was built for ``dataset``; keeps its rows for ids that are new.
        optimizer: of ``model``.

    Raises:
        ValueError: data or model do not go on from the earlier ones; the message says what.
    """
    checkpoint = _find_start(path)
    if not isinstance(model.emb_l, EmbeddingBagCollection) or not isinstance(optimizer, Optimizer):
        raise ValueError(
            "train.warm_start is not made for sharded tables: set exchange.placement=replicate"
        )
    rows = list(_table_rows(checkpoint, dataset))
    _fill_model(checkpoint, model, model.emb_l, rows)
    if checkpoint.config.optim.name == config.optim.name:
        _fill_optimizer(checkpoint, optimizer, rows)
        kept = "with the state of its optimizer"
    else:
        kept = f"without the state of its optimizer, which was {checkpoint.config.optim.name}"
    old, new = sum(r.now.stop - r.now.start for r in rows), model.emb_l.num_rows
    log.info("beginning with %s, %s; %d of %d rows are new", path, kept, new - old, new)


def _find_start(path: Path) -> Checkpoint:
    return find_model(path, f"train.warm_start={path}")


def _table_rows(checkpoint: Checkpoint, dataset: PreparedDataset) -> Iterator[_Rows]:
    """Yield the rows of each table that both models have; refuse other columns or ids."""
    before, now = checkpoint.state.features, dataset.manifest.features
    if not before:
        if checkpoint.state.features_digest == dataset.manifest.features_digest:
            before = now
        else:
            raise ValueError(
                f"{checkpoint.path} does not say what vocabularies it was trained with, and they "
                f"are not those of {dataset.path}"
            )
    for role, old, new in (
        ("dense columns", [c["name"] for c in before["dense"]], [c["name"] for c in now["dense"]]),
        ("tables", [t[0] for t in before["tables"]], [t[0] for t in now["tables"]]),
    ):
        if old != new:
            raise ValueError(
                f"{dataset.path} has the {role} {', '.join(new)}; {checkpoint.path} was trained "
                f"with {', '.join(old)}"
            )
    old_start = new_start = 0
    for old, new in zip(before["tables"], now["tables"], strict=True):
        _require_extension(old, new, checkpoint, dataset)
        yield _Rows(slice(old_start, old_start + old[1]), slice(new_start, new_start + old[1]))
        old_start, new_start = old_start + old[1], new_start + new[1]


def _require_extension(
    old: list[Any], new: list[Any], checkpoint: Checkpoint, dataset: PreparedDataset
) -> None:
    """Raise ValueError unless every id of a table still means what it meant."""
    name, old_rows, _, old_digest = old
    if new == old:
        return
    if new[3] is not None and old_digest is not None and new[1] >= old_rows:
        file = next(c for c in dataset.schema.categorical if c.name == name).vocabulary_file
        keys = load_keys(dataset.path / VOCABULARY_FOLDER / file)
        # Id 0 is no key.
        if keys_digest(keys[: old_rows - 1]) == old_digest:
            return
    raise ValueError(
        f"table {name!r} of {dataset.path} has other ids ({new[1]} rows) than {checkpoint.path} "
        f"was trained with ({old_rows} rows); prepare the data with `dqrm data prepare --base`, "
        "naming the data set of that model"
    )


@torch.no_grad()
def _fill_model(
    checkpoint: Checkpoint, model: DLRM, tables: EmbeddingBagCollection, rows: list[_Rows]
) -> None:
    saved = checkpoint.model_tensors()
    weight = saved["emb_l.weight"]
    if weight.dtype != tables.weight.dtype or weight.shape[1:] != tables.weight.shape[1:]:
        raise ValueError(
            f"{checkpoint.path}: its rows are {weight.dtype}{list(weight.shape[1:])}, those of the "
            f"new model {tables.weight.dtype}{list(tables.weight.shape[1:])}; model.embedding_dim "
            "and quant.storage must be the same"
        )
    own = model.state_dict()
    taken = {name: t for name, t in saved.items() if not name.startswith("emb_l.")}
    for name in sorted(taken.keys() | {n for n in own if not n.startswith("emb_l.")}):
        shapes = [tuple(of[name].shape) if name in of else None for of in (taken, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{checkpoint.path}: {name} has shape {shapes[0]}, in the new model {shapes[1]}; "
                "the model section and quant.mlp_bits must be the same"
            )
    model.load_state_dict({**own, **taken})
    _copy(weight, tables.weight.data, rows)
    tables.table_scale.copy_(saved["emb_l.table_scale"])
    tables.restore_scales()


def _fill_optimizer(checkpoint: Checkpoint, optimizer: Optimizer, rows: list[_Rows]) -> None:
    saved = checkpoint.optimizer_tensors()
    for name, own in optimizer.rows.state().items():
        tensor = saved[f"rows.{name}"]
        if not own.dim():
            own.copy_(tensor)
        elif tensor.dtype == own.dtype and tensor.shape[1:] == own.shape[1:]:
            _copy(tensor, own, rows)
    optimizer.load_dense_state(saved)


def _copy(before: Tensor, now: Tensor, rows: list[_Rows]) -> None:
    for table in rows:
        now[table.now] = before[table.before]
