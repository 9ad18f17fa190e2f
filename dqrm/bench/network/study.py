"""Ranks on machines of their own, joined at a rate: rows, whole steps, bytes counted three ways."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dqrm.bench.exchange.plan import Case, Plan
from dqrm.bench.exchange.study import MODULE, check_room, read_cases
from dqrm.bench.network.machines import INTERFACE, Machine, machines

_PORT = 29500
_LAST_LINES = 20


def run_network(plan: Plan, processes: Sequence[int], rates: Sequence[str]) -> Iterator[list[Case]]:
    """Measure in worlds of one rank a machine, and yield the cases of each.

    Every part is a world of its own.

    Raises:
        NoNamespacesError: machines cannot be made here.
        ValueError: the tables do not fit into memory.
        RuntimeError: a rank failed; the message is what it said.
    """
    check_room(plan, max(processes))
    plan = replace(plan, interface=INTERFACE)
    for count in processes:
        for rate in rates:
            with (
                tempfile.TemporaryDirectory(prefix="dqrm-network-") as folder,
                machines(count, rate) as made,
            ):
                files = Path(folder) / "plan.json", Path(folder) / "cases.json"
                command = [sys.executable, "-m", MODULE, *map(str, files)]
                for part in plan.parts:
                    replace(plan, parts=(part,)).write(files[0])
                    run_ranks(made, command, Path(folder))
                    yield [replace(case, network=rate) for case in read_cases(files[1])]


def run_ranks(made: Sequence[Machine], command: Sequence[str], folder: Path) -> None:
    """Run a command as a rank on every machine, and wait for all.

    Args:
        made: the machines; rank 0 on the first.
        command: of every rank.
        folder: for what ranks print.

    Raises:
        RuntimeError: a rank failed; the others are killed.
    """
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, machine in enumerate(made):
            said = stack.enter_context((folder / f"rank{rank}.log").open("wb"))
            process = subprocess.Popen(
                [*machine.enter, *command],
                env={**os.environ, **_environment(rank, made)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            stack.callback(_end, process)
            ranks.append(process)
        running = True
        while running:
            running = any(process.poll() is None for process in ranks)
            for rank, process in enumerate(ranks):
                if process.returncode:
                    text = (folder / f"rank{rank}.log").read_text("utf-8", "replace")
                    last = "\n".join(text.splitlines()[-_LAST_LINES:])
                    code = process.returncode
                    raise RuntimeError(f"rank {rank} ended with exit code {code}:\n{last}")
            time.sleep(0.05)


def _environment(rank: int, made: Sequence[Machine]) -> Mapping[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(made)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": made[0].name,
        "MASTER_PORT": str(_PORT),
    }


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
