"""``--nproc``: commands that run in several processes here."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def nproc_option() -> Callable[[Function], Function]:
    """Add ``--nproc``."""
    return click.option(
        "--nproc",
        type=click.IntRange(min=1),
        metavar="N",
        help="Train in N processes on this machine; under torchrun or srun leave it out.",
    )


def workers_to_start(nproc: int | None) -> int | None:
    """Return how many workers this process is to start; None if it is to do the work itself.

    Raises:
        click.UsageError: there are several processes already.
    """
    from dqrm.launch import find_place, started_by_us

    if nproc is None or started_by_us():
        return None
    size = find_place().world_size
    if size > 1:
        raise click.UsageError(f"--nproc {nproc}: there are {size} processes already; leave it out")
    return nproc if nproc > 1 else None
