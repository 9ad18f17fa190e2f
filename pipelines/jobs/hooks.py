"""Telling somebody that a run failed."""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from dqrm.pipelines.jobs.config import Hook, split_command
from dqrm.pipelines.jobs.state import Event, JobFolder

log = logging.getLogger(__name__)

_SECONDS = 30.0
_TRIES = 3
_WAIT_SECONDS = 1.0


class HookError(RuntimeError):
    """The hook could not be called."""


def tell_failure(
    hook: Hook | None, event: Event, folder: JobFolder, base: Path, tracking_uri: str | None
) -> Event:
    """Tell whom the job names of a failure.

    What goes wrong with that stands in the state beside the failure, and in the returned event.

    Args:
        hook: of the job.
        event: the failure, as it stands in the state.
        folder: of the job.
        base: folder of the file of jobs, where a command starts.
        tracking_uri: store of the run.
    """
    if hook is None:
        return event
    message: dict[str, object] = {
        "text": f"{folder.name} {event.outcome}: {event.detail}",
        "job": folder.name,
        "outcome": event.outcome,
        "detail": event.detail,
        "scheduled": event.scheduled,
        "tries": event.tries,
        "seconds": event.seconds,
        "log": str(folder.log(event.run)) if event.run else None,
        "mlflow_run_id": event.run_id,
        "tracking_uri": tracking_uri,
    }
    try:
        _call_hook(hook, message, base)
    except HookError as error:
        log.error("%s: nobody was told of the failure: %s", folder.name, error)
        untold = replace(event, hook_fault=str(error))
        with folder.changing() as state:
            state.events = [untold if other == event else other for other in state.events]
        return untold
    return event


def _call_hook(hook: Hook, message: dict[str, object], folder: Path) -> None:
    content = json.dumps(message).encode()
    if hook.webhook is not None:
        _post(hook.webhook, content)
        return
    assert hook.command is not None
    try:
        done = subprocess.run(
            split_command(hook.command),
            input=content,
            cwd=folder,
            env={**os.environ, "PATH": program_path()},
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HookError(str(error)) from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise HookError(" ".join([f"exit code {done.returncode}", *last]))


def program_path() -> str:
    """PATH with the programs of this environment first: cron knows nothing of it."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _post(address: str, content: bytes) -> None:
    request = urllib.request.Request(
        address, data=content, headers={"Content-Type": "application/json"}, method="POST"
    )
    for left in reversed(range(_TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS):
                return
        except (OSError, ValueError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or not left:
                raise HookError(f"{type(error).__name__}: {error}") from error
        time.sleep(_WAIT_SECONDS)
