"""Sums of a few numbers over all ranks, such as of losses, that travel beside gradients."""

from collections.abc import Sequence
from typing import Final

import torch

from dqrm.comm.message import HEADER_BYTES, MessageError, name_checksum
from dqrm.comm.wire import Outgoing, Rounds, Wire

_NAME: Final = "numbers"
_CODEC: Final = 32
"""In headers: float64 as it is."""


class NumberSum:
    """Sums numbers in the order of the ranks, in double precision.

    Args:
        wire: to exchange messages on.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def rounds(self, numbers: Sequence[float], step: int) -> Rounds[list[float]]:
        """Return the sums, the same bits on all ranks.

        Args:
            numbers: as many on every rank.
            step: number of the step.

        Raises:
            MessageError: another rank sent more or fewer.
        """
        wire = self.wire
        own = torch.tensor(numbers, dtype=torch.float64)
        if wire.world_size == 1:
            return own.tolist()
        payload = own.view(torch.uint8)
        message = torch.cat([torch.zeros(HEADER_BYTES, dtype=torch.uint8), payload])
        checksum = name_checksum(_NAME)
        header = wire.header(_CODEC, step, checksum, len(own), len(payload))
        received = yield Outgoing(_NAME, "gather", message, header, len(message))
        total = torch.zeros_like(own)
        for rank in range(wire.world_size):
            theirs = received.payload(rank)
            if len(theirs) != len(payload):
                raise MessageError(
                    f"rank {rank} sent {len(theirs)} bytes of numbers, not {len(payload)}"
                )
            total += theirs.clone().view(torch.float64)
        return total.tolist()
