"""The command line within the process of a test."""

import contextlib
import logging
from collections.abc import Iterator

from click.testing import CliRunner, Result

from dqrm.cli import cli


def run_dqrm(*arguments: str) -> Result:
    """Run a command line in this process; `stdout` and `stderr` of the result are apart."""
    return CliRunner().invoke(cli, list(arguments))


@contextlib.contextmanager
def log_as_before() -> Iterator[None]:
    """Undo what commands do to the log."""
    log = logging.getLogger("dqrm")
    state = (log.handlers, log.level, log.propagate)
    yield
    log.handlers, log.level, log.propagate = state
