"""Tags that say what ran: commit, versions, processor, kernels, command."""

import contextlib
import getpass
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dqrm.kernels.cpu import isa_level
from dqrm.tracking.values import MAX_TAG_LENGTH, cut

_GIT_SECONDS = 5.0


def environment_tags() -> dict[str, str]:
    """Return the tags of a run started by this process in the current folder.

    Names that MLflow's pages know (``mlflow.source.git.commit``, ``mlflow.user``...) are used
    where there is one. What cannot be found out is left out.
    """
    tags = {
        "mlflow.source.name": cut(_command(), MAX_TAG_LENGTH, "command too long"),
        "mlflow.source.type": "LOCAL",
        "host": platform.node(),
        "cpu.model": _cpu_model(),
        "cpu.threads": str(_threads()),
        "version.python": platform.python_version(),
        **{f"version.{name}": v for name in ("dqrm", "torch", "mlflow") if (v := _version(name))},
        **_git_tags(),
    }
    with contextlib.suppress(OSError, KeyError):  # a container whose user has no name
        tags["mlflow.user"] = getpass.getuser()
    with contextlib.suppress(ValueError):  # a forced level that does not exist fails elsewhere
        tags["kernels"] = isa_level()
    return {key: value for key, value in tags.items() if value}


def _command() -> str:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def _git_tags() -> dict[str, str]:
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    # Untracked files do not count: run folders and databases are born beside the code.
    changes = _git("status", "--porcelain", "--untracked-files=no")
    branch = _git("rev-parse", "--abbrev-ref", "HEAD")
    tags = {"mlflow.source.git.commit": commit}
    if branch and branch != "HEAD":
        tags["mlflow.source.git.branch"] = branch
    if changes is not None:
        tags["git.dirty"] = "true" if changes else "false"
    return tags


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _threads() -> int:
    # torch is asked only when training has loaded it already: importing it takes seconds.
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0))
