"""Messages of any size between all ranks, in one round.

Collectives move the same number of bytes from every rank, and messages differ. Ranks could tell
each other their sizes first, at the price of a second round trip, which is most of the time of a
small exchange. Here every channel has a capacity that all ranks know: the size that all messages
have by their codec, or a little more than the largest of late, as headers told. Messages are padded
to it. Where one did not fit, every rank sees that in the headers and the round is repeated with
room for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from dqrm.comm.message import (
    HEADER_BYTES,
    REFUSAL,
    Header,
    check_message,
    read_header,
    write_header,
)
from dqrm.comm.meter import Meter
from dqrm.comm.thread import AgreedError

_FIRST_CAPACITY = 4096
# Room beyond the largest message, and what of it is given back a round once messages are smaller.
_SLACK = 32
_RETURNED = 256


class RefusedError(AgreedError):
    """A rank had nothing to send; all ranks raise this with its reason."""


@dataclass
class _Channel:
    capacity: int = _FIRST_CAPACITY
    fresh: bool = True
    received: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    staged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def adapt(self, largest: int) -> None:
        """Take in the largest message of a round."""
        wanted = -(-(largest + largest // _SLACK) // 64) * 64
        kept = self.capacity - self.capacity // _RETURNED
        self.capacity = wanted if self.fresh else max(wanted, kept)
        self.fresh = False


@dataclass(frozen=True)
class Received:
    """The messages of all ranks, in their order."""

    buffer: Tensor
    """uint8, what holds them."""
    begins: list[int]
    """Where each payload begins in it."""
    headers: list[Header]

    def payload(self, rank: int) -> Tensor:
        """Return a rank's payload, a view."""
        begin = self.begins[rank]
        return self.buffer[begin : begin + self.headers[rank].size]


# Its name changed with torch.
_all_gather: Callable[..., object] = getattr(
    distributed, "all_gather_single", distributed.all_gather_into_tensor
)


class Wire:
    """Exchanges messages over a process group that nothing else uses meanwhile.

    Args:
        group: any process group with all-gather and all-to-all of uint8.
        meter: what counts.
        generation: of the world; messages of another are refused.
    """

    def __init__(self, group: ProcessGroup, meter: Meter, generation: int = 0) -> None:
        self.group = group
        self.meter = meter
        self.generation = generation
        self.rank = distributed.get_rank(group)
        self.world_size = distributed.get_world_size(group)
        self._channels: dict[str, _Channel] = {}

    def header(self, codec: int, step: int, name: int, count: int, size: int) -> Header:
        """Return the header of a message of this rank."""
        largest = HEADER_BYTES + size
        return Header(codec, self.rank, self.generation, step, name, count, size, largest)

    def refusal(self, message: Tensor, expected: Header, reason: str) -> Header:
        """Write a reason as this rank's message and return its header."""
        room = len(message) - HEADER_BYTES
        text = torch.frombuffer(bytearray(reason.encode()[:room]), dtype=torch.uint8)
        message[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        return self.header(REFUSAL, expected.step, expected.name, 0, len(text))

    def all_gather(
        self, name: str, phase: str, message: Tensor, header: Header, size: int | None = None
    ) -> Received:
        """Send a message to every rank.

        Args:
            name: of the channel; all ranks use the same ones in the same order.
            phase: for the meter.
            message: uint8, contiguous, the payload behind room for the header; of any length.
            header: of the message.
            size: bytes of the longest message of any rank, header included, where all ranks know.

        Raises:
            RefusedError: a rank had a reason not to send; every rank raises it.
            MessageError: what came is not what should have come.
        """
        channel = self._channels.setdefault(f"{name}/{phase}", _Channel())
        write_header(message, header)
        self.meter.record(name, phase).payload_bytes += HEADER_BYTES + header.size
        while True:
            capacity = size or channel.capacity
            channel.received = _grown(channel.received, capacity * self.world_size)
            own = message[:capacity]
            if len(own) < capacity:
                channel.staged = _grown(channel.staged, capacity)
                end = HEADER_BYTES + header.size
                channel.staged[:end] = message[:end]
                own = channel.staged[:capacity]
            received = channel.received[: capacity * self.world_size]
            with self.meter.timed(name, phase, "wire"):
                _all_gather(received, own, group=self.group)
            self._count(name, phase, capacity)
            result = self._read(channel, received, capacity, header)
            if result is not None:
                return result
            size = None

    def all_to_all(
        self,
        name: str,
        phase: str,
        messages: list[Tensor],
        headers: list[Header],
        size: int | None = None,
    ) -> Received:
        """Send a message to each rank; arguments and errors as for :meth:`all_gather`."""
        channel = self._channels.setdefault(f"{name}/{phase}", _Channel())
        largest = max(header.largest for header in headers)
        sizes = []
        for message, header in zip(messages, headers, strict=True):
            write_header(message, replace(header, largest=largest))
            sizes.append(HEADER_BYTES + header.size)
        self.meter.record(name, phase).payload_bytes += sum(sizes)
        while True:
            capacity = size or channel.capacity
            whole = capacity * self.world_size
            channel.received = _grown(channel.received, whole)
            channel.staged = _grown(channel.staged, whole)
            for rank, message in enumerate(messages):
                sent = min(sizes[rank], capacity)
                channel.staged[rank * capacity : rank * capacity + sent] = message[:sent]
            received = channel.received[:whole]
            with self.meter.timed(name, phase, "wire"):
                distributed.all_to_all_single(received, channel.staged[:whole], group=self.group)
            self._count(name, phase, capacity)
            result = self._read(channel, received, capacity, headers[self.rank])
            if result is not None:
                return result
            size = None

    def all_reduce(self, name: str, values: Tensor) -> None:
        """Sum a tensor over all ranks, in place."""
        with self.meter.timed(name, "reduce", "wire"):
            distributed.all_reduce(values, group=self.group)
        record = self.meter.record(name, "reduce")
        size = values.numel() * values.element_size()
        share = 2 * (self.world_size - 1) / self.world_size
        record.messages += 1
        record.payload_bytes += size
        record.sent_bytes += share * size
        record.received_bytes += share * size

    def _count(self, name: str, phase: str, capacity: int) -> None:
        record = self.meter.record(name, phase)
        record.messages += 1
        record.sent_bytes += capacity * (self.world_size - 1)
        record.received_bytes += capacity * (self.world_size - 1)

    def _read(
        self, channel: _Channel, received: Tensor, capacity: int, expected: Header
    ) -> Received | None:
        """Return the checked messages, or None where one did not fit."""
        parts = [
            received[rank * capacity : (rank + 1) * capacity] for rank in range(self.world_size)
        ]
        headers = [read_header(part, rank) for rank, part in enumerate(parts)]
        for part, header in zip(parts, headers, strict=True):
            # Before any of them is believed about sizes.
            if HEADER_BYTES + header.size <= capacity or header.largest <= capacity:
                check_message(part, header, expected)
        largest = max(header.largest for header in headers)
        channel.adapt(largest)
        if largest > capacity:
            return None
        reasons = []
        for part, header in zip(parts, headers, strict=True):
            if header.codec == REFUSAL:
                reason = part[HEADER_BYTES : HEADER_BYTES + header.size].numpy().tobytes()
                reasons.append(f"rank {header.rank}: {reason.decode(errors='replace')}")
        if reasons:
            raise RefusedError("; ".join(reasons))
        begins = [rank * capacity + HEADER_BYTES for rank in range(self.world_size)]
        return Received(received, begins, headers)


def _grown(buffer: Tensor, size: int) -> Tensor:
    """Return the buffer, or a larger one in its place where it is too small."""
    if len(buffer) >= size:
        return buffer
    return torch.zeros(size + size // 4, dtype=torch.uint8)
