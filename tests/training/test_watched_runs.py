"""Runs that somebody watches, that are concluded later, or were cut off before any checkpoint."""

import pytest

from dqrm.config import RunConfig
from dqrm.training.checkpoint import list_checkpoints
from dqrm.training.run import train


def config(data, output, name, **settings):
    tree = {
        "output": str(output),
        "name": name,
        "data": {"path": str(data), "batch_size": 64},
        "model": {"embedding_dim": 4, "bottom_mlp": [16], "top_mlp": [16]},
        "optim": {"name": "adagrad", "lr": 0.05},
        "train": {"epochs": 3, "threads": 1},
        "tracking": {"enabled": False},
    }
    return RunConfig.model_validate(tree | settings)


def test_a_run_is_watched_and_concluded_later(clicks_data, tmp_path):
    whole = train(config(clicks_data, tmp_path, "whole"))
    seen = []

    def watch(validation):
        seen.append((validation.epoch, validation.metrics.auc))
        return True

    held = train(config(clicks_data, tmp_path, "held"), watch=watch, conclude=False)
    assert [epoch for epoch, _ in seen] == [1.0, 2.0, 3.0]
    assert max(auc for _, auc in seen) == held.validation.auc == whole.validation.auc
    assert held.test is None
    assert not (held.run_dir / "summary.json").exists()
    assert not (held.run_dir / "artifact").exists()
    later = train(config(clicks_data, tmp_path, "held"), resume=held.run_dir)
    assert later.test == whole.test
    assert (held.run_dir / "summary.json").exists()

    stopped = train(
        config(clicks_data, tmp_path, "stopped"), watch=lambda v: v.epoch < 2, conclude=False
    )
    assert stopped.stopped
    assert not held.stopped
    (first, last) = list_checkpoints(stopped.run_dir / "checkpoints")
    assert int(last.name[-8:]) == 2 * int(first.name[-8:]), "it ends with a checkpoint"
    # What would be the end anyway is no stop.
    ended = train(config(clicks_data, tmp_path, "end"), watch=lambda v: v.epoch < 3, conclude=False)
    assert not ended.stopped


def test_a_run_without_a_checkpoint_begins_again(clicks_data, tmp_path):
    settings = config(clicks_data, tmp_path, "cut")
    with pytest.raises(KeyboardInterrupt):
        train(settings, watch=_interrupt)
    run_dir = tmp_path / "cut"
    assert not list_checkpoints(run_dir / "checkpoints")
    other = config(clicks_data, tmp_path, "cut", optim={"lr": 0.5})
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.05, is 0\.5"):
        train(other, resume=run_dir)
    again = train(settings, resume=run_dir)
    assert again.run_dir == run_dir
    assert again.test == train(config(clicks_data, tmp_path, "whole")).test
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(settings, resume=tmp_path)


def _interrupt(validation):
    raise KeyboardInterrupt
