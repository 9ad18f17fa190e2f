"""The processes that train one model together, and the few words they exchange beside gradients.

Every rank reads the same data set, holds the same model and takes the same steps, each on its share
of every batch. Rank 0 alone writes: the run's folder, checkpoints and MLflow. In a world of one
nothing is exchanged and torch.distributed is not even imported.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor

from dqrm.launch import Place, find_place
from dqrm.training.config import ExchangeConfig

if TYPE_CHECKING:
    from torch.distributed import Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among the others; torch's default process group connects them."""

    place: Place = field(default_factory=Place)
    backend: str | None = None
    """What gradients travel over: "ccl", "gloo" or "ccl-intel"; None in a world of one."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.place.world_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.rank == 0

    def start_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to sum numbers over all ranks, and return what waits for the sums.

        A rank with one core begins when it waits: a thread that looked after the sum meanwhile
        would take that core.
        """
        total = torch.tensor(values, dtype=torch.float64)
        overlap = self.size > 1 and torch.get_num_threads() > 1
        work = _start_all_reduce(total) if overlap else None

        def wait() -> list[float]:
            if work is not None:
                work.wait()
            else:
                self.sum_(total)
            result: list[float] = total.tolist()
            return result

        return wait

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def wait_for_all(self) -> None:
        """Return once all ranks have called this."""
        self.sum_(torch.zeros(1))

    def from_main(self, text: str | None) -> str:
        """Return the text that rank 0 gives."""
        assert text is not None or not self.is_main
        if self.size == 1:
            return text or ""
        return self.gather(text.encode() if text is not None else b"")[0].decode()

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's bytes, in the order of the ranks, on all ranks."""
        if self.size == 1:
            return [payload]
        from torch import distributed

        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(payload)
        counts = self.sum_(sizes).tolist()
        padded = torch.zeros(max(1, *counts), dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[
            : len(payload)
        ]
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return [part[:count].numpy().tobytes() for part, count in zip(parts, counts, strict=True)]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 run the block before the others, which then find what it made."""
        if not self.is_main:
            self.wait_for_all()
        try:
            yield
        finally:
            if self.is_main:
                self.wait_for_all()


def gather_tensors(tensors: dict[str, Tensor], world: World) -> list[dict[str, Tensor]]:
    """Return every rank's tensors, in the order of the ranks, on all ranks."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return [load(payload) for payload in world.gather(save(contiguous))]


def _start_all_reduce(tensor: Tensor) -> "Work":
    from torch import distributed

    work: Work = distributed.all_reduce(tensor, async_op=True)
    return work


@contextlib.contextmanager
def join_world(config: ExchangeConfig) -> Iterator[World]:
    """Meet the other processes of the run, if the environment speaks of any.

    Raises:
        LaunchError: the environment does not say who is who.
        ValueError: ``config.backend`` cannot be used here.
        MissingRanksError: ranks did not arrive within ``config.timeout_seconds``.
    """
    place = find_place()
    if place.world_size == 1:
        yield World()
        return
    from torch import distributed

    from dqrm.comm import process_group

    backend = process_group.init(config.backend, timeout=config.timeout_seconds)
    log.info("rank %d of %d, exchange over %s", place.rank, place.world_size, backend)
    try:
        yield World(place, backend)
    finally:
        distributed.destroy_process_group()
