"""What a run works on: made anew, or read back from a checkpoint; the same on every rank."""

import json
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dqrm.config import RunConfig
from dqrm.configuration import to_yaml
from dqrm.data.dataset import PreparedDataset
from dqrm.data.files import write_text
from dqrm.models.dlrm import DLRM
from dqrm.models.sizes import ModelSizes
from dqrm.training.build import build_model, sizes_of
from dqrm.training.checkpoint import Checkpoint, TrainState, read_checkpoint
from dqrm.training.optimizer import Optimizer
from dqrm.training.resume import find_checkpoint, refuse_changes
from dqrm.training.sharded_optimizer import ShardedOptimizer
from dqrm.training.sharding import choose_placement
from dqrm.training.warm_start import check_start, start_from
from dqrm.training.world import World

if TYPE_CHECKING:
    from dqrm.comm.exchange import Exchange

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run works on."""

    config: RunConfig
    dataset: PreparedDataset
    run_dir: Path
    resumed: bool
    state: TrainState
    model: DLRM
    optimizer: Optimizer | ShardedOptimizer
    exchange: "Exchange | None"
    """Of gradients, in a world of several ranks."""
    sizes: ModelSizes


def set_up(
    config: RunConfig, resume: Path | Literal["auto"] | None, recipe: str | None, world: World
) -> Run:
    """Make, or read back, all that training needs; every rank calls this.

    Args:
        config: the resolved configuration.
        resume: a run's folder, a checkpoint, "auto", or None for a new run.
        recipe: begins the new run's name when ``config.name`` is not given.
        world: of the ranks. Rank 0 chooses the folder and the checkpoint.

    Raises:
        ValueError: configuration, data and checkpoint do not fit together.
    """
    if world.size > 1 and config.train.optimize == "ipex":
        raise ValueError(
            "train.optimize=ipex trains in one process only: leave it out, or start one process"
        )
    with world.main_first():
        dataset = PreparedDataset.open(config.data.path)
    _require_alike(config, dataset.manifest.digest, world)
    checkpoint = None
    if world.is_main:
        checkpoint = find_checkpoint(resume, config) if resume else None
        if checkpoint is not None:
            refuse_changes(checkpoint, config, dataset.manifest.digest)
        elif config.train.warm_start is not None:
            check_start(config.train.warm_start, dataset)
        if checkpoint is not None:
            run_dir = checkpoint.run_dir
        else:
            run_dir = resume if isinstance(resume, Path) else _new_run_folder(config, recipe)
        chosen = str(run_dir), "" if checkpoint is None else str(checkpoint.path)
        world.from_main("\n".join(chosen))
    else:
        folder, _, path = world.from_main(None).partition("\n")
        run_dir = Path(folder)
        checkpoint = read_checkpoint(Path(path)) if path else None
    config = config.model_copy(update={"name": run_dir.name, "output": run_dir.parent})
    manifest = dataset.manifest
    state = (
        TrainState(
            dataset_digest=manifest.digest,
            features_digest=manifest.features_digest,
            features=manifest.features,
        )
        if checkpoint is None
        else checkpoint.state
    )
    torch.manual_seed(config.train.seed)
    sizes = sizes_of(config, dataset)
    placement = choose_placement(config, dataset, sizes, world)
    model = build_model(config, dataset, placement, world.rank)
    optimizer = (
        Optimizer(model, config.optim)
        if placement is None
        else ShardedOptimizer(model, config.optim)
    )
    exchange = None
    if world.size > 1:
        exchange = _make_exchange(optimizer, config)
    if checkpoint is not None:
        checkpoint.load_model(model)
        checkpoint.load_optimizer(optimizer)
        _load_residuals(checkpoint, exchange, world)
        log.info("resuming %s at step %d", run_dir, state.step)
    elif config.train.warm_start is not None:
        start_from(config.train.warm_start, config, dataset, model, optimizer)
    if world.is_main:
        write_text(run_dir / "config.yaml", to_yaml(config))
    return Run(
        config,
        dataset,
        run_dir,
        checkpoint is not None,
        state,
        model,
        optimizer,
        exchange,
        sizes,
    )


def _make_exchange(optimizer: Optimizer | ShardedOptimizer, config: RunConfig) -> "Exchange":
    from dqrm.training.exchanged_step import exchange_of, make_exchange

    seed = config.train.seed
    if isinstance(optimizer, Optimizer):
        return make_exchange(optimizer, config.exchange, seed)
    from dqrm.training.sharded_lookup import ShardedLookup, kept_tables

    exchange = exchange_of(optimizer, kept_tables(optimizer.bags), config.exchange, seed)
    ShardedLookup(optimizer.bags, exchange, config.exchange, seed)
    return exchange


def _require_alike(config: RunConfig, dataset_digest: str, world: World) -> None:
    """Raise ValueError, on every rank, unless all ranks have the same settings and data."""
    own = config.model_dump(mode="json", exclude={"name", "output", "tracking"})
    own["data"]["path"] = dataset_digest
    own["train"].pop("threads")
    everybody = [json.loads(of_rank) for of_rank in world.gather(json.dumps(own).encode())]
    for rank, theirs in enumerate(everybody):
        for section, values in theirs.items():
            for key, value in values.items():
                if value != everybody[0][section][key]:
                    what = "the data set is" if key == "path" else f"{section}.{key} is"
                    raise ValueError(
                        f"{what} {value!r} on rank {rank} and {everybody[0][section][key]!r} on "
                        "rank 0; start all processes with the same settings and data"
                    )


def _load_residuals(checkpoint: Checkpoint, exchange: "Exchange | None", world: World) -> None:
    """Let the exchange owe what it owed, shared among as many ranks as there are now."""
    states = checkpoint.residuals()
    if exchange is None:
        if any(states):
            log.warning(
                "%s was written by %d processes; what they still owed each other is dropped",
                checkpoint.path,
                len(states),
            )
        return
    if states:
        from dqrm.comm.resharding import reshard

        state = reshard(states, world.size)[world.rank]
        foreign = exchange.unknown_tables(state)
        if foreign:
            log.warning(
                "%s was written with other tables replicated; what ranks still owed of their rows "
                "is dropped",
                checkpoint.path,
            )
        exchange.load_state_dict({key: t for key, t in state.items() if key not in foreign})


def _new_run_folder(config: RunConfig, recipe: str | None) -> Path:
    config.output.mkdir(parents=True, exist_ok=True)
    if config.name is not None:
        path = config.output / config.name
        try:
            path.mkdir()
        except FileExistsError:
            raise ValueError(
                f"the run {path} exists; give another name, or go on with it: --resume {path}"
            ) from None
        return path
    stem = f"{recipe or 'train'}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1000):
        path = config.output / (f"{stem}-{attempt}" if attempt else stem)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ValueError(f"{config.output} is full of runs named {stem}-*")
