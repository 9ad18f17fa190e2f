"""What every test of the command line starts from: a clean folder, environment and log."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dqrm.cli import cli

CHANGED_BY_COMMANDS = ("OMP_NUM_THREADS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for name in CHANGED_BY_COMMANDS:
        os.environ.pop(name, None)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    log = logging.getLogger("dqrm")
    state = (log.handlers, log.level, log.propagate)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch:
        torch.set_num_threads(threads)
    log.handlers, log.level, log.propagate = state


@pytest.fixture
def dqrm() -> Callable[..., Result]:
    """Run a command line in this process; `stdout` and `stderr` of the result are apart."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, list(arguments))

    return run
