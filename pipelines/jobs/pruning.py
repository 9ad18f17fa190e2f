"""Which logs of a job's runs are kept."""

import time
from typing import get_args

from dqrm.pipelines.jobs.config import Logs
from dqrm.pipelines.jobs.state import JobFolder, Outcome

_DAY_SECONDS = 86400
_FINE: tuple[Outcome, ...] = ("succeeded", "interrupted", "skipped", "missed")
_FAILURES: tuple[Outcome, ...] = tuple(o for o in get_args(Outcome) if o not in _FINE)


def prune_logs(folder: JobFolder, rule: Logs) -> None:
    """Remove the logs that ``rule`` does not keep.

    Those of a run that goes on, and of the last one that failed, are kept in any case.
    """
    state = folder.read()
    kept = {state.running.run} if state.running else set()
    failed = [event.run for event in state.events if event.outcome in _FAILURES and event.run]
    kept.update(failed[-1:])
    ages = sorted(
        ((path.stat().st_mtime, path) for path in (folder.path / "logs").glob("*.log")),
        reverse=True,
    )
    oldest = time.time() - rule.days * _DAY_SECONDS if rule.days else 0.0
    for position, (written, path) in enumerate(ages):
        if path.stem not in kept and (position >= rule.keep or written < oldest):
            path.unlink(missing_ok=True)
