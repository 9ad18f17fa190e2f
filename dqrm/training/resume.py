"""Which checkpoint to go on from, and whether it may go on under this configuration."""

from pathlib import Path
from typing import Any, Literal

from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint

FREE_TO_CHANGE = {
    "name",
    "output",
    "tracking",
    "checkpoint",
    "data.path",
    "train.epochs",
    "train.max_steps",
    "train.threads",
    "train.log_every",
    "train.eval_batch_size",
    "train.patience",
    "exchange.backend",
    "exchange.timeout_seconds",
    "exchange.placement",
    "exchange.shard_over_rows",
}
"""Settings a resumed run may change; all others would make it another run. The data set is
compared by digest, so it may have moved."""


def find_checkpoint(resume: Path | Literal["auto"], config: RunConfig) -> Checkpoint | None:
    """Return the checkpoint ``resume`` means.

    None when "auto" finds no run to go on with, or a folder is that of a run which ended before its
    first checkpoint and begins again.

    Raises:
        ValueError: a path is no run's, or the run that would begin again had other settings.
    """
    if resume != "auto":
        if (resume / "state.json").is_file():
            return read_checkpoint(resume)
        found = list_checkpoints(resume / "checkpoints")
        if not found and (resume / "config.yaml").is_file():
            _refuse_changes(resume, load(RunConfig, resume / "config.yaml"), config)
            return None
        if not found:
            raise ValueError(f"{resume} holds no checkpoint; give a run's folder or a checkpoint")
        return read_checkpoint(found[-1])
    runs = [config.output / config.name] if config.name else config.output.glob("*")
    newest: tuple[float, Path] | None = None
    for run in runs:
        found = list_checkpoints(run / "checkpoints")
        if not found or (run / "summary.json").exists():
            continue
        written = (found[-1] / "state.json").stat().st_mtime
        if newest is None or written > newest[0]:
            checkpoint = read_checkpoint(found[-1])
            if config.name or not changed_settings(checkpoint.config, config):
                newest = (written, found[-1])
    return read_checkpoint(newest[1]) if newest else None


def refuse_changes(checkpoint: Checkpoint, config: RunConfig, dataset_digest: str) -> None:
    """Raise ValueError if the run would go on under other settings or on other data."""
    if checkpoint.state.dataset_digest != dataset_digest:
        raise ValueError(
            f"{checkpoint.path} was trained on data set {checkpoint.state.dataset_digest}, but "
            f"data.path={config.data.path} is data set {dataset_digest}"
        )
    _refuse_changes(checkpoint.path, checkpoint.config, config)


def _refuse_changes(path: Path, before: RunConfig, after: RunConfig) -> None:
    changed = changed_settings(before, after)
    if changed:
        raise ValueError(
            f"{path} cannot go on with other settings: {'; '.join(changed)}. Leave "
            "them as they were, or start a new run"
        )


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """Return ``key was X, is Y`` for every setting that a resumed run must not change."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(after.model_dump(mode="json"))
    return [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in FREE_TO_CHANGE
        and key.partition(".")[0] not in FREE_TO_CHANGE
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
