"""Every shipped configuration runs."""

from pathlib import Path

import pytest

import dqrm.configs
from dqrm.config import RunConfig
from dqrm.configuration import load
from dqrm.data.synth import SynthConfig, synthesize
from dqrm.training.run import train

FILES = sorted(Path(dqrm.configs.__path__[0]).rglob("*.yaml"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Criteo's columns with small tables."""
    folder = tmp_path_factory.mktemp("synth") / "data"
    synthesize(folder, SynthConfig(scale=1e-5, rows=2000))
    return folder


def test_all_are_found():
    assert [path.stem for path in FILES] == [
        "census",
        "criteo-12k",
        "criteo-kaggle",
        "criteo-terabyte",
        "synth",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_two_steps(path, generated, tmp_path):
    data = [] if path.stem == "census" else [f"data.path={generated}"]
    overrides = [*data, "train.max_steps=2", f"output={tmp_path}", "tracking.enabled=false"]
    result = train(load(RunConfig, path, overrides))
    assert result.best_step == 2
    assert result.packed_bytes < result.fp32_bytes / 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_opens_with_its_command(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# dqrm train --config {path.stem}")
