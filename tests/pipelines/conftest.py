"""A clean folder and environment for every pipeline."""

import logging
import os
import sys

import pytest
from click.testing import CliRunner

from dqrm.cli import cli


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """An empty current folder, no variables that steer MLflow, and the process left as it was."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_") or name == "RANK":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    log = logging.getLogger("dqrm")
    before = (log.handlers, log.level, log.propagate)
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    log.handlers, log.level, log.propagate = before
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture
def dqrm():
    """Run a command line in this process."""

    def run(*arguments):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return run
