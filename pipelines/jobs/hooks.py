"""Telling somebody that a run failed."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from dqrm.pipelines.jobs.config import Hook, split_command

_SECONDS = 30.0
_TRIES = 3
_WAIT_SECONDS = 1.0


class HookError(RuntimeError):
    """The hook could not be called."""


def call_hook(hook: Hook, message: dict[str, object], folder: Path) -> None:
    """Give ``message`` to the command or the address.

    Raises:
        HookError: the command failed, or the address did not answer with a success in three tries.
    """
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
