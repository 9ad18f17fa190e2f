"""The command line within the process of a test."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dqrm.cli import cli


def run_dqrm(*arguments: object) -> Result:
    """Run a command line in this process; `stdout` and `stderr` of the result are apart."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def clean_environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Go to ``folder``, without the variables that steer MLflow or torchrun."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_") or name == "RANK":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(folder)


@contextlib.contextmanager
def log_as_before() -> Iterator[None]:
    """Undo what commands do to the log."""
    log = logging.getLogger("dqrm")
    state = (log.handlers, log.level, log.propagate)
    yield
    log.handlers, log.level, log.propagate = state
