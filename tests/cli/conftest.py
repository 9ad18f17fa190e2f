"""What every test of the command line starts from: a clean folder, environment and log."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from command_line import log_as_before, run_dqrm

CHANGED_BY_COMMANDS = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for name in CHANGED_BY_COMMANDS:
        os.environ.pop(name, None)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with log_as_before():
        yield
    os.environ.clear()
    os.environ.update(before)
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def dqrm() -> Callable[..., Result]:
    """Run a command line in this process; `stdout` and `stderr` of the result are apart."""
    return run_dqrm


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks with 26 small tables, prepared."""
    from dqrm.data.synth import SynthConfig, synthesize

    path = tmp_path_factory.mktemp("data") / "synth"
    synthesize(path, SynthConfig(scale=1e-4, rows=4000, workers=1))
    return path
