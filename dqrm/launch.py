"""How the processes of a run come to be, and how each learns which one it is.

`dqrm train --nproc N` starts N workers on this machine through torch's elastic launcher. Under
torchrun, a Kubernetes training operator or srun the processes are there already and their
environment says who is who. Importing this imports no torch: thread counts depend on the number of
processes, and must be set before torch is loaded.
"""

import os
import re
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_OURS = "dqrm-"
"""Begins the id of runs whose workers we started."""
_SLURM_PORTS = range(20_000, 50_000)


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes on the same machine."""
    local_world_size: int = 1


class LaunchError(RuntimeError):
    """Workers could not be started, or the environment does not say who is who."""


def find_place(environment: MutableMapping[str, str] = os.environ) -> Place:
    """Return the place of this process; rank 0 of 1 where nothing speaks of others.

    Reads torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; LOCAL_RANK and
    LOCAL_WORLD_SIZE where set), else Slurm's, from which torchrun's are then set.

    Raises:
        LaunchError: variables are missing or no numbers.
    """
    many = _number(environment, "SLURM_NTASKS", "1") > 1
    if "RANK" not in environment and many and "SLURM_PROCID" in environment:
        environment.update(_from_slurm(environment))
    if "RANK" not in environment:
        return Place()
    place = Place(
        _number(environment, "RANK"),
        _number(environment, "WORLD_SIZE"),
        _number(environment, "LOCAL_RANK", "0"),
        _number(environment, "LOCAL_WORLD_SIZE", "1"),
    )
    if not 0 <= place.rank < place.world_size:
        raise LaunchError(f"RANK={place.rank} with WORLD_SIZE={place.world_size}")
    if place.world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise LaunchError(
                    f"RANK and WORLD_SIZE are set, but not {name}: where does rank 0 listen? "
                    "torchrun sets all of them"
                )
    return place


def started_by_us(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Return whether this process is a worker of :func:`start_workers`."""
    return environment.get("TORCHELASTIC_RUN_ID", "").startswith(_OURS)


def start_workers(
    count: int, arguments: Sequence[str], *, module: str = "dqrm", printed: Path | None = None
) -> int:
    """Run a module with ``arguments`` in ``count`` processes, and wait for them.

    When one fails, the others are stopped. SIGINT and SIGTERM are passed on.

    Args:
        count: number of processes.
        arguments: of the module's command line.
        module: what ``python -m`` runs.
        printed: folder for what workers print to standard output; the console when not given.

    Returns:
        The exit code: 0, or that of the worker that failed first, or 128 and the signal's number.
    """
    # A launcher has nothing to compute with.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from torch.distributed.elastic.multiprocessing.api import (
        DefaultLogsSpecs,
        SignalException,
        Std,
    )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher would take it for the user's wish and hand it on.
    os.environ.pop("OMP_NUM_THREADS", None)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{_OURS}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(
            log_dir=None if printed is None else str(printed),
            redirects=Std.NONE if printed is None else Std.OUT,
        ),
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        first = min(failed.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _from_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise LaunchError("SLURM_PROCID is set, but no SLURM_STEP_NODELIST: start with srun")
    here = _number(environment, "SLURM_NODEID", "0")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    port = _SLURM_PORTS[_number(environment, "SLURM_JOB_ID", "0") % len(_SLURM_PORTS)]
    return {
        "RANK": str(_number(environment, "SLURM_PROCID")),
        "WORLD_SIZE": str(_number(environment, "SLURM_NTASKS")),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID", "0")),
        "LOCAL_WORLD_SIZE": str(_tasks_by_node(tasks or "1")[here]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list, such as ``node[03-07,12],login1``."""
    head = re.match(r"([^\[,]*)(?:\[([^\],-]*))?", nodes)
    assert head is not None
    return head[1] + (head[2] or "")


def _tasks_by_node(text: str) -> list[int]:
    """Tasks of each node from Slurm's ``2(x3),1``."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_TASKS_PER_NODE={text!r} is not understood")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _number(environment: MutableMapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name) or default
    if not value.isdigit():
        raise LaunchError(f"{name}={value!r} is no number")
    return int(value)
